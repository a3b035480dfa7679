"""Small model folders as fine-tuning leaves them, on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlheals.spectra.reader import Weights
from tests.spectra.synthetic import trained_like, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SHAPE = {"layers": 2, "hidden": 32, "intermediate": 48, "shard_bytes": 2**14}


def drifted(name: str, tensor: Tensor) -> Tensor:
    """The tensor after a fine-tuning that moves every matrix by a tenth of its norm, and every vector a little."""
    if tensor.ndim < 2:
        return tensor * 1.01
    noise = trained_like(name, tuple(tensor.shape), seed=99)
    return tensor + 0.1 * noise * (tensor.norm() / noise.norm())


def low_rank(name: str, tensor: Tensor) -> Tensor:
    """The tensor after a change of rank 2 of the queries and keys, and nothing else."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    left, right = torch.linspace(-1, 1, 2 * tensor.shape[0]), torch.linspace(1, -2, 2 * tensor.shape[1])
    return tensor + 0.01 * left.sin().reshape(-1, 2) @ right.cos().reshape(2, -1)


def write(folder: Path, **options: Any) -> Path:
    """A folder with a config and weights in shards; no tokenizer."""
    return write_checkpoint(folder, **{**SHAPE, "seed": 0, **options})


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    with Weights(folder) as weights:
        return {name: weights.tensor(name) for name in weights.shapes}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether type, shape and every bit agree."""
    kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
    return kinds and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def same_state(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    ours, theirs = state(one), state(other)
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)
