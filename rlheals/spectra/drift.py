"""What a change did to a weight's spectrum and singular vectors: pure measures on two decompositions.

Every measure of a pair (base W, tuned W' = W + ΔW), its definition and its source:

- ``sigma_before``, ``sigma_after``, ``sigma_change``, ``sigma_relative_change``: σ_i of W, of W', their difference, and
  the difference over σ_i of W, by rank i (left out where σ_i is zero to working precision);
- ``weyl_ratio`` = max |Δσ_i| / ‖ΔW‖₂, within 0 and 1 by Weyl's inequality;
- ``sigma_change_norm`` = ‖Δσ‖₂ / ‖ΔW‖_F, within 0 and 1 (Mirsky, Quart. J. Math. 11 (1960) 50);
- ``relative_change`` = ‖ΔW‖_F / ‖W‖_F; ``energy_change`` = (‖W'‖_F − ‖W‖_F) / ‖W‖_F;
- ``stable_rank_before``, ``stable_rank_after``, ``stable_rank_of_change`` = ‖·‖_F² / ‖·‖₂²
  (Rudelson & Vershynin, J. ACM 54 (2007) 21);
- ``angle`` and its summaries ``angle_mean``, ``angle_max``, ``angle_min``, ``angle_rms_sine``: principal angles between
  the spans of the same k singular vectors (`rlheals.spectra.angles`); ``angle_error_bound`` is how far they may be off.
  All angles of a full basis on a side of its own length are 0 by definition, and so are the first 2k − n of any k
  above n/2: their null bands are 0 as well;
- ``vectors_identified``, ``vector_angle``, ``cluster_angle``: share of singular vectors whose values stand apart by
  more than ``gap`` times ‖ΔW‖₂, the angle of each such vector with its successor, and for each group of closer values
  (index = first rank, k = size) the largest angle between the two spans (`rlheals.spectra.clusters`); a group of more
  than half of all ranks is left out;
- ``stretch_share`` = energy of the diagonal of UᵀΔWV over ‖ΔW‖_F², ``rotation_share`` = the rest, including what lies
  outside the base's row or column space: to first order the diagonal moves the singular values and leaves the vectors
  alone, and the rest the other way round (Stewart, "Perturbation theory for the singular value decomposition", 1990).
  Inside a degenerate group, where the base's vectors are not defined, the symmetric part of the group's block counts
  as stretch (it can be made diagonal by choosing the vectors), the antisymmetric part as rotation;
- ``block_share`` = energy of ΔW inside the top-k × top-k corner of UᵀΔWV, its diagonal left out, over ‖ΔW‖_F²;
- ``intruders`` = share of the tuned top-k singular vectors whose largest |cosine| with any of the base's singular
  vectors is below the cutoff (Shuttleworth et al., arXiv 2410.21228).

Memory: of the two bases of a matrix at most one is held in float64 at a time, and only the columns of the largest k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlheals.spectra.angles import (
    PARTS,
    SIDES,
    Part,
    Side,
    angle_error_bound,
    blocks,
    columns,
    resolve_k,
    side_reader,
    subspace_angles,
)
from rlheals.spectra.clusters import clusters, degenerate_clusters, is_null
from rlheals.spectra.norms import frobenius, spectral_norm

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from rlheals.spectra.factors import FactorView


@dataclass(frozen=True)
class Key:
    """What a number is about: a `Measure` without its value."""

    quantity: str
    side: str = ""
    part: str = ""
    k: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Measure:
    """One number about a pair of matrices; angles in radians.

    Attributes:
        quantity: name, see the module's docstring.
        side: "left", "right", or "" where both or neither are meant.
        part: "top", "bottom", "band", or "".
        k: how many singular vectors, where the quantity has such a number.
        index: 0-based rank on a curve.
        value: the number.
    """

    quantity: str
    side: str
    part: str
    k: int | None
    index: int | None
    value: float

    @property
    def key(self) -> Key:
        """All but the value; null bands are looked up by it."""
        return Key(self.quantity, self.side, self.part, self.k, self.index)


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure.

    Attributes:
        ks: subspace sizes; a whole number is a count, a number within 0 and 1 a share of the rank.
        parts: parts of the spectrum whose spans are compared.
        curve_points: longest curve; longer ones are thinned to that many ranks, evenly, both ends kept.
        intruder_cutoff: |cosine| below which a tuned vector counts as an intruder.
        gap: a vector is identified when its value stands apart by more than this times the change's spectral norm;
            2 is what Weyl's inequality asks for.
    """

    ks: tuple[float, ...] = (0.125, 0.25, 0.5)
    parts: tuple[Part, ...] = PARTS
    curve_points: int = 256
    intruder_cutoff: float = 0.6
    gap: float = 2.0


@dataclass
class Series:
    """Measures as arrays: keys are made only when asked for, as null draws need the values alone."""

    groups: list[tuple[Key, list[int] | None]] = field(default_factory=list)
    values: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, key: Key, value: float) -> None:
        """Append one number."""
        self.groups.append((key, None))
        self.values.append(np.array([value]))

    def add_curve(self, key: Key, values: Tensor, indices: list[int]) -> None:
        """Append the values at these ranks; ``values`` holds only them."""
        self.groups.append((key, indices))
        self.values.append(values.to("cpu", torch.float64).numpy())

    def keys(self) -> list[Key]:
        """One key a number, in the order of `vector`."""
        listed: list[Key] = []
        for key, indices in self.groups:
            own = (key.quantity, key.side, key.part, key.k)
            listed += [key] if indices is None else [Key(*own, index) for index in indices]
        return listed

    def vector(self) -> NDArray[np.float64]:
        """All numbers; NaN where a measure is not defined."""
        return np.concatenate(self.values) if self.values else np.empty(0)

    def measures(self) -> list[Measure]:
        """The defined ones as `Measure`."""
        pairs = zip(self.keys(), self.vector().tolist(), strict=True)
        return [
            Measure(key.quantity, key.side, key.part, key.k, key.index, value)
            for key, value in pairs
            if not math.isnan(value)
        ]


def measure(base: FactorView, tuned: FactorView, change: Tensor, settings: MeasureSettings) -> list[Measure]:
    """All measures of one pair of matrices; see the module's docstring for each.

    Args:
        base: decomposition of W, (m, n).
        tuned: decomposition of W'.
        change: (m, n) W' − W, in the precision the products with it shall have (float32 suffices; half precisions
            are computed with in float32).
        settings: which subspaces, and cutoffs.

    Raises:
        UserError: a k that is larger than the rank, or no share of it.
    """
    return series(base, tuned, change, settings).measures()


def series(
    base: FactorView, tuned: FactorView, change: Tensor, settings: MeasureSettings, spectral: float | None = None
) -> Series:
    """`measure` as arrays.

    Args:
        base: decomposition of W.
        tuned: decomposition of W'.
        change: W' − W.
        settings: which subspaces, and cutoffs.
        spectral: spectral norm by which vectors are grouped; that of ``change`` if None. A null draw takes the one of
            the real change, so that it is grouped alike.
    """
    change = change if change.dtype in (torch.float32, torch.float64) else change.to(torch.float32)
    ks = sorted({resolve_k(k, base.rank) for k in settings.ks})
    own = spectral_norm(change)
    found = Series()
    _spectrum(found, base.values, tuned.values, settings.curve_points)
    _norms(found, base.values, tuned.values, change, own)
    for part in settings.parts:
        for k in ks:
            _angles(found, base, tuned, part, k, settings.curve_points)
    _vectors(found, base, tuned, own if spectral is None else spectral, settings)
    _energies(found, base, change, ks)
    for side in SIDES:
        _intruders(found, base, tuned, side, ks, settings.intruder_cutoff)
    return found


def embedding_head_angles(
    embedding: FactorView, head: FactorView, settings: MeasureSettings, suffix: str
) -> list[Measure]:
    """Principal angles between the top-k right singular vectors of the embedding and of the head, (vocabulary, hidden).

    Both act on the hidden states, so their right singular vectors lie in the same space. Tied weights have no angle.

    Args:
        embedding: decomposition of the embedding.
        head: decomposition of the head; it may have another vocabulary, not another width.
        settings: which k, and how many points.
        suffix: "before" or "after", appended to the quantities' names.
    """
    found = Series()
    rank = min(embedding.rank, head.rank)
    for k in sorted({resolve_k(k, rank) for k in settings.ks}):
        angles = subspace_angles(embedding, head, "right", columns("top", k, rank))
        points = thinned(k, settings.curve_points)
        found.add_curve(Key(f"embedding_head_angle_{suffix}", "right", "top", k), angles[points], points)
        found.add(Key(f"embedding_head_angle_mean_{suffix}", "right", "top", k), float(angles.mean()))
    return found.measures()


def thinned(length: int, points: int) -> list[int]:
    """At most ``points`` ranks out of ``length``, evenly spread, with both ends.

    >>> thinned(5, 10), thinned(9, 3)
    ([0, 1, 2, 3, 4], [0, 4, 8])
    """
    if length <= points:
        return list(range(length))
    return sorted({round(index) for index in np.linspace(0, length - 1, max(2, points)).tolist()})


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


def _spectrum(found: Series, before: Tensor, after: Tensor, curve_points: int) -> None:
    points = thinned(before.numel(), curve_points)
    difference = after - before
    floor = torch.finfo(before.dtype).eps * before.numel() * float(before[0])
    relative = torch.where(before > floor, difference / before.clamp(min=torch.finfo(before.dtype).tiny), math.nan)
    curves = {"before": before, "after": after, "change": difference, "relative_change": relative}
    for name, values in curves.items():
        found.add_curve(Key(f"sigma_{name}"), values[points], points)


def _norms(found: Series, before: Tensor, after: Tensor, change: Tensor, spectral: float) -> None:
    difference = after - before
    norm = frobenius(change)
    energy_before, energy_after = (float(torch.linalg.vector_norm(values)) for values in (before, after))
    found.add(Key("weyl_ratio"), _ratio(float(difference.abs().max()), spectral) if norm else 0.0)
    found.add(Key("sigma_change_norm"), _ratio(float(torch.linalg.vector_norm(difference)), norm) if norm else 0.0)
    found.add(Key("relative_change"), _ratio(norm, energy_before))
    found.add(Key("energy_change"), _ratio(energy_after - energy_before, energy_before))
    found.add(Key("stable_rank_before"), _ratio(energy_before, float(before[0])) ** 2)
    found.add(Key("stable_rank_after"), _ratio(energy_after, float(after[0])) ** 2)
    found.add(Key("stable_rank_of_change"), _ratio(norm, spectral) ** 2)


def _angles(found: Series, base: FactorView, tuned: FactorView, part: Part, k: int, curve_points: int) -> None:
    span = columns(part, k, base.rank)
    points = thinned(k, curve_points)
    for side in SIDES:
        angles = subspace_angles(base, tuned, side, span)
        found.add_curve(Key("angle", side, part, k), angles[points], points)
        found.add(Key("angle_mean", side, part, k), float(angles.mean()))
        found.add(Key("angle_max", side, part, k), float(angles[-1]))
        found.add(Key("angle_min", side, part, k), float(angles[0]))
        found.add(Key("angle_rms_sine", side, part, k), math.sqrt(float(torch.sin(angles).square().mean())))
    found.add(Key("angle_error_bound", "", part, k), angle_error_bound(base, tuned, span))


def _vectors(found: Series, base: FactorView, tuned: FactorView, spectral: float, settings: MeasureSettings) -> None:
    square = base.shape[0] == base.shape[1]
    numerical = sum(view.reconstruction_error * float(torch.linalg.vector_norm(view.values)) for view in (base, tuned))
    distance = settings.gap * max(spectral, numerical)
    groups = clusters(base.values, distance, square=square)
    alone = [
        group.start
        for group in groups
        if group.stop - group.start == 1 and (square or float(base.values[group.start]) > distance)
    ]
    found.add(Key("vectors_identified"), len(alone) / base.rank)
    chosen = [alone[point] for point in thinned(len(alone), settings.curve_points)]
    shared = [g for g in groups if g.start not in alone and g.stop - g.start <= max(1, base.rank // 2)]
    for side in SIDES:
        if chosen:
            found.add_curve(Key("vector_angle", side), _vector_angles(base, tuned, side, chosen), chosen)
        for group in shared:
            largest = float(subspace_angles(base, tuned, side, group)[-1])
            found.add(Key("cluster_angle", side, "", group.stop - group.start, group.start), largest)


def _vector_angles(base: FactorView, tuned: FactorView, side: Side, ranks: list[int]) -> Tensor:
    """Angle of each of these singular vectors with the one of the same rank, whatever their signs."""
    found = []
    for block in blocks(slice(0, base.rank)):
        inside = [rank - block.start for rank in ranks if block.start <= rank < block.stop]
        if inside:
            before, after = (side_reader(view, side)(block)[:, inside] for view in (base, tuned))
            cosines = (before * after).sum(0)
            sines = torch.linalg.vector_norm(after - before * cosines, dim=0)
            found.append(torch.atan2(sines, cosines.abs()))
    return torch.cat(found)


def _energies(found: Series, base: FactorView, change: Tensor, ks: list[int]) -> None:
    """Stretch, rotation and block shares, by one pass over column blocks of the base's bases."""
    total = frobenius(change) ** 2
    diagonal = torch.zeros(base.rank, dtype=torch.float64)
    inner = dict.fromkeys(ks, 0.0)
    top = base.left(slice(0, max(ks))).to(change)
    for block in blocks(slice(0, base.rank)):
        image = change @ base.right(block).to(change)
        diagonal[block] = (base.left(block).to(change) * image).sum(0).to("cpu", torch.float64)
        if block.start >= max(ks):
            continue
        energies = (top.mT @ image).to(torch.float64).square()
        energies.diagonal(-block.start).zero_()
        for k in ks:
            if block.start < k:
                inner[k] += float(energies[:k, : k - block.start].sum())
    stretch = float(diagonal.square().sum()) + _degenerate_stretch(base, change, diagonal)
    share = min(1.0, stretch / total) if total else 0.0
    found.add(Key("stretch_share"), share)
    found.add(Key("rotation_share"), 1.0 - share if total else 0.0)
    for k in ks:
        found.add(Key("block_share", "", "top", k), min(1.0, inner[k] / total) if total else 0.0)


def _degenerate_stretch(base: FactorView, change: Tensor, diagonal: Tensor) -> float:
    """What degenerate groups add to the diagonal's energy so that the sum does not depend on the choice of vectors."""
    added = 0.0
    for group in degenerate_clusters(base):
        block = _block(base, change, group)
        kept = block if is_null(base, group) else (block + block.mT) / 2
        added += frobenius(kept) ** 2 - float(diagonal[group].square().sum())
    return added


def _block(base: FactorView, change: Tensor, group: slice) -> Tensor:
    """UᵀΔWV within a group, (c, c), by column blocks."""
    left = torch.cat([base.left(block).to(change) for block in blocks(group)], dim=1)
    return torch.cat([left.mT @ (change @ base.right(block).to(change)) for block in blocks(group)], dim=1)


def _intruders(found: Series, base: FactorView, tuned: FactorView, side: Side, ks: list[int], cutoff: float) -> None:
    after = side_reader(tuned, side)(slice(0, max(ks)))
    best = after.new_zeros(max(ks))
    for block in blocks(slice(0, base.rank)):
        best = torch.maximum(best, (side_reader(base, side)(block).mT @ after).abs().amax(0))
    for k in ks:
        found.add(Key("intruders", side, "top", k), float((best[:k] < cutoff).to(torch.float64).mean()))
