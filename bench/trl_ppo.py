"""Train one policy with the PPO of TRL 1.12; `bench.bench_ppo_trl` starts this in the environment that has it.

Run: <python of that environment> bench/trl_ppo.py JOB.json     (with the repository root on PYTHONPATH)

The job says all that is needed; beside it this writes ``result.json`` and the trained policy. TRL takes its reward from
a model: it calls ``model.<base_model_prefix>(input_ids, attention_mask, ...)``, then ``model.score`` on the last hidden
states, and reads the number at the last token of the response. `Verifier` is such a model: its backbone finds the hand
by the prompt's tokens, decodes the response, asks the task's exact verifier, and gives the reward at every position.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
)
from transformers import __version__ as transformers_version
from trl import __version__ as trl_version
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlheals.tasks.core import make_task, task_spec_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NEVER = 1e6
"""A clip of the values so wide that it never acts."""


class Grader(nn.Module):
    """What stands where a reward model has its backbone; keeps the facts of every batch it graded."""

    def __init__(self, job: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self.task = make_task(task_spec_model(job["task"]["name"]).model_validate(job["task"]))
        self.prompt_format, self.tokenizer = job["prompt_format"], tokenizer
        self.items = {tuple(prompt): item for prompt, item in zip(job["prompts"], job["items"], strict=True)}
        self.lengths = sorted({len(prompt) for prompt in self.items}, reverse=True)
        self.batches: list[dict[str, float]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Rewards as hidden states of width 1, (rows, length, 1), the same at every position of a row."""
        rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        graded = [self.grade(*self.split(ids, mask)) for ids, mask in rows]
        rewards, solved, tokens = (list(column) for column in zip(*graded, strict=True))
        self.batches.append({"episodes": len(graded), "reward": sum(rewards), "solved": sum(solved)})
        self.batches[-1]["tokens"] = sum(tokens)
        states = torch.tensor(rewards, device=input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=(states,))

    def split(self, ids: list[int], mask: list[int]) -> tuple[str, list[int]]:
        """The item played, and the response up to its padding."""
        ids = ids[mask.index(1) :]
        mask = [*mask[mask.index(1) :], 0]
        length = next(length for length in self.lengths if tuple(ids[:length]) in self.items)
        return self.items[tuple(ids[:length])], ids[length : mask.index(0, length)]

    def grade(self, item: str, response: list[int]) -> tuple[float, bool, int]:
        """Reward, whether solved, and number of tokens of one single-turn episode, as our own rollout counts them."""
        episode = self.task.episode(item, self.prompt_format, 1, self.task.spec.feedback)
        text = self.tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        grade = episode.step(text)
        limit = 0.0 if grade.solved else float(getattr(episode, "limit_reward", 0.0))
        return float(grade.reward) + limit, grade.solved, len(response)


class Verifier(nn.Module):
    """The exact verifier in the shape of a reward model."""

    base_model_prefix = "grader"

    def __init__(self, grader: Grader) -> None:
        super().__init__()
        self.grader, self.score = grader, nn.Identity()


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU and wall time at the start and behind every update."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The start."""
        self.stamps.append((time.process_time(), time.perf_counter()))

    on_step_end = on_train_begin


def main() -> None:
    """Train as the job says and write what came of it."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["start"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job["start"], dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(job["start"], num_labels=1, dtype=torch.float32)
    grader, clock = Grader(job, tokenizer), Clock()
    trainer = PPOTrainer(
        args=configuration(job, path.parent),
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(job["reference"], dtype=torch.float32),
        reward_model=Verifier(grader),
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
        value_model=critic,
        optimizers=optimizer(policy, critic, job["settings"]),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.dataloader = in_order(job["prompts"], job["episodes"], tokenizer)
    trainer.train()
    policy.save_pretrained(path.parent / "policy")
    versions = {"trl": trl_version, "transformers": transformers_version, "torch": torch.__version__}
    result = {"versions": versions, "stamps": clock.stamps, "batches": grader.batches}
    path.with_name("result.json").write_text(json.dumps(result))


def configuration(job: dict[str, Any], folder: Path) -> PPOConfig:
    """TRL's constants for our settings.

    A batch of the whole update and no accumulation: TRL's optimiser steps follow the accumulation counter, so this is
    how ``num_mini_batches`` gives one step each.
    """
    settings = job["settings"]
    return PPOConfig(
        output_dir=str(folder / "trainer"),
        seed=job["seed"],
        total_episodes=job["updates"] * job["episodes"],
        per_device_train_batch_size=job["episodes"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["episodes"] // settings["minibatch"],
        num_ppo_epochs=settings["epochs"],
        local_rollout_forward_batch_size=job["episodes"],
        response_length=job["max_new_tokens"],
        stop_token="eos",
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coefficient"],
        kl_estimator="k1",
        cliprange=settings["clip"],
        cliprange_value=settings["value_clip"] or NEVER,
        vf_coef=settings["value_coefficient"],
        gamma=settings["gamma"],
        lam=settings["lam"],
        whiten_rewards=False,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def optimizer(policy: Any, critic: Any, settings: dict[str, Any]) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW at constant rates: all backbones at that of the policy, the critic's head at its own."""
    groups = [
        {"params": [*policy.parameters(), *critic.base_model.parameters()], "lr": settings["learning_rate"]},
        {"params": list(critic.score.parameters()), "lr": settings["critic_learning_rate"]},
    ]
    made = torch.optim.AdamW(
        groups,
        betas=tuple(settings["adam_betas"]),
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
    )
    return made, LambdaLR(made, lambda _: 1.0)


def in_order(prompts: Sequence[list[int]], episodes: int, tokenizer: Any) -> DataLoader[Any]:
    """The prompts as given, where TRL's own loader would shuffle them."""
    rows = [{"input_ids": prompt} for prompt in prompts]
    return DataLoader(rows, batch_size=episodes, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
