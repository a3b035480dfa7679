"""Matrices with planted spectra and planted turns."""

from __future__ import annotations

import torch

from rlheals.spectra.factors import Factors, MemoryFactors


def basis(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """A uniform (n, k) orthonormal basis."""
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]


def matrix(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A (rows, columns) matrix with these singular values and uniform vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = values.numel()
    return (basis(rows, rank, generator) * values) @ basis(columns, rank, generator).mT


def spectrum(rank: int, k: int, gap: float) -> torch.Tensor:
    """Values from 2 down to 0.5 with a step of ``gap`` after the k-th."""
    values = torch.linspace(1.5, 0.5, rank, dtype=torch.float64)
    values[:k] += gap
    return values


def plane_turn(n: int, pairs: list[tuple[int, int]], angles: list[float]) -> torch.Tensor:
    """An (n, n) rotation by ``angles`` in these coordinate planes."""
    turn = torch.eye(n, dtype=torch.float64)
    for (i, j), angle in zip(pairs, angles, strict=True):
        sine = torch.sin(torch.tensor(angle, dtype=torch.float64))
        cosine = torch.cos(torch.tensor(angle, dtype=torch.float64))
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = cosine, -sine, sine, cosine
    return turn


def turned(rows: int, columns: int, values: torch.Tensor, turn: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """A matrix and the same with its left singular vectors turned within their span by ``turn`` (rank, rank)."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (basis(length, values.numel(), generator) for length in (rows, columns))
    return [(left * values) @ right.mT, ((left @ turn) * values) @ right.mT]


def noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Standard Gaussian noise."""
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spoilt(weight: torch.Tensor, error: float, seed: int = 0) -> MemoryFactors:
    """Factors of ``weight`` whose reconstruction is off by ``error`` of its Frobenius norm, and say so."""
    disturbance = noise(*weight.shape, seed)
    off = MemoryFactors.of(weight + disturbance * (error * weight.norm() / disturbance.norm())).factors
    return MemoryFactors(Factors(off.left, off.values, off.right, "spoilt", error, off.orthonormality_error))
