"""Pretraining of the tiny base from scratch on its task's synthetic mixture, with exact resume.

Every step is a pure function of (weights, optimiser state, step index): the rows of step t come from a generator
seeded by (seed, t) and the learning rate from t, so a killed run continues byte for byte.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError, disk_errors
from rlheals.progress import Progress
from rlheals.publish import newest_intact, write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from rlheals.params import Base

Rows = Callable[[int], list[list[tuple[str, bool]]]]
_IGNORED = -100
_BETAS = (0.9, 0.98)


def learning_rate(step: int, settings: Base) -> float:
    """Rate of 0-based ``step``: linear warm-up, constant, linear decay to zero over the last ``decay_fraction``."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    decay_steps = settings.steps * settings.decay_fraction
    cool = min(1.0, (settings.steps - step) / decay_steps) if decay_steps else 1.0
    return settings.learning_rate * min(warm, cool)


def encode(
    rows: Sequence[Sequence[tuple[str, bool]]], ids: dict[str, int], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (text, trained) segments as right-padded (rows, length) token ids and labels (-100: no loss)."""
    import torch

    tokens = [[ids[word] for text, _ in row for word in text.split()] for row in rows]
    labels = [[ids[word] if trained else _IGNORED for text, trained in row for word in text.split()] for row in rows]
    length = max(map(len, tokens))
    inputs = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), _IGNORED)
    for i, (row, label) in enumerate(zip(tokens, labels, strict=True)):
        inputs[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.tensor(label)
    return inputs, targets


def mean_loss(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the trained tokens.

    Rows are right-padded and attention is causal, so padding needs no mask; the head runs on trained positions only.
    """
    import torch

    hidden = model.base_model(inputs).last_hidden_state[:, :-1]
    wanted = targets[:, 1:]
    mask = wanted != _IGNORED
    return torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden[mask]), wanted[mask])


def pretrain(
    model: PreTrainedModel, rows: Rows, ids: dict[str, int], pad: int, settings: Base, scratch: Path
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return the loss curve, one record every ten steps.

    Args:
        model: freshly initialised model; replaced by the newest state in ``scratch`` if there is one.
        rows: step index → rows of the batch.
        ids: word → token id.
        pad: id of the padding token.
        settings: the ``base`` params block.
        scratch: directory for the rolling state; left in place for the caller to remove after publishing.

    Raises:
        UserError: the loss is not finite, or the state cannot be written.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=_BETAS, weight_decay=settings.weight_decay
    )
    first, curve = _load_state(scratch, model, optimizer)
    model.train()
    bar = Progress("base: pretraining", settings.steps, start=first)
    for step in range(first, settings.steps):
        loss, norm, count = _step(model, optimizer, encode(rows(step), ids, pad), learning_rate(step, settings))
        if not math.isfinite(loss):
            raise UserError(f"pretraining loss is {loss} at step {step}; lower base.learning_rate in params.yaml.")
        if (step + 1) % 10 == 0 or step + 1 == settings.steps:
            record = {"step": step + 1, "loss": loss, "learning_rate": learning_rate(step, settings)}
            curve.append({**record, "gradient_norm": norm, "tokens": count})
        if (step + 1) % settings.state_every == 0:
            _save_state(scratch, model, optimizer, step + 1, curve)
        bar.update(note=f"loss {loss:.3f}")
    model.eval()
    return curve


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor], rate: float
) -> tuple[float, float, int]:
    """One optimiser step: (loss, gradient norm before clipping to 1, tokens in the batch)."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    inputs, targets = (tensor.to(model.device) for tensor in batch)
    loss = mean_loss(model, inputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item(), inputs.numel()


def _save_state(
    scratch: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int, curve: list[dict[str, Any]]
) -> None:
    """Write weights, moments and curve to a sibling and rename it, so that the last good state survives a kill."""
    from safetensors.torch import save_file

    temporary, final = scratch / "state.partial", scratch / f"state-{step}"
    with disk_errors(scratch):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor.clone() for name, tensor in state.items()}
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "progress.json").write_text(json.dumps({"step": step, "curve": curve}))
        write_manifest(temporary)
        temporary.rename(final)
    for old in scratch.glob("state-*"):
        if old != final:
            shutil.rmtree(old)


def _load_state(
    scratch: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest state into model and optimiser; (0, []) when there is none."""
    from safetensors.torch import load_file

    state = newest_intact(scratch.glob("state-*"))
    if state is None:
        return 0, []
    tensors = load_file(state / "state.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    saved: dict[str, Any] = json.loads((state / "progress.json").read_text())
    return int(saved["step"]), list(saved["curve"])
