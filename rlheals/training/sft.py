"""Supervised fine-tuning with TRL's `SFTTrainer`: every rung of the ladder, losses on the way, exact resume."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback

from rlheals.errors import UserError, disk_errors
from rlheals.evaluation.losses import teacher_forced_loss
from rlheals.models.checkpoint import quiet_bars, tidy
from rlheals.progress import Progress
from rlheals.publish import newest_intact, write_manifest
from rlheals.training.schedules import schedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rlheals.evaluation.dialogue import EncodedRow
    from rlheals.params import Sft

RUNGS = "rungs"
STATES = "states"
CURVES = "curves.json"
"""What was measured up to a resumable state, kept in it."""


@dataclass
class Curves:
    """What was measured on the way: rows of the ``losses`` and ``training`` tables without the run's columns."""

    losses: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SftRun:
    """Everything a training needs besides the model.

    Attributes:
        tokenizer: saved with every rung.
        rows: training examples.
        loss_sets: examples of each teacher-forced loss, by series.
        settings: the ``sft`` params block.
        seed: decides the order of the rows.
        scratch: gets ``rungs/checkpoint-<step>`` and the rolling state; the same folder resumes.
        bfloat16: compute in bfloat16 (autocast); weights and optimiser state stay float32, because a step of 1e-6 is
            lost in the rounding of a bfloat16 weight.
        device: ``cpu`` or ``cuda``.
    """

    tokenizer: Any
    rows: Sequence[EncodedRow]
    loss_sets: Mapping[str, Sequence[EncodedRow]]
    settings: Sft
    seed: int
    scratch: Path
    bfloat16: bool = False
    device: str = "cpu"


def train_sft(model: Any, run: SftRun) -> Curves:
    """Fine-tune all parameters of ``model`` (float32) and return the curves; the rungs are in ``scratch/rungs``.

    Resumes from the newest complete state in scratch; the result is the same to the last byte as without a break.

    Raises:
        UserError: an example is too long, the loss is not finite, or the disk is full.
    """
    check_lengths(run.rows, run.settings.max_length, model)
    state = newest_state(run.scratch)
    curves = Curves(**json.loads((state / CURVES).read_text())) if state else Curves()
    if state and _step_of(state) >= run.settings.steps:
        return curves
    with disk_errors(run.scratch), quiet_bars():
        trainer = make_trainer(model.to(run.device), run)
        trainer.add_callback(Ladder(trainer, run, curves, start=_step_of(state) if state else 0))
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    return curves


def check_lengths(rows: Sequence[EncodedRow], max_length: int, model: Any) -> None:
    """Raise `UserError` for the longest row if it exceeds ``max_length`` or the model's context; nothing is cut."""
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    longest = max(lengths, default=0)
    context = getattr(model.config, "max_position_embeddings", None) or max_length
    for limit, name in ((max_length, "sft.max_length"), (context, "the model's max_position_embeddings")):
        if longest > limit:
            raise UserError(
                f"training row {lengths.index(longest)} has {longest} tokens, more than {name} of {limit}; "
                "raise the limit or shorten the prompt format (rows are never cut)."
            )


def newest_state(scratch: Path) -> Path | None:
    """The last resumable state that is complete and unaltered; newer ones that are not are deleted."""
    return newest_intact((scratch / STATES).glob("checkpoint-*"))


def _step_of(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])


def make_trainer(model: Any, run: SftRun) -> Any:
    """TRL's trainer with every default that matters set by hand.

    The rows come tokenised: the same `Dialogue` makes the tokens for training, losses and probes, so the three cannot
    disagree, and a template that prints the date cannot change them.
    """
    from datasets import Dataset
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    settings = run.settings
    logging.set_verbosity_error()  # the library announces that it copies the tokenizer's special tokens
    config = SFTConfig(
        output_dir=str(run.scratch / STATES),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=run.bfloat16,
        use_cpu=run.device == "cpu",
        dataloader_pin_memory=run.device != "cpu",
        full_determinism=run.device != "cpu",  # the CPU kernels are deterministic without it
        seed=run.seed,
        data_seed=run.seed,
        max_length=None,
        packing=False,
        completion_only_loss=True,
        save_strategy="steps",
        save_steps=settings.state_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    columns = {
        "input_ids": [[*row.prompt, *row.completion] for row in run.rows],
        "labels": [[-100] * len(row.prompt) + row.completion for row in run.rows],
    }
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=run.tokenizer,
        optimizers=make_optimizer(model, settings),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_optimizer(model: Any, settings: Sft) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, decaying matrices only (no norms, no biases), and the schedule of the params."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.adam_betas, eps=settings.adam_epsilon
    )
    factor = schedule(settings.schedule, settings.warmup_steps, settings.steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Ladder(TrainerCallback):  # type: ignore[misc]
    """Writes the rungs, measures the losses, keeps the curves, and completes each resumable state."""

    def __init__(self, trainer: Any, run: SftRun, curves: Curves, start: int) -> None:
        self.trainer, self.run, self.curves = trainer, run, curves
        self.factor = schedule(run.settings.schedule, run.settings.warmup_steps, run.settings.steps)
        self.bar = Progress("sft", run.settings.steps, start=start)
        self.tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rung and losses of step 0, unless resumed."""
        if state.global_step == 0:
            self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rung and losses where they are due."""
        self._measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One row of the training curve.

        Raises:
            UserError: the loss is not finite.
        """
        if "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise UserError(f"the SFT loss is {loss} at step {step}; lower sft.learning_rate in params.yaml.")
        # TRL counts tokens from the start of the process; the difference is right across a resume.
        tokens, self.tokens_before = int(logs["num_tokens"]) - self.tokens_before, int(logs["num_tokens"])
        rate = self.run.settings.learning_rate * self.factor(step - 1)
        row = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": float(logs["grad_norm"])}
        self.curves.training.append({**row, "tokens": tokens})
        self.bar.update(note=f"loss {loss:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the state that was just written with the curves and a manifest, then drop the older ones."""
        newest = self.run.scratch / STATES / f"checkpoint-{state.global_step}"
        (newest / CURVES).write_text(json.dumps(asdict(self.curves)))
        write_manifest(newest)
        for other in newest.parent.glob("checkpoint-*"):
            if other != newest:
                shutil.rmtree(other)

    def _measure(self, step: int) -> None:
        settings = self.run.settings
        is_rung = step in settings.checkpoints
        if is_rung:
            self._write_rung(step)
        if is_rung or step % settings.loss_every == 0 or step == settings.steps:
            with torch.autocast(self.run.device, torch.bfloat16, enabled=self.run.bfloat16):
                for series, rows in self.run.loss_sets.items():
                    loss = teacher_forced_loss(self.trainer.model, rows)
                    self.curves.losses.append({"series": series, "step": step, **_loss_columns(loss)})

    def _write_rung(self, step: int) -> None:
        """A folder that loads by itself; renamed into place when whole, so a kill leaves no half rung."""
        final = self.run.scratch / RUNGS / f"checkpoint-{step}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.trainer.save_model(str(partial))
        tidy(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def _loss_columns(loss: Any) -> dict[str, Any]:
    return {"tokens": loss.tokens, "nll_per_token": loss.nll_per_token}
