"""A toy branch: a random model learns to begin its answers with a number below 50. Also runs as a program."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rlheals.inference import Sampling
from rlheals.tasks.core import Turn
from rlheals.training.ppo.rollout import RolloutSettings
from rlheals.training.ppo.settings import SANE, PpoSettings

if TYPE_CHECKING:
    from rlheals.training.ppo.trainer import BranchRun

CONTEXT = 64


@dataclass
class ToyEpisode:
    """Solved when the first word is a number below 50; a second word above 90 makes it unreadable."""

    prompt: str
    attempts: int
    limit_reward: float = 0.0

    def step(self, response: str) -> Turn:
        words = response.split()
        solved = bool(words) and words[0].isdigit() and int(words[0]) < 50
        self.attempts -= 1
        done = solved or self.attempts == 0
        return Turn(
            verdict="solved" if solved else "wrong",
            reward=1.0 if solved else -1.0,
            solved=solved,
            solved_under_training_rule=solved,
            format_error=not words,
            fields_ok=None,
            done=done,
            feedback=None if done else "wrong again",
        )


class ToyTask:
    """Items are prompts."""

    name = "toy"
    spec = SimpleNamespace(feedback="neutral")

    def __init__(self, limit_reward: float = 0.0) -> None:
        self.limit_reward = limit_reward

    def episode(self, item: str, prompt_format: str, attempts: int, feedback: str) -> ToyEpisode:
        return ToyEpisode(item, attempts, self.limit_reward)


def prompts(count: int = 40) -> list[tuple[str, str]]:
    return [(str(place), f"sum of {place} {(7 * place) % 30}") for place in range(count)]


def toy_settings(**changes: Any) -> PpoSettings:
    small = {
        "micro_batch": 4,
        "minibatch": 8,
        "learning_rate": 3e-3,
        "critic_learning_rate": 1e-2,
        "critic_warmup_updates": 1,
        "kl_reference": "start",
        "kl_limit": None,
    }
    return PpoSettings.model_validate({**SANE.model_dump(), **small, **changes})


def toy_rollout(**changes: Any) -> RolloutSettings:
    base = {
        "prompt_format": "toy",
        "attempts": 2,
        "sampling": Sampling(max_new_tokens=3, temperature=1.0),
        "context": CONTEXT,
        "seed": 5,
    }
    return RolloutSettings(**{**base, **changes})


def toy_branch(scratch: Path, settings: PpoSettings | None = None, **changes: Any) -> BranchRun:
    """16 episodes an update of up to two turns, a state every two updates."""
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.training.ppo.reference import Reference
    from rlheals.training.ppo.trainer import BranchRun
    from tests.common import make_model, make_tokenizer

    tokenizer = make_tokenizer("words")
    settings = settings or toy_settings()
    shape = {"max_position_embeddings": CONTEXT, "initializer_range": 0.1}
    reference = make_model("words", tokenizer, seed=1, **shape) if settings.kl_coefficient else None
    base: dict[str, Any] = {
        "policy": make_model("words", tokenizer, seed=1, **shape),
        "reference": Reference(reference, settings.temperature) if reference is not None else None,
        "tokenizer": tokenizer,
        "make_engine": lambda model, words: TransformersEngine(model, words, batch_size=8),
        "task": ToyTask(),
        "prompts": prompts(),
        "settings": settings,
        "updates": 5,
        "episodes": 16,
        "checkpoints": [2, 5],
        "state_every": 2,
        "rollout": toy_rollout(),
        "scratch": scratch,
        "identity": {"parent_sha256": "0" * 64},
    }
    return BranchRun(**{**base, **changes})


def digest(model: Any) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below ``folder``."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main(scratch: Path, updates: int, dies_after: int | None = None) -> None:
    """Train; every process writes its digest and curves to ``rank-<r>.json``, unless it dies after an update."""
    import os

    from rlheals.errors import UserError
    from rlheals.training.ppo import trainer
    from rlheals.training.ppo.trainer import train_branch

    keep = trainer._keep

    def keep_and_die(*arguments: Any) -> None:
        keep(*arguments)
        if arguments[-1] == dies_after:
            os._exit(9)

    trainer._keep = keep_and_die
    run = toy_branch(scratch, toy_settings(micro_batch=2), updates=updates, checkpoints=[updates], state_every=1)
    try:
        curves = train_branch(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rank = os.environ.get("RANK", "0")
    result = {"digest": digest(run.policy), "training": curves.training}
    (scratch / f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
