"""Bring two factorisations of nearly the same product together: the best map on the dimension between the factors.

A product ``B Aᵀ`` stays what it is when ``A`` becomes ``A Mᵀ`` and ``B`` becomes ``B M⁻¹``. Which maps ``M`` a network
allows depends on what stands between the factors; three cases are solved here: every invertible ``M``, one complex
number a column (a rotary plane), and one real number a column (a neuron). Inputs are float64 or complex128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlheals.spectra.small_svd import svd

_ROUNDS = 50
_HALVINGS = 20
_PHASE_ROUNDS = 12


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """The orthogonal R that minimises ``‖a R − b‖_F`` (orthogonal Procrustes problem).

    The chain ``W₂ W₁`` of the source's theory: turning W₁ by 10° and W₂ back changes both matrices and not their
    product, and Procrustes finds the turn from W₁ alone.

    >>> import math, torch
    >>> w1, w2 = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1, 0.5], dtype=torch.float64))
    >>> cosine, sine = math.cos(math.radians(10)), math.sin(math.radians(10))
    >>> turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    >>> w1_turned, w2_turned = turn @ w1, w2 @ turn.T
    >>> found = procrustes(w1.T, w1_turned.T).T
    >>> print(f"W1 moved by {(w1_turned - w1).norm():.3f}, W2 by {(w2_turned - w2).norm():.3f}")
    W1 moved by 0.247, W2 by 0.195
    >>> bool((found - turn).abs().max() < 1e-12)  # the turn is recovered
    True
    >>> bool((found.T @ w1_turned - w1).abs().max() < 1e-12)  # after alignment the weights are the same
    True
    >>> bool((w2_turned @ w1_turned - w2 @ w1).abs().max() < 1e-12)  # and the outputs were all along
    True

    Args:
        a: (rows, d).
        b: (rows, d).

    Returns:
        (d, d), as ``scipy.linalg.orthogonal_procrustes``.

    Source: Schönemann, Psychometrika 31 (1966) 1; the demonstration is the source paper's appendix A.
    """
    return _polar(a.mT @ b)


@dataclass(frozen=True)
class Tally:
    """Column by column, how far ``after`` lies from ``before``; sums over however many rows were added.

    Kept as sums over the difference and not as differences of sums, so that a change of 1e-15 is still told from 0.

    Attributes:
        before: (columns,) ``‖before‖²``.
        difference: (columns,) ``‖after − before‖²``.
        slope: (columns,) ``⟨after − before, after + before⟩``, complex for complex columns; its real part is
            ``‖after‖² − ‖before‖²``.
    """

    before: Tensor
    difference: Tensor
    slope: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Tally:
        """Compare the columns of two (rows, columns) arrays."""
        change = after - before
        slope = (change.conj() * (after + before)).sum(0)
        return cls(_squares(before), _squares(change), slope)

    def __add__(self, other: Tally) -> Tally:
        """The tally of both arrays' rows together."""
        return Tally(self.before + other.before, self.difference + other.difference, self.slope + other.slope)

    @classmethod
    def join(cls, parts: list[Tally]) -> Tally:
        """The tally of arrays whose columns stand side by side."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("before", "difference", "slope")))

    @property
    def after(self) -> Tensor:
        """(columns,) ``‖after‖²``."""
        return (self.before + self.slope.real).clamp_min(0.0)

    def change(self) -> float:
        """``‖after − before‖_F / ‖before‖_F`` over all columns."""
        return _share(self.difference.sum(), self.before.sum())

    def angles(self) -> Tensor:
        """(columns,) angle between each column before and after, in radians, 0 where either is zero.

        From the chord between the unit vectors, which keeps its digits at small angles where the cosine does not.
        """
        long, short = self.after.sqrt(), self.before.sqrt()
        scale = long * short
        stretch = self.slope.real / (long + short).clamp_min(torch.finfo(long.dtype).tiny)
        chord = ((self.difference - stretch.square()) / scale).clamp(0.0, 4.0).sqrt()
        return torch.where(scale > 0, 2 * torch.asin(chord / 2), torch.zeros_like(scale))

    def outer_change(self, other: Tally) -> float:
        """Relative change of the products ``a_p b_pᴴ`` of this tally's column p with the other's, over all p.

        Equal to forming each (rows × rows) product and taking ``sqrt(Σ‖change‖²) / sqrt(Σ‖before‖²)``.
        """
        inner = (self.slope - self.difference) / 2  # ⟨change, before⟩
        other_inner = (other.slope + other.difference) / 2  # ⟨change, after⟩
        crossed = 2 * (inner * other_inner).real
        changed = self.difference * other.after + self.before * other.difference + crossed
        return _share(changed.clamp_min(0.0).sum(), (self.before * other.before).sum())


@dataclass(frozen=True)
class Grams:
    """Inner products of two factors' columns before and after, all that an invertible map depends on; each (d, d)."""

    after_after: Tensor
    before_after: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Grams:
        """From (rows, d) arrays."""
        return cls(after.mT @ after, before.mT @ after)

    def __add__(self, other: Grams) -> Grams:
        """Of both arrays' rows together."""
        return Grams(self.after_after + other.after_after, self.before_after + other.before_after)


def best_map(a: Grams, b: Grams) -> Tensor:
    """The invertible M that minimises ``‖A − A' Mᵀ‖² + ‖B − B' M⁻¹‖²``, where A', B' are the factors after.

    Starts from the orthogonal Procrustes solution over both factors, or from the least-squares map of either one
    where that is better, and goes on by Gauss–Newton steps, each of which is a Sylvester equation of two symmetric
    matrices; never worse than Procrustes.

    Args:
        a: inner products of A's columns.
        b: inner products of B's columns.

    Returns:
        (d, d) map; the identity where the factors are zero.
    """
    starts = [_polar(a.before_after + b.before_after)]
    starts += [_left_solve(a), _inverse(_left_solve(b))]
    usable = [start for start in starts if start.isfinite().all() and _inverse(start).isfinite().all()]
    found = min(usable, key=lambda start: _misfit(start, a, b))
    for _ in range(_ROUNDS):
        step = _step(found, a, b)
        size = float(step.abs().max())
        moved = _walk(found, step, a, b) if size > 1e-4 else found + step @ found
        if moved is None:
            break
        found = moved
        if size < 1e-13:
            break
    return found


def best_scale(grown: Tensor, grown_overlap: Tensor, shrunk: Tensor, shrunk_overlap: Tensor) -> Tensor:
    """The real s ≠ 0 that minimises ``‖u − s u'‖² + ‖d − d' / s‖²``, for many pairs of vectors at once.

    The derivative is a quartic in s; its roots are eigenvalues of a companion matrix. A root is taken only where it is
    better than s = 1.

    Args:
        grown: (N,) ``‖u'‖²``.
        grown_overlap: (N,) ``⟨u, u'⟩``.
        shrunk: (N,) ``‖d'‖²``.
        shrunk_overlap: (N,) ``⟨d, d'⟩``.

    Returns:
        (N,) scales, of either sign; 1 where a vector is zero.
    """
    alive = (grown > 0) & (shrunk > 0)
    a, b = torch.where(alive, grown, 1.0), torch.where(alive, shrunk, 1.0)
    unit = (b / a) ** 0.25  # s in these units makes the quartic's first and last coefficients 1 and −1
    companion = a.new_zeros(a.numel(), 4, 4)
    companion[:, 1, 0] = companion[:, 2, 1] = companion[:, 3, 2] = 1.0
    companion[:, 0, 3] = 1.0
    companion[:, 1, 3] = -shrunk_overlap / (a * unit**3)
    companion[:, 3, 3] = grown_overlap / (a * unit)
    roots = torch.linalg.eigvals(companion).real * unit[:, None]
    roots = torch.where(roots.abs() > 1e-6 * unit[:, None], roots, torch.ones_like(roots))
    candidates = torch.cat([torch.ones_like(roots[:, :1]), roots], dim=1)
    misfit = candidates.square() * a[:, None] - 2 * candidates * grown_overlap[:, None]
    misfit += b[:, None] / candidates.square() - 2 * shrunk_overlap[:, None] / candidates
    best = candidates.gather(1, misfit.argmin(1, keepdim=True))[:, 0]
    return torch.where(alive, best, torch.ones_like(best))


def best_turn(grown: Tensor, grown_overlap: Tensor, shrunk: Tensor, shrunk_overlap: Tensor) -> Tensor:
    """The complex c ≠ 0 that minimises ``‖k − c k'‖² + ‖q − q' / c̄‖²``, for many pairs of complex vectors at once.

    Phase and size are found in turn, each exactly; the misfit never grows.

    Args:
        grown: (N,) ``‖k'‖²``, real.
        grown_overlap: (N,) ``⟨k, k'⟩`` (the first one conjugated), complex.
        shrunk: (N,) ``‖q'‖²``, real.
        shrunk_overlap: (N,) ``⟨q, q'⟩``, complex.

    Returns:
        (N,) complex numbers; 1 where a vector is zero.
    """
    size = torch.ones_like(grown)
    alive = (grown > 0) & (shrunk > 0)
    for _ in range(_PHASE_ROUNDS):
        turn = _phase(size * grown_overlap + shrunk_overlap / size)
        size = best_scale(grown, (turn * grown_overlap).real, shrunk, (turn * shrunk_overlap).real)
    turn = _phase(size * grown_overlap + shrunk_overlap / size)
    return torch.where(alive, size * turn, torch.ones_like(turn))


def _phase(overlap: Tensor) -> Tensor:
    """The unit number that turns ``overlap`` onto the positive real axis."""
    return torch.polar(torch.ones_like(overlap.real), -overlap.angle())


def _squares(columns: Tensor) -> Tensor:
    return (
        columns.real.square().sum(0) + columns.imag.square().sum(0) if columns.is_complex() else columns.square().sum(0)
    )


def _share(part: Tensor, whole: Tensor) -> float:
    return float((part / whole).sqrt()) if float(whole) > 0 else 0.0


def _polar(overlap: Tensor) -> Tensor:
    left, _, right = svd(overlap)
    return left @ right


def _left_solve(grams: Grams) -> Tensor:
    """The M of ``min ‖before − after Mᵀ‖``."""
    solved: Tensor = grams.before_after @ torch.linalg.pinv(grams.after_after, hermitian=True)
    return solved


def _inverse(matrix: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv_ex(matrix).inverse
    return inverse


def _misfit(chosen: Tensor, a: Grams, b: Grams) -> float:
    """The objective of `best_map` but for a constant."""
    back = _inverse(chosen)
    value = (chosen @ a.after_after * chosen).sum() - 2 * (a.before_after * chosen).sum()
    value += (back.mT @ b.after_after * back.mT).sum() - 2 * (b.before_after * back.mT).sum()
    return float(value) if bool(value.isfinite()) else float("inf")


def _step(chosen: Tensor, a: Grams, b: Grams) -> Tensor:
    """X of the Gauss–Newton step ``M ← (1 + X) M``: ``X Gₐ + G_b X = right side`` in the factors' current Grams."""
    back = _inverse(chosen)
    gram_a, gram_b = chosen @ a.after_after @ chosen.mT, back.mT @ b.after_after @ back
    miss_a = a.before_after @ chosen.mT - gram_a
    miss_b = (b.before_after @ back).mT - gram_b
    values_a, vectors_a = torch.linalg.eigh((gram_a + gram_a.mT) / 2)
    values_b, vectors_b = torch.linalg.eigh((gram_b + gram_b.mT) / 2)
    sums = values_b.clamp_min(0.0)[:, None] + values_a.clamp_min(0.0)[None, :]
    turned = vectors_b.mT @ (miss_a - miss_b) @ vectors_a
    # Directions that neither factor has are free; they stay where they are.
    solved = torch.where(sums > 1e-14 * sums.max(), turned / sums, torch.zeros_like(turned))
    step: Tensor = vectors_b @ solved @ vectors_a.mT
    return step


def _walk(chosen: Tensor, step: Tensor, a: Grams, b: Grams) -> Tensor | None:
    """The first of the step, half of it, a quarter … that lowers the misfit; None if none does."""
    reached, factor = _misfit(chosen, a, b), 1.0
    for _ in range(_HALVINGS):
        moved = chosen + factor * (step @ chosen)
        if _misfit(moved, a, b) < reached:
            return moved
        factor /= 2
    return None
