"""What a PPO update costs beyond its model passes, and batched rollouts against one conversation at a time.

Run: python -m bench.bench_ppo          (after `dvc repro`, or `dvc pull`: it starts from rung 40 of `mini`)

One thread, CPU seconds. The bare sum is: generate the same number of answers, one pass over them without gradients, and
as many training passes (forward, backward, AdamW) as an update has epochs, with the plain model and nothing else. An
update adds the critic, the reference model with its exact KL, advantages, grading and the curves.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ruamel.yaml import YAML

from rlheals.evaluation.dialogue import Dialogue
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.params import parse_params
from rlheals.profile import render
from rlheals.stages.common import Run
from rlheals.stages.ppo import make_branch
from rlheals.training.ppo.batches import make_batch
from rlheals.training.ppo.rollout import collect, draw_hands
from rlheals.training.ppo.settings import settings_of
from rlheals.training.ppo.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlheals.training.ppo.rollout import EpisodeRecord
    from rlheals.training.ppo.trainer import BranchRun

START, UPDATES, MULTI_TURN = 40, 6, 16


def main() -> None:
    """Measure and print tables."""
    torch.set_num_threads(1)
    print("| update of 128 episodes, CPU seconds | ppo (KL to the base) | reward_only |\n|---|---|---|")
    columns = [measure(arm) for arm in ("ppo", "reward_only")]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |", flush=True)
    rollouts()


def branch(arm: str, **changes: Any) -> BranchRun:
    """A branch of `mini` that keeps nothing."""
    text = render("mini", ["compute.threads=1", f"ppo.arms=[{arm}]"]).text
    run = Run(parse_params(YAML(typ="safe").load(text)), "tiny", 0, Path(), start=START, arm=arm)
    made = make_branch(run, settings_of(run.params.ppo, arm), Path(tempfile.mkdtemp()), {})
    return replace(made, **changes)


def measure(arm: str) -> dict[str, float]:
    """Median seconds of the parts of an update behind the critic's warm-up, and of the bare passes."""
    run = branch(arm)
    trainer = Trainer(run)
    rows = []
    for index in range(UPDATES):
        begun = time.process_time()
        trainer.update(index)
        if index >= run.settings.critic_warmup_updates:
            rows.append(time.process_time() - begun)
    records = trainer.play(UPDATES)
    generate = cpu_seconds(lambda: trainer.play(UPDATES))
    model, optimizer = run.policy, torch.optim.AdamW(run.policy.parameters(), lr=0.0)
    score = cpu_seconds(lambda: passes(model, records, run, None))
    train = cpu_seconds(lambda: passes(model, records, run, optimizer))
    bare = generate + score + run.settings.epochs * train
    update = statistics.median(rows)
    return {
        "one update": update,
        "bare: generate": generate,
        "bare: one scoring pass": score,
        "bare: one training pass": train,
        f"bare sum, {run.settings.epochs} epochs": bare,
        "ratio (goal ≤ 1.5)": update / bare,
    }


def passes(model: Any, records: list[EpisodeRecord], run: BranchRun, optimizer: Any) -> None:
    """One pass of the plain model over all episodes, in the update's micro-batches and minibatches."""
    size, steps = run.settings.micro_batch, run.settings.minibatch // run.settings.micro_batch
    with torch.set_grad_enabled(optimizer is not None):
        for place, start in enumerate(range(0, len(records), size)):
            batch = make_batch(records[start : start + size], 1.0, "cpu")
            labels = batch.ids.masked_fill(batch.attention_mask == 0, -100)
            loss = model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels).loss
            if optimizer is not None:
                loss.backward()
                if place % steps == steps - 1:
                    optimizer.step()
                    optimizer.zero_grad()


def rollouts() -> None:
    """Conversations of up to five turns: the library's `generate` on one at a time, and the trainer's in lock step."""
    run = branch("ppo")
    rollout = replace(run.rollout, attempts=5)
    dialogue = Dialogue(run.tokenizer)
    items = [run.prompts[row] for row in draw_hands(len(run.prompts), 128, 0, 0)]

    def batched() -> list[EpisodeRecord]:
        engine = TransformersEngine(run.policy, run.tokenizer, 256)
        return collect(engine, dialogue, run.task, items, rollout, 0)

    tokens = sum(turn.stop - turn.start for record in batched() for turn in record.turns)
    fast = tokens / cpu_seconds(batched)
    begun, made = time.process_time(), 0
    for _, item in items[:MULTI_TURN]:
        made += alone(run, dialogue, item)
    slow = made / (time.process_time() - begun)
    print("\n| rollouts of up to five turns | tokens a CPU second | |\n|---|---|---|")
    print(f"| one conversation at a time, `model.generate` ({MULTI_TURN} hands) | {slow:.0f} | 1 |")
    print(f"| in lock step (128 hands; goal ≥ 8) | {fast:.0f} | {fast / slow:.1f} |")


def alone(run: BranchRun, dialogue: Dialogue, item: str) -> int:
    """Play one hand to its end and count the tokens it generated."""
    episode = run.task.episode(item, run.rollout.prompt_format, 5, run.task.spec.feedback)
    ids, made = dialogue.prompt_ids(episode.prompt), 0
    budget = run.rollout.sampling.max_new_tokens
    while len(ids) + budget <= run.rollout.context:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            answer = run.policy.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.5, max_new_tokens=budget
            )[0, len(ids) :].tolist()
        made += len(answer)
        text = run.tokenizer.decode(answer, skip_special_tokens=True)
        grade = episode.step(text)
        if grade.done:
            break
        ids = [*ids, *answer, *dialogue.continuation_ids(grade.feedback or "")]
    return made


def cpu_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Median CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return statistics.median(times)


if __name__ == "__main__":
    main()
