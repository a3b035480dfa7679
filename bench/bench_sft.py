"""Cost of an SFT step through TRL's trainer against a bare torch loop, on one thread, in CPU seconds a step.

Run: python -m bench.bench_sft [--steps 40] [--batch 64]

Both train the same random Llama of the mini profile's size on the same rows. Measured between steps, start-up left out;
only the rung of step 0, before the first step, is due. The goal is a ratio of at most 1.3.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from bench.bench_generation import WORDS, mini_model
from rlheals.evaluation.dialogue import EncodedRow
from rlheals.params import Sft
from rlheals.training.sft import Curves, Ladder, SftRun, make_trainer

PROMPT_TOKENS, COMPLETION_TOKENS = 16, 29


class Clock(TrainerCallback):
    """CPU time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One reading a step."""
        self.times.append(time.process_time())

    def per_step(self) -> float:
        """Median CPU seconds between readings, the first five left out."""
        return median(b - a for a, b in zip(self.times[5:], self.times[6:], strict=False))


def settings(steps: int, batch: int) -> Sft:
    """The mini profile's optimiser without any stop on the way."""
    return Sft(
        steps=steps,
        checkpoints=[0],
        batch_size=batch,
        accumulation=1,
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_betas=(0.9, 0.98),
        adam_epsilon=1e-7,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        loss_every=10**6,
        state_every=10**6,
        ood_loss_target="same",
        max_length=320,
    )


def rows(count: int) -> list[EncodedRow]:
    """Random rows of the compact format's length."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(5, len(WORDS)) for _ in range(length)]

    return [EncodedRow(tokens(PROMPT_TOKENS), tokens(COMPLETION_TOKENS)) for _ in range(count)]


def through_trl(steps: int, batch: int, data: list[EncodedRow]) -> float:
    """CPU seconds a step of our trainer."""
    model, tokenizer = mini_model()
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        run = SftRun(tokenizer, data, {}, settings(steps, batch), seed=0, scratch=Path(scratch))
        trainer = make_trainer(model, run)
        trainer.add_callback(Ladder(trainer, run, Curves(), start=0))
        trainer.add_callback(clock)
        trainer.train()
    return clock.per_step()


def bare(steps: int, batch: int, data: list[EncodedRow]) -> float:
    """CPU seconds a step of the shortest loop that does the same work: full logits, cross-entropy, clip, AdamW."""
    model, _ = mini_model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
    clock = Clock()
    for step in range(steps):
        part = data[step * batch : (step + 1) * batch]
        ids = torch.tensor([row.prompt + row.completion for row in part])
        labels = torch.tensor([[-100] * PROMPT_TOKENS + row.completion for row in part])
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.per_step()


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = rows(arguments.steps * arguments.batch)
    # Bare, TRL, bare: if the two bare runs differ much, the machine was too busy for the ratio to mean anything.
    first = bare(arguments.steps, arguments.batch, data)
    trl = through_trl(arguments.steps, arguments.batch, data)
    second = bare(arguments.steps, arguments.batch, data)
    tokens = arguments.batch * (PROMPT_TOKENS + COMPLETION_TOKENS)
    reference = (first + second) / 2
    report = {
        "bare_ms": [round(1000 * first, 1), round(1000 * second, 1)],
        "trl_ms": round(1000 * trl, 1),
        "trl_over_bare": round(trl / reference, 2),
        "trl_tokens_per_cpu_second": round(tokens / trl),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
