"""Which singular vectors their singular values identify, and which only as a group.

A singular vector belongs to a matrix alone only as far as its singular value stands apart: within a group of equal
values any rotation of the vectors is as good, and under a perturbation the vectors of values closer than the
perturbation mix freely. Such values form a cluster, and only its span is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.spectra.factors import FactorView

DEGENERATE = 1e-10
"""Singular values closer than this share of the largest are equal as far as float64 factors can tell."""


def clusters(values: Tensor, distance: float, *, square: bool = True) -> list[slice]:
    """Group neighbouring singular values that are at most ``distance`` apart.

    With ``distance`` at twice the spectral norm of a change, Weyl's inequality keeps each group's values apart from
    all others after the change, so that a group of the base and the same ranks of the tuned matrix are the same group,
    and the angle between their spans is below 90° (Davis & Kahan, SIAM J. Numer. Anal. 7 (1970) 1; Wedin 1972).

    Args:
        values: (r,) singular values, descending.
        distance: largest step within a group, in the unit of the values.
        square: whether the matrix is square; if not, values within ``distance`` of 0 belong to one group with the
            vectors outside the thin basis, and the group is still listed by its ranks.

    Returns:
        Consecutive slices of ranks that cover all of them.
    """
    if not values.numel():
        return []
    steps = values[:-1] - values[1:]
    ends = (torch.nonzero(steps > distance).flatten() + 1).tolist()
    groups = [slice(start, stop) for start, stop in zip([0, *ends], [*ends, values.numel()], strict=True)]
    if square:
        return groups
    low = int((values <= distance).sum())
    kept = [group for group in groups if group.stop <= values.numel() - low]
    start = kept[-1].stop if kept else 0
    return [*kept, slice(start, values.numel())] if start < values.numel() else kept


def degenerate_clusters(base: FactorView) -> list[slice]:
    """Groups of more than one rank whose singular values are equal as far as the factors can tell.

    Inside such a group the base's singular vectors, and with them what counts as stretch (diagonal) and what as
    rotation (off the diagonal), are not defined; `rlheals.spectra.drift` splits there by symmetry instead.
    """
    if not base.rank or float(base.values[0]) == 0.0:
        return [slice(0, base.rank)] if base.rank > 1 else []
    share = max(DEGENERATE, 10 * base.reconstruction_error)
    groups = clusters(base.values, share * float(base.values[0]))
    return [group for group in groups if group.stop - group.start > 1]


def is_null(base: FactorView, group: slice) -> bool:
    """Whether a group's singular values are zero as far as the factors can tell."""
    share = max(DEGENERATE, 10 * base.reconstruction_error)
    return float(base.values[group.start]) <= share * float(base.values[0])


def stretch_coordinates(base: FactorView) -> int:
    """How many coordinates of a change in the base's singular basis count as stretch.

    One a rank; in a degenerate group of size c the symmetric part, c(c+1)/2, and in the null space all c² (there the
    left and right vectors turn independently, and any change only raises singular values from zero).
    """
    count = base.rank
    for group in degenerate_clusters(base):
        size = group.stop - group.start
        count += (size * size if is_null(base, group) else size * (size + 1) // 2) - size
    return count
