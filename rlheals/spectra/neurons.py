"""Which neuron of a gated MLP became which."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.alignment import Tally
from rlheals.spectra.block_factors import BIASED, BLOCKS, neurons_of, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_SETTLED = 0.9
"""A neuron whose gate and whose product both keep this cosine stays where it is; distinct neurons are far from it."""
_SMALL = 512
"""So many neurons are assigned at once whatever the limit; their scores take 3 MB."""
_SEARCH_BYTES = 12
"""Bytes an entry of the assignment problem takes: its float32 scores and SciPy's float64 copy of them."""


def match_neurons(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Tensor:
    """Which tuned neuron each base neuron became.

    Two neurons are alike as far as their gates' rows, and the outer products of their down column with their up row,
    agree: ``⟨g, g'⟩ / ‖G‖² + ⟨d, d'⟩⟨u, u'⟩ / Σ‖d‖²‖u‖²``, which no scaling of up against down changes. Neurons that
    stayed nearly parallel to themselves keep their place; the others are solved as a linear assignment problem. Where
    that would need more memory than the matrix itself, those that are each other's best match are paired first, which
    is the optimum when all are, and the rest is solved in parts.

    Args:
        base: ``gate_proj``, ``up_proj``, ``down_proj`` and their biases.
        tuned: the same of the other model.

    Returns:
        (neurons,) a permutation: entry i is the tuned neuron that corresponds to base neuron i.
    """
    overlaps = [neuron_overlaps(base, tuned, part) for part in BLOCKS["mlp"]]
    gate, up, down = overlaps
    cosines = [both / (before * after).sqrt().clamp_min(1e-300) for before, after, both in overlaps]
    order = torch.arange(len(gate[0]), device=gate[0].device)
    open_ = torch.nonzero((cosines[0] < _SETTLED) | (cosines[1] * cosines[2] < _SETTLED))[:, 0]
    if len(open_) < 2:
        return order
    kept, moved = _held(base), _held(tuned)
    score = partial(_likeness, kept, moved, sizes=_sizes(gate[0], up[0], down[0]))
    order[open_] = _assign(score, open_, limit=kept["gate_proj"].numel() * 4)
    return order


def neuron_tally(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    part: str,
    order: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tally:
    """Neuron by neuron, the tuned ones taken in ``order`` and multiplied by ``scale``."""
    matrices = ({part: base[part]}, {part: tuned[part]})
    for modules, source in zip(matrices, (base, tuned), strict=True):
        if part in BIASED and f"{part}.bias" in source:
            modules[f"{part}.bias"] = source[f"{part}.bias"]
    tallies = []
    for piece in pieces(matrices[0][part].shape[1 if part == "down_proj" else 0]):
        after = neurons_of(matrices[1], part, piece if order is None else order[piece])
        tallies.append(Tally.of(neurons_of(matrices[0], part, piece), after if scale is None else after * scale[piece]))
    return Tally.join(tallies)


def neuron_overlaps(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], part: str, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Neuron by neuron ``‖before‖²``, ``‖after‖²`` and ``⟨before, after⟩``."""
    tally = neuron_tally(base, tuned, part, order)
    return tally.before, tally.after, tally.before + (tally.slope - tally.difference) / 2


def _held(modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All a search reads, again and again, so that a mapping that reads lazily is asked once."""
    names = [*BLOCKS["mlp"], *(f"{part}.bias" for part in BLOCKS["mlp"] if part in BIASED)]
    return {name: modules[name] for name in names if name in modules}


def _sizes(gate: Tensor, up: Tensor, down: Tensor) -> dict[str, float]:
    """What each part's vectors are divided by, in float64, so that the scores of weights of any size fit float32.

    Of the squared norms (neurons,) of the base: ``‖G‖``, and for up and down two numbers whose product is
    ``√(Σ‖d‖²‖u‖²)``.
    """
    whole = float(up.sum().sqrt() * down.sum().sqrt())
    share = float((up * down).sum().sqrt()) / whole if whole else 1.0
    halves = math.sqrt(share or 1.0)
    sizes = {
        "gate_proj": gate.sum().sqrt(),
        "up_proj": up.sum().sqrt() * halves,
        "down_proj": down.sum().sqrt() * halves,
    }
    return {part: float(size) or 1.0 for part, size in sizes.items()}


def _likeness(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rows: Tensor,
    columns: Tensor,
    *,
    sizes: Mapping[str, float],
) -> Tensor:
    """(rows, columns) float32 scores of base neurons against tuned ones; a row's best is its most alike."""

    def inner(part: str) -> Tensor:
        before, after = neurons_of(base, part, rows) / sizes[part], neurons_of(tuned, part, columns) / sizes[part]
        return (before.mT.float() @ after.float()).float()

    score = inner("up_proj")
    score *= inner("down_proj")
    return score.add_(inner("gate_proj"))


def _assign(score: Callable[[Tensor, Tensor], Tensor], neurons: Tensor, limit: int) -> Tensor:
    """The tuned neuron for each of ``neurons``, a permutation of them, with at most ``limit`` bytes of scores."""
    from scipy.optimize import linear_sum_assignment

    found = torch.empty_like(neurons)
    side = max(_SMALL, math.isqrt(limit // _SEARCH_BYTES))
    left = free = torch.arange(len(neurons), device=neurons.device)
    if len(neurons) > side:
        left, free = _mutual(score, neurons, found)
    for start in range(0, len(left), side):
        places, others = left[start : start + side], free[start : start + side]
        scores = score(neurons[places], neurons[others]).cpu().numpy()
        _, columns = linear_sum_assignment(scores, maximize=True)
        found[places] = neurons[others[torch.as_tensor(columns, device=others.device)]]
    return found


def _mutual(score: Callable[[Tensor, Tensor], Tensor], neurons: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Pair, in ``found``, all that are each other's best; returns the places without a pair on either side."""
    count = len(neurons)
    best = torch.empty_like(neurons)
    column_best = torch.empty_like(neurons)
    column_score = torch.full((count,), -math.inf, device=neurons.device)
    # Pieces of rows and of columns: their vectors in float64 would otherwise be as large as the matrix.
    for rows in pieces(count):
        row_score = torch.full((rows.stop - rows.start,), -math.inf, device=neurons.device)
        for columns in pieces(count):
            scores = score(neurons[rows], neurons[columns])
            top, at = scores.max(1)
            better = top > row_score
            row_score[better], best[rows][better] = top[better], at[better] + columns.start
            top, at = scores.max(0)
            better = top > column_score[columns]
            column_score[columns][better], column_best[columns][better] = top[better], at[better] + rows.start
    mutual = column_best[best] == torch.arange(count, device=neurons.device)
    found[mutual] = neurons[best[mutual]]
    taken = torch.zeros_like(mutual)
    taken[best[mutual]] = True
    return torch.nonzero(~mutual)[:, 0], torch.nonzero(~taken)[:, 0]
