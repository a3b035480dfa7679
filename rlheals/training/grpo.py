"""The critic-free arm: TRL's `GRPOTrainer` on the environment, hands and schedule of the PPO branches.

What differs from the arm ppo follows from the algorithm (Shao et al. 2024, arXiv 2402.03300) or from TRL:

- an update plays the first ``episodes / GROUP`` of its hands `GROUP` times each, and an episode's advantage is its
  return minus its group's mean, over the group's standard deviation, for all of its tokens;
- ratios are of single tokens, thoughts weigh as much as answers, and there is no critic, so the settings ``ratio``,
  ``thought_weight``, ``ratio_limit``, ``kl_limit``, ``normalise_advantages`` and all of the critic's have no effect;
- the KL to the reference is TRL's estimate from the sampled tokens, always in the loss, with the same coefficient.

In the updates that warm up the critic elsewhere the learning rate is 0, so all arms move the policy equally often.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from rlheals.errors import UserError, disk_errors
from rlheals.evaluation.dialogue import Dialogue
from rlheals.inference.seeds import counter_seed
from rlheals.models.checkpoint import quiet_bars
from rlheals.progress import Progress
from rlheals.publish import write_manifest
from rlheals.training.ppo.batches import tokens_of
from rlheals.training.ppo.doctor import histogram
from rlheals.training.ppo.metrics import Facts, rollout_columns
from rlheals.training.ppo.rollout import EpisodeRecord, collect, draw_hands, synchronise
from rlheals.training.ppo.state import PROGRESS, STATES, Curves
from rlheals.training.ppo.trainer import UPDATES, check_readable, save_checkpoint
from rlheals.training.sft import newest_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rlheals.inference.fingerprint import Proof
    from rlheals.training.ppo.settings import PpoSettings
    from rlheals.training.ppo.trainer import BranchRun

GROUP = 8
"""Episodes on one hand; TRL's default."""
RETURN = "episode_return"


def train_grpo(run: BranchRun) -> Curves:
    """Train one branch and return its curves; the weights are in ``scratch/updates/update-<n>``.

    Resumes from the newest complete state in scratch, written after whole updates only; the result is the same to the
    last byte as without a break, except for the measured seconds.

    Raises:
        UserError: episodes that do not divide into groups, several processes, a state of another run, a loss that is
            not finite, or a full disk.
    """
    _check(run)
    state = newest_state(run.scratch)
    curves = _load_curves(state, run) if state else Curves()
    if len(curves.training) >= run.updates:
        return curves
    with disk_errors(run.scratch), quiet_bars():
        rollouts = Rollouts(run)
        trainer = make_trainer(run, rollouts)
        rollouts.engine = run.make_engine(trainer.model, run.tokenizer)
        trainer.add_callback(Branch(trainer, run, rollouts, curves))
        with closing(rollouts.engine):
            trainer.train(resume_from_checkpoint=str(state) if state else None)
    return curves


def _check(run: BranchRun) -> None:
    if run.episodes % GROUP:
        raise UserError(
            f"ppo.episodes is {run.episodes}, which does not divide into the groups of {GROUP} that the arm grpo plays "
            f"on each hand; use a multiple of {GROUP}."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the arm grpo runs in one process; start it without a launcher, or drop it from ppo.arms.")


def _load_curves(state: Path, run: BranchRun) -> Curves:
    saved = json.loads((state / PROGRESS).read_text())
    if saved["identity"] != _identity(run):
        raise UserError(
            f"{state} belongs to a run with another parent or other settings; restore them, or delete {state.parent} "
            "to begin anew."
        )
    return Curves(saved["training"], saved["advantages"])


def _identity(run: BranchRun) -> Any:
    """What the run is, as JSON gives it back."""
    return json.loads(json.dumps(dict(run.identity)))


def steps_per_update(run: BranchRun) -> int:
    """Optimiser steps of an update."""
    return run.settings.epochs * run.episodes // run.settings.minibatch


def make_trainer(run: BranchRun, rollouts: Rollouts) -> Any:
    """TRL's trainer with every default that matters set by hand."""
    from datasets import Dataset
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    settings, steps = run.settings, steps_per_update(run)
    logging.set_verbosity_error()
    config = GRPOConfig(
        output_dir=str(run.scratch / STATES),
        max_steps=run.updates * steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.minibatch // settings.micro_batch,
        generation_batch_size=run.episodes,
        num_generations=GROUP,
        num_iterations=settings.epochs,
        max_completion_length=run.rollout.context,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        beta=settings.kl_coefficient,
        use_bias_correction_kl=True,  # without the ratio, the estimate's gradient is not the KL's
        epsilon=settings.clip if settings.clip is not None else math.inf,
        entropy_coef=settings.entropy_coefficient,
        loss_type="grpo",
        scale_rewards="group",
        importance_sampling_level="token",
        mask_truncated_completions=False,
        shuffle_dataset=False,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=False,
        bf16=run.bfloat16,
        use_cpu=run.device == "cpu",
        dataloader_pin_memory=run.device != "cpu",
        full_determinism=run.device != "cpu",  # the CPU kernels are deterministic without it
        seed=run.rollout.seed,
        save_strategy="steps",
        save_steps=run.state_every * steps,
        logging_steps=steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    with _named_as_reference(run):
        trainer = GRPOTrainer(
            model=run.policy.to(run.device),
            reward_funcs=[task_reward],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [str(row) for row in hands(run)]}),
            processing_class=run.tokenizer,
            optimizers=make_optimizer(run, steps),
            rollout_func=rollouts,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _named_as_reference(run: BranchRun) -> Iterator[None]:
    """While the trainer is built, the policy bears the name of the reference model's folder.

    TRL loads the reference from the folder the policy's config names and has no argument for another one.
    """
    config = run.policy.config
    name = config._name_or_path
    if run.reference is not None:
        config._name_or_path = run.reference.model.config._name_or_path
    try:
        yield
    finally:
        config._name_or_path = name


def task_reward(episode_return: Sequence[float], **_: Any) -> list[float]:
    """The returns that the rollout measured, as TRL's reward function."""
    return [float(value) for value in episode_return]


def hands(run: BranchRun) -> list[int]:
    """Row numbers of ``run.prompts`` in the order of training: of each update its first ``episodes / GROUP`` hands."""
    count = run.episodes // GROUP
    drawn = (draw_hands(len(run.prompts), run.episodes, run.rollout.seed, update) for update in range(run.updates))
    return [row for rows in drawn for row in rows[:count]]


def rate_factor(settings: PpoSettings, update: int, updates: int) -> float:
    """Factor of the learning rate in the update with 0-based index ``update``; 0 while other arms warm a critic up."""
    return 0.0 if update < settings.critic_warmup_updates else settings.rate_factor(update, updates)


def make_optimizer(run: BranchRun, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the branch's constants, and a rate that depends on the index of the update only."""
    settings = run.settings
    optimizer = torch.optim.AdamW(
        run.policy.parameters(),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(settings, step // steps, run.updates)
    )


class Rollouts:
    """TRL's ``rollout_func``: plays the episodes of one update on the branches' environment and keeps its figures."""

    def __init__(self, run: BranchRun) -> None:
        self.run = run
        self.dialogue = Dialogue(run.tokenizer)
        self.engine: Any = None
        self.proof: Proof | None = None
        self.row: dict[str, Any] = {}
        self.advantages: list[dict[str, Any]] = []
        self.finished = 0.0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Play row number ``prompts[i]`` of the prompt table as episode i; an update's groups stand together."""
        run = self.run
        begin = time.perf_counter()
        update = trainer.state.global_step // steps_per_update(run)
        torch.manual_seed(counter_seed(run.rollout.seed, update, "grpo"))  # TRL shuffles an update's episodes with it
        self.proof = synchronise(self.engine, trainer.model, run.engine_dtype, self.proof)
        items = [run.prompts[int(row)] for row in prompts]
        with torch.autocast(run.device, torch.bfloat16, enabled=run.bfloat16):
            records = collect(self.engine, self.dialogue, run.task, items, run.rollout, update)
        returns = [discounted(record, run.settings.gamma) for record in records]
        self.finished = time.perf_counter()
        self._measure(records, returns, update, self.finished - begin)
        return {**sequences(records), "logprobs": None, RETURN: returns}

    def _measure(self, records: list[EpisodeRecord], returns: list[float], update: int, seconds: float) -> None:
        grouped = np.array(returns).reshape(-1, GROUP)
        advantages = (grouped - grouped.mean(1, keepdims=True)).ravel()
        facts = [_facts(*each) for each in zip(records, returns, advantages.tolist(), strict=True)]
        columns = rollout_columns(facts, critic=False, advantages=True)
        if update == 0:
            check_readable(self.run.label, columns["format_error_rate"], self.run.settings.least_readable)
        columns["flat_groups"] = float((grouped == grouped[:, :1]).all(1).mean())
        self.row = {"update": update + 1, **columns, "seconds_rollout": seconds}
        self.advantages = histogram(advantages, update + 1)


def _facts(record: EpisodeRecord, value: float, advantage: float) -> Facts:
    """What the rollout knows of an episode; entropy and KL come from TRL, values do not exist."""
    return Facts(
        reward=record.total_reward,
        solved=record.solved,
        format_errors=[turn.format_error for turn in record.turns],
        tokens=tokens_of(record),
        entropy=0.0,
        kl=None,
        values=[],
        advantages=[advantage],
        returns=[value],
    )


def discounted(record: EpisodeRecord, gamma: float) -> float:
    """Return of an episode: the sum of its turns' rewards, each discounted by its number of turns before."""
    return sum(gamma**place * turn.reward for place, turn in enumerate(record.turns))


def sequences(records: Sequence[EpisodeRecord]) -> dict[str, list[list[int]]]:
    """Episodes as TRL wants them: prompt, everything behind it, and a mask that is 1 on tokens with loss.

    What follows the last token with loss is left out; it decides nothing.
    """
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "completion_ids": [], "env_mask": []}
    for record in records:
        start, stop = record.turns[0].start, record.turns[-1].stop
        mask = [0] * (max(stop, start + 1) - start)
        for turn in record.turns:
            mask[turn.start - start : turn.stop - start] = [1] * (turn.stop - turn.start)
        columns["prompt_ids"].append(record.token_ids[:start])
        columns["completion_ids"].append(record.token_ids[start : start + len(mask)])
        columns["env_mask"].append(mask)
    return columns


class Branch(TrainerCallback):  # type: ignore[misc]
    """Writes the weights of declared updates, keeps the curves, and completes each resumable state."""

    def __init__(self, trainer: Any, run: BranchRun, rollouts: Rollouts, curves: Curves) -> None:
        self.trainer, self.run, self.rollouts, self.curves = trainer, run, rollouts, curves
        self.steps = steps_per_update(run)
        self.bar = Progress(run.label, run.updates, "update", start=len(curves.training))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights where they are due."""
        update, rest = divmod(state.global_step, self.steps)
        if rest == 0 and update in self.run.checkpoints:
            save_checkpoint(self.trainer.model, self.run.tokenizer, self.run.scratch / UPDATES / f"update-{update}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One row for the update that just ended.

        Raises:
            UserError: the loss is not finite.
        """
        if "loss" not in logs:
            return
        row = self.rollouts.row
        if not math.isfinite(float(logs["loss"])):
            raise UserError(
                f"the GRPO loss is {logs['loss']} in update {row['update']}; lower ppo.change.learning_rate in "
                "params.yaml."
            )
        factor = rate_factor(self.run.settings, row["update"] - 1, self.run.updates)
        self.curves.training.append(
            {
                **row,
                "kl_reference": logs.get("kl"),
                "entropy": logs.get("entropy"),
                "clip_fraction": logs.get("clip_ratio/region_mean"),
                "grad_norm": float(logs["grad_norm"]),
                "grad_norm_limit": self.run.settings.max_grad_norm,
                "learning_rate": self.run.settings.learning_rate * factor,
                "seconds_train": time.perf_counter() - self.rollouts.finished,
            }
        )
        self.curves.advantages.extend(self.rollouts.advantages)
        self.bar.update(note=f"reward {row['reward_mean']:.2f} solved {row['solved_rate']:.2f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the state that was just written with the curves and a manifest, then drop the older ones."""
        newest = self.run.scratch / STATES / f"checkpoint-{state.global_step}"
        (newest / PROGRESS).write_text(json.dumps({"identity": _identity(self.run), **asdict(self.curves)}))
        write_manifest(newest)
        for other in newest.parent.glob("checkpoint-*"):
            if other != newest:
                shutil.rmtree(other)
