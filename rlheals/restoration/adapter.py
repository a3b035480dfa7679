"""Export a patch as a LoRA adapter in the format of PEFT, where the change of each tensor is of low rank.

The folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. For a linear layer ``x`` of weight W (m, n)
the latter has ``base_model.model.x.lora_A.weight``, (r, n), and ``base_model.model.x.lora_B.weight``, (m, r), and the
layer computes with ``W + alpha / r · B A``; here alpha is r. Source: "PEFT checkpoint format" in the developer
guides, https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlheals.errors import UserError
from rlheals.publish import publish
from rlheals.restoration.exact import difference, low_rank, rounding_slack
from rlheals.restoration.patch import Patch
from rlheals.restoration.tensor_file import TensorFileWriter
from rlheals.restoration.write_model import check_out
from rlheals.spectra.reader import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """One tensor of an adapter.

    Attributes:
        module: the layer's name, without ``.weight``.
        rank: of its factors.
        error: Frobenius norm of what the factors miss of the change, relative to the change.
    """

    module: str
    rank: int
    error: float


def export_lora(
    patch_file: Path,
    model: Path,
    out: Path,
    *,
    most: int | None = None,
    tolerance: float = 0.0,
    same_tensors_only: bool = False,
) -> list[Adapted]:
    """Write the adapter folder ``out``; returns what it holds.

    Args:
        patch_file: the patch.
        model: the model it was made for.
        out: a new folder.
        most: largest rank that is allowed; None for a quarter of each matrix's rank, beyond which an adapter is hardly
            smaller than the matrix.
        tolerance: largest ``error`` that is allowed; the rounding of the weights' own type is allowed in any case.
        same_tensors_only: see `Patch.check_base`.

    Raises:
        UserError: a change is not of so low a rank, or not of a matrix of a layer or an untied head; the patch does not
            fit the model; ``out`` is not free.
    """
    check_out(out, model)
    with Patch(patch_file) as patch, Weights(model) as weights:
        patch.check_base(weights, same_tensors_only=same_tensors_only)
        for name in patch.entries:
            _check_exportable(name, weights)
        with publish(out) as folder:
            with TensorFileWriter(folder / ADAPTER) as writer:
                done = [_export(name, patch, weights, writer, most, tolerance) for name in patch.entries]
                writer.finish({"format": "pt"})
            config = adapter_config(done, weights.path.resolve().name)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    return done


def adapter_config(adapted: list[Adapted], base: str) -> dict[str, object]:
    """The content of ``adapter_config.json``; ranks and alphas that differ from the largest are given by module."""
    most = max(each.rank for each in adapted)
    ranks = {each.module: each.rank for each in adapted if each.rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": [each.module for each in adapted],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _check_exportable(name: str, weights: Weights) -> None:
    kinds = {matrix.name: matrix.kind for matrix in weights.topology.matrices}
    if kinds.get(name, "embedding") == "embedding":
        raise UserError(
            f"the patch changes {name}, which no adapter is written for, only for the matrices of layers and an untied "
            "head; make a patch without it, or share the patch itself."
        )


def _export(
    name: str, patch: Patch, weights: Weights, writer: TensorFileWriter, most: int | None, tolerance: float
) -> Adapted:
    before = weights.tensor(name)
    after = patch.apply(name, before)
    change = difference(before, after)
    norm = float(torch.linalg.vector_norm(change))
    allowed = max(rounding_slack(after, change), tolerance * norm)
    limit = most if most is not None else max(1, min(change.shape) // 4)
    factors = low_rank(change, min(limit, *change.shape), allowed)
    if factors is None:
        raise UserError(_too_high(name, norm, allowed, limit))
    left, right = (factor.to(torch.float32).contiguous() for factor in factors)
    module = name.removesuffix(".weight")
    writer.add(f"{_PREFIX}{module}.lora_A.weight", right)
    writer.add(f"{_PREFIX}{module}.lora_B.weight", left)
    return Adapted(module, left.shape[1], _missed(before, after, left, right) / norm)


def _missed(before: Tensor, after: Tensor, left: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference(before, after).addmm_(left.to(torch.float32), right, alpha=-1.0)))


def _too_high(name: str, norm: float, allowed: float, limit: int) -> str:
    if norm <= allowed:
        return f"the change of {name} is no larger than the tolerance or the rounding of its type; leave it out."
    return (
        f"the change of {name} is not of rank {limit} or less within a relative error of {allowed / norm:.2g}, so no "
        "adapter of that size gives it; allow more with --rank or --tolerance, narrow the edit's window, or share the "
        "patch itself."
    )
