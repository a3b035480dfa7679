"""Gaussian noise of a given Frobenius norm, the same for the same seed whatever was drawn before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.norms import frobenius

if TYPE_CHECKING:
    from torch import Tensor


def seed_of(*parts: object) -> int:
    """A seed that ``parts`` decide: the same question gets the same draws wherever it is asked, another one others."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def add_noise(tensor: Tensor, norm: float, seed: str) -> Tensor:
    """``tensor`` plus Gaussian noise of exactly this Frobenius norm, in float32 (float64 stays); drawn on the CPU."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if norm == 0:
        return tensor.to(dtype)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed_of(seed)), dtype=dtype)
    noise *= norm / float(noise.norm())
    return noise.to(tensor.device).add_(tensor)


def change_norm(before: Tensor, after: Tensor) -> float:
    """‖after − before‖_F, the difference taken in float32 (float64 stays)."""
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    return frobenius(after.to(dtype) - before.to(dtype))
