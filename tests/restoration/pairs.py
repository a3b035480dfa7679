"""Pairs of matrices as fine-tuning leaves them, and slow dense oracles of the edits, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import torch

from rlheals.restoration.edit import FULL, TURNING, WINDOWLESS, head
from rlheals.restoration.operators import MatrixView, Pair

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.restoration.windows import Window


def drifted(rows: int, columns: int, seed: int, drift: float = 0.3, dtype: torch.dtype = torch.float64) -> Pair:
    """A random reference and a target that is it plus a random drift of this relative norm."""
    draw = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    change = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    target = reference + drift * change * (reference.norm() / change.norm())
    return Pair(MatrixView.of(reference.to(dtype)), MatrixView.of(target.to(dtype)))


def tensors(pair: Pair) -> tuple[Tensor, Tensor]:
    """Reference and target."""
    return pair.reference.tensor(), pair.target.tensor()


def bases(pair: Pair) -> tuple[np.ndarray, ...]:
    """U and V of the reference, U, σ and V of the target, as columns."""
    base, tuned = pair.reference.factors(), pair.target.factors()
    whole = slice(0, base.rank)
    found = (base.left(whole), base.right(whole), tuned.left(whole), tuned.values, tuned.right(whole))
    return tuple(each.numpy() for each in found)


def turn(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The direct rotation from one span to another, (n, n): the polar factor of what keeps both spans apart."""
    first, second = old @ old.T, new @ new.T
    unit = np.eye(len(old))
    return scipy.linalg.polar(second @ first + (unit - second) @ (unit - first))[0]


def fitting(operator: str, window: Window) -> Window:
    """The window, or one that the operator takes: none where it has none, and all ranks as a count where it turns."""
    if operator in WINDOWLESS:
        return FULL
    return head(64) if operator in TURNING and window == FULL else window


def columns(window: Window, rank: int) -> list[int]:
    """The ranks in a window, one by one."""
    return [place for span in window.spans(rank) for place in range(rank)[span]]


def released_script(pair: Pair, k_head: int, k_tail: int, *, values: bool) -> np.ndarray:
    """What the released scripts make of leading and trailing ranks, with ``values`` those of the reference too."""
    base_u, base_s, base_vt = np.linalg.svd(pair.reference.tensor().numpy(), full_matrices=False)
    u, sigma, vt = np.linalg.svd(pair.target.tensor().numpy(), full_matrices=False)
    count = len(sigma)
    if k_head + k_tail >= count:
        return pair.reference.tensor().numpy()
    kept = slice(k_head, count - k_tail)
    left = np.concatenate([base_u[:, :k_head], u[:, kept], base_u[:, count - k_tail :]], axis=1)
    right = np.concatenate([base_vt[:k_head], vt[kept], base_vt[count - k_tail :]], axis=0)
    if values:
        sigma = np.concatenate([base_s[:k_head], sigma[kept], base_s[count - k_tail :]])
    return left @ np.diag(sigma) @ right


def mixed_basis(old: np.ndarray, new: np.ndarray, window: list[int], *, orthonormal: bool) -> np.ndarray:
    """The target's vectors with the reference's in the window; the others ride along with the direct rotation."""
    rest = turn(old[:, window], new[:, window]) @ old if orthonormal else old
    mixed = rest.copy()
    mixed[:, window] = new[:, window]
    return mixed


def directions_oracle(pair: Pair, window: Window, sides: str, *, orthonormal: bool) -> np.ndarray:
    """The edited matrix of ``directions``, bases and all; sides without a partner keep the sign that fits best."""
    base_u, base_v, u, sigma, v = bases(pair)
    span = columns(window, len(sigma))
    signs = (
        np.where((base_u * u).sum(0) + (base_v * v).sum(0) < 0, -1.0, 1.0) if len(sides) == 1 else np.ones(len(sigma))
    )
    left = mixed_basis(u, base_u * signs, span, orthonormal=orthonormal) if "u" in sides else u
    right = mixed_basis(v, base_v * signs, span, orthonormal=orthonormal) if "v" in sides else v
    return (left * sigma) @ right.T
