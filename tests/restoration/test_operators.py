"""Every operator against dense oracles, identities, and what it must leave alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.restoration.edit import BASES, CONTROLS, FULL, WINDOWLESS, Edit, Scope, Window, band, ends, head, tail
from rlheals.restoration.job import length
from rlheals.restoration.operators import OPERATORS, Edited, MatrixView, Pair, apply_edit, distance
from rlheals.spectra.angles import principal_angles, resolve_k
from rlheals.spectra.factors import Factors, MemoryFactors
from tests.restoration.pairs import (
    bases,
    columns,
    directions_oracle,
    drifted,
    fitting,
    mixed_basis,
    released_script,
    tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = [(12, 12), (20, 9), (9, 20)]
WINDOWS = [head(0.25), tail(0.25), band(0.25, 0.5), head(0.8), band(1, 8), ends(2, 1), ends(0.4, 0.3), FULL]
KINDS = [(name, basis) for name, known in BASES.items() for basis in known]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
spans = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.text)


def edit(operator: str, basis: str = "", window: Window = FULL, **more: object) -> Edit:
    return Edit(operator, basis or BASES[operator][0], "base", "sft_end", Scope(), fitting(operator, window), **more)  # type: ignore[arg-type]


def run(pair: Pair, operator: str, basis: str = "", window: Window = FULL, **more: object) -> Edited:
    return apply_edit(edit(operator, basis, window, **more), pair, name="weight")


def relative(found: Tensor, expected: Tensor | np.ndarray) -> float:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    return float((found.to(torch.float64) - wanted).norm() / wanted.norm())


def test_every_operator_has_bases() -> None:
    assert set(OPERATORS) == set(BASES)


@shapes
@spans
@pytest.mark.parametrize("sides", ["uv", "u", "v"])
def test_directions_against_the_dense_oracle(shape: tuple[int, int], window: Window, sides: str) -> None:
    pair = drifted(*shape, seed=3)
    found = run(pair, "directions", sides, window)
    assert relative(found.tensor, directions_oracle(pair, window, sides, orthonormal=True)) < 1e-12
    assert found.change_norm == pytest.approx(float((found.tensor - tensors(pair)[1]).norm()))
    sigma = pair.target.factors().values
    torch.testing.assert_close(torch.linalg.svdvals(found.tensor), sigma, atol=1e-11, rtol=0)


@shapes
@spans
def test_the_window_holds_the_reference_exactly(shape: tuple[int, int], window: Window) -> None:
    pair = drifted(*shape, seed=4)
    base_u, base_v, _, sigma, _ = (torch.as_tensor(each) for each in bases(pair))
    span = columns(window, len(sigma))
    found = run(pair, "directions", "uv", window).tensor
    torch.testing.assert_close(found @ base_v[:, span], base_u[:, span] * sigma[span], atol=1e-11, rtol=0)
    torch.testing.assert_close(found.mT @ base_u[:, span], base_v[:, span] * sigma[span], atol=1e-11, rtol=0)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_with_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pair = drifted(*shape, seed=5, dtype=dtype)
    bound = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for window in WINDOWS:
        found = run(pair, "directions", "uv", window).tensor
        assert found.dtype == dtype
        assert relative(found, directions_oracle(pair, window, "uv", orthonormal=True)) < bound


@shapes
@spans
def test_official_puts_bases_side_by_side(shape: tuple[int, int], window: Window) -> None:
    pair = drifted(*shape, seed=6)
    found = run(pair, "directions", "uv", window, official=True)
    if window == FULL:
        assert found.tensor is tensors(pair)[0], "values and all"
        return
    assert relative(found.tensor, directions_oracle(pair, window, "uv", orthonormal=False)) < 1e-12
    base_u, base_v, u, sigma, v = bases(pair)
    span = columns(window, len(sigma))
    taken = run(pair, "directions", "all", window, official=True)
    sigma = sigma.copy()
    sigma[span] = pair.reference.factors().values[span]
    left, right = (mixed_basis(old, new, span, orthonormal=False) for old, new in ((u, base_u), (v, base_v)))
    assert relative(taken.tensor, (left * sigma) @ right.T) < 1e-12


@given(st.tuples(st.integers(1, 14), st.integers(1, 14)), st.integers(0, 15), st.integers(0, 15), st.booleans())
@settings(max_examples=100, deadline=None)
def test_official_edits_of_both_ends_are_those_of_the_scripts(
    shape: tuple[int, int], k_head: int, k_tail: int, values: bool
) -> None:
    pair = drifted(*shape, seed=25)
    found = run(pair, "directions", "all" if values else "uv", ends(k_head, k_tail), official=True).tensor
    assert relative(found, released_script(pair, k_head, k_tail, values=values)) < 1e-11
    if k_head + k_tail >= min(shape):
        assert found is tensors(pair)[0]
    if not k_head + k_tail:
        assert found is tensors(pair)[1]


@pytest.mark.parametrize("operator", ["directions", "values", "rotate", "remove_inside"])
def test_both_ends_are_not_one_end_after_the_other_alone(operator: str) -> None:
    """A window of both ends that fell back to one of them would pass no other test by luck, but this one never."""
    pair = drifted(20, 9, seed=26)
    both, head_alone, tail_alone = (run(pair, operator, "", w).tensor for w in (ends(3, 2), head(3), tail(2)))
    assert min(relative(both, head_alone), relative(both, tail_alone)) > 1e-4


@spans
def test_the_defect_is_that_of_the_mixed_basis(window: Window) -> None:
    for shape in SHAPES:
        pair = drifted(*shape, seed=7)
        base_u, base_v, u, sigma, v = bases(pair)
        span, rank = columns(window, len(sigma)), len(sigma)
        defects = []
        for old, new in ((u, base_u), (v, base_v)):
            mixed = mixed_basis(old, new, span, orthonormal=False)
            defects.append(float(np.linalg.norm(mixed.T @ mixed - np.eye(rank))) / math.sqrt(rank))
        for official in (False, True):
            found = run(pair, "directions", "uv", window, official=official).orthogonality_defect
            if shape[0] == shape[1] or window == FULL:
                expected = 0.0 if window == FULL else max(defects)
                assert found == pytest.approx(expected, abs=1e-10)
            else:
                assert found >= max(defects) - 1e-10


@shapes
def test_directions_and_values_of_all_ranks_are_a_swap(shape: tuple[int, int]) -> None:
    pair = drifted(*shape, seed=8, dtype=torch.float32)
    reference = tensors(pair)[0]
    turned = run(pair, "directions", "uv").tensor
    assert relative(turned, reference) > 1e-3
    both = apply_edit(edit("values"), Pair(pair.reference, MatrixView.of(turned)), name="weight").tensor
    assert relative(both, reference) < 1e-6
    assert run(pair, "directions", "all").tensor is reference
    assert run(pair, "swap").tensor is reference


def test_directions_and_values_are_a_swap_on_a_large_matrix() -> None:
    pair = drifted(256, 192, seed=8, drift=1.0, dtype=torch.float32)
    turned = run(pair, "directions", "uv").tensor
    both = apply_edit(edit("values"), Pair(pair.reference, MatrixView.of(turned)), name="weight").tensor
    assert relative(both, tensors(pair)[0]) < 1e-6


@shapes
@spans
def test_values_leave_the_vectors(shape: tuple[int, int], window: Window) -> None:
    pair = drifted(*shape, seed=9)
    _, _, u, sigma, v = bases(pair)
    expected, span = sigma.copy(), columns(window, len(sigma))
    expected[span] = pair.reference.factors().values[span]
    assert relative(run(pair, "values", window=window).tensor, (u * expected) @ v.T) < 1e-13


def decomposed(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> MatrixView:
    """A matrix with these factors, whatever signs and order a decomposition of it would choose."""
    view = MemoryFactors(Factors(left, values, right, "given", 0.0, 0.0))
    return MatrixView(lambda: matrix, lambda: view)


@shapes
@spans
@pytest.mark.parametrize("order", ["uv", "vu"])
def test_one_side_after_the_other_is_both(shape: tuple[int, int], window: Window, order: str) -> None:
    pair = drifted(*shape, seed=10, drift=0.7)
    base_u, base_v, u, sigma, v = bases(pair)
    span = columns(window, len(sigma))
    first = run(pair, "directions", order[0], window).tensor
    signs = np.where((base_u * u).sum(0) + (base_v * v).sum(0) < 0, -1.0, 1.0)
    left = mixed_basis(u, base_u * signs, span, orthonormal=True) if order[0] == "u" else u
    right = mixed_basis(v, base_v * signs, span, orthonormal=True) if order[0] == "v" else v
    half_way = decomposed(first, *(torch.as_tensor(each) for each in (left, sigma, right)))
    assert relative(first, (left * sigma) @ right.T) < 1e-12
    second = apply_edit(edit("directions", order[1], window), Pair(pair.reference, half_way), name="weight").tensor
    assert relative(second, run(pair, "directions", "uv", window).tensor) < 1e-11


def test_one_side_does_not_hang_on_the_signs_of_the_factors() -> None:
    pair = drifted(12, 9, seed=11)
    factors = pair.reference.factors()
    whole, flips = slice(0, 9), torch.tensor([1.0, -1, -1, 1, -1, 1, 1, -1, -1], dtype=torch.float64)
    flipped = decomposed(tensors(pair)[0], factors.left(whole) * flips, factors.values, factors.right(whole) * flips)
    for basis in ("u", "v", "uv"):
        for window in WINDOWS:
            found = run(Pair(flipped, pair.target), "directions", basis, window).tensor
            torch.testing.assert_close(found, run(pair, "directions", basis, window).tensor, atol=1e-12, rtol=0)


@shapes
@spans
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_rotation_goes_its_share_of_the_way(shape: tuple[int, int], window: Window, share: float) -> None:
    pair = drifted(*shape, seed=12)
    base_u, base_v, u, sigma, v = (torch.as_tensor(each) for each in bases(pair))
    span = columns(window, len(sigma))
    found = run(pair, "rotate", "uv", window, dose=share).tensor
    torch.testing.assert_close(torch.linalg.svdvals(found), sigma, atol=1e-11, rtol=0)
    moved_u = found @ (v[:, span] @ torch.diag(1 / sigma[span]))
    if shape[1] == len(sigma) and window == FULL:  # the right side is whole and cannot turn
        torch.testing.assert_close(principal_angles(u, moved_u), principal_angles(u, base_u) * share, atol=1e-6, rtol=0)
    image = torch.linalg.svd(found, full_matrices=False)
    left, right = image.U[:, span], image.Vh.mT[:, span]
    for old, new, now in ((u, base_u, left), (v, base_v, right)):
        before = principal_angles(old[:, span], new[:, span])
        torch.testing.assert_close(principal_angles(old[:, span], now), before * share, atol=1e-6, rtol=0)
        torch.testing.assert_close(principal_angles(now, new[:, span]), before * (1 - share), atol=1e-6, rtol=0)


@shapes
@spans
def test_a_random_rotation_has_the_angles_and_another_direction(shape: tuple[int, int], window: Window) -> None:
    pair = drifted(*shape, seed=13)
    base_u, base_v, u, sigma, v = (torch.as_tensor(each) for each in bases(pair))
    span = columns(window, len(sigma))
    found = run(pair, "random_rotation", "uv", window).tensor
    torch.testing.assert_close(torch.linalg.svdvals(found), sigma, atol=1e-11, rtol=0)
    image = torch.linalg.svd(found, full_matrices=False)
    for old, new, now in ((u, base_u, image.U), (v, base_v, image.Vh.mT)):
        before = principal_angles(old[:, span], new[:, span])
        torch.testing.assert_close(principal_angles(old[:, span], now[:, span]), before, atol=1e-6, rtol=0)
        if float(before.max()) > 1e-3:
            assert principal_angles(now[:, span], new[:, span]).max() > 0.1
    if window != FULL:
        assert not torch.equal(found, run(pair, "random_rotation", "uv", window, seed=1).tensor)
    assert torch.equal(found, run(pair, "random_rotation", "uv", window).tensor)


@shapes
@pytest.mark.parametrize("operator", ["noise", "random_rotation"])
@pytest.mark.parametrize("norm", [1e-3, 0.5, 3.0])
def test_controls_have_the_norm_that_is_asked(shape: tuple[int, int], operator: str, norm: float) -> None:
    pair = drifted(*shape, seed=14)
    basis = {"noise": "all", "random_rotation": "uv"}[operator]
    found = run(pair, operator, basis, amounts=(("weight", norm),), control_of="x")
    assert found.change_norm == pytest.approx(norm, rel=2e-4)
    if operator == "random_rotation":
        torch.testing.assert_close(torch.linalg.svdvals(found.tensor), pair.target.factors().values, atol=1e-10, rtol=0)


def test_noise_without_amounts_is_as_large_as_the_drift() -> None:
    pair = drifted(12, 9, seed=15)
    found = run(pair, "noise", dose=0.5)
    assert found.change_norm == pytest.approx(0.5 * distance(*tensors(pair)))
    other = apply_edit(edit("noise", dose=0.5), pair, name="other").tensor
    assert not torch.equal(found.tensor, other), "tensors have streams of their own"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation(share: float) -> None:
    pair = drifted(12, 9, seed=16)
    reference, target = tensors(pair)
    found = run(pair, "interpolate", dose=share).tensor
    torch.testing.assert_close(found, (1 - share) * target + share * reference)
    if share in (0.0, 1.0):
        assert found is (target if share == 0.0 else reference)
    amounts = run(pair, "interpolate", amounts=(("weight", share), ("other", 0.7))).tensor
    assert torch.equal(amounts, found)


@shapes
@spans
def test_what_is_removed_inside_and_outside_is_all_drift(shape: tuple[int, int], window: Window) -> None:
    pair = drifted(*shape, seed=17)
    reference, target = tensors(pair)
    base_u, base_v, _, sigma, _ = (torch.as_tensor(each) for each in bases(pair))
    span = columns(window, len(sigma))
    drift = target - reference
    inside = base_u[:, span] @ base_u[:, span].mT @ drift @ base_v[:, span] @ base_v[:, span].mT
    for dose in (0.5, 1.0):
        kept = run(pair, "remove_inside", window=window, dose=dose).tensor
        torch.testing.assert_close(kept, target - dose * inside, atol=1e-12, rtol=0)
        kept = run(pair, "remove_outside", window=window, dose=dose).tensor
        torch.testing.assert_close(kept, target - dose * (drift - inside), atol=1e-12, rtol=0)


@shapes
def test_a_round_trip_changes_rounding_only(shape: tuple[int, int]) -> None:
    pair = drifted(*shape, seed=18, dtype=torch.float32)
    assert relative(run(pair, "round_trip").tensor, tensors(pair)[1]) < 1e-6


@pytest.mark.parametrize(("operator", "basis"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_edits_that_change_nothing_return_the_target(operator: str, basis: str, dtype: torch.dtype) -> None:
    pair = drifted(12, 9, seed=19, dtype=dtype)
    target = tensors(pair)[1]
    spectral = operator not in WINDOWLESS
    identities = [run(pair, operator, basis, head(0))] if spectral else []
    if operator in ("rotate", "interpolate", "remove_outside", "remove_inside", "random_rotation", "noise"):
        identities.append(run(pair, operator, basis, head(0.5), dose=0.0))
    if operator not in CONTROLS:
        same = Pair(MatrixView.of(target.clone()), pair.target)
        identities += [run(same, operator, basis, window) for window in (head(0.5), FULL)]
    for found in identities:
        assert found.tensor is target
        assert (found.change_norm, found.orthogonality_defect) == (0.0, 0.0)


@given(
    st.sampled_from(KINDS), st.tuples(st.integers(1, 14), st.integers(1, 14)), st.sampled_from(WINDOWS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(0.0, 1.0),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_edit_writes_to_what_it_reads(
    kind: tuple[str, str], shape: tuple[int, int], window: Window, dtype: torch.dtype, dose: float
) -> None:
    pair = drifted(*shape, seed=20, dtype=dtype)
    before = [tensor.clone() for tensor in tensors(pair)]
    dosed = {"dose": dose} if kind[0] in ("rotate", "interpolate", "remove_outside", "remove_inside", "noise") else {}
    found = run(pair, *kind, window, **dosed)
    again = run(pair, *kind, window, **dosed)
    assert all(torch.equal(*both) for both in zip(before, tensors(pair), strict=True))
    assert torch.equal(found.tensor, again.tensor)
    assert found.tensor.shape == shape
    assert found.tensor.dtype == dtype
    assert bool(found.tensor.isfinite().all())
    if kind[0] in ("directions", "values"):
        wide = torch.linalg.svdvals(found.tensor.to(torch.float64))
        mine, theirs = pair.target.factors().values, pair.reference.factors().values
        expected = theirs if kind[1] in ("sigma", "all") else mine
        inside = torch.zeros(min(shape), dtype=torch.bool)
        inside[columns(window, min(shape))] = True
        bound = 20 * torch.finfo(dtype).eps * float(mine.norm() + theirs.norm())
        mixed = torch.where(inside, expected, mine).sort(descending=True).values
        torch.testing.assert_close(wide, mixed, atol=bound, rtol=0)


def test_spans_at_right_angles_are_swapped_cleanly() -> None:
    target = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    pair = Pair(MatrixView.of(target.flip(0).flip(1).contiguous()), MatrixView.of(target))
    found = run(pair, "directions", "uv", head(2)).tensor
    torch.testing.assert_close(torch.linalg.svdvals(found), target.diagonal())
    torch.testing.assert_close(found[2:, 2:], torch.diag(torch.tensor([3.0, 4.0])))


def test_windows_of_whole_ranks_leave_small_matrices() -> None:
    pair = drifted(12, 9, seed=21)
    assert run(pair, "directions", "uv", band(9, 20)).tensor is tensors(pair)[1]
    assert run(pair, "directions", "uv", head(50), official=True).tensor is tensors(pair)[0]


def test_few_columns_are_read() -> None:
    """A window's cost in reading is its own width, or that of what lies outside when this is less."""
    pair = drifted(40, 40, seed=22)
    asked: list[int] = []

    class Counting:
        def __init__(self, view: MemoryFactors) -> None:
            self._view = view

        def __getattr__(self, name: str) -> object:
            return getattr(self._view, name)

        def left(self, columns: slice) -> Tensor:
            asked.append(columns.stop - columns.start)
            return self._view.left(columns)

        def right(self, columns: slice) -> Tensor:
            asked.append(columns.stop - columns.start)
            return self._view.right(columns)

    views = [Counting(view.factors()) for view in (pair.reference, pair.target)]  # type: ignore[arg-type]
    counted = Pair(*(MatrixView(tensor, lambda v=view: v) for tensor, view in zip(
        (pair.reference.tensor, pair.target.tensor), views, strict=True)))  # type: ignore[misc]  # fmt: skip
    for window in (head(resolve_k(0.2, 40)), ends(5, 3)):
        for operator, most in (("directions", 8 * 4), ("values", 8 * 2), ("rotate", 8 * 4)):
            asked.clear()
            run(counted, operator, "", window)
            assert sum(asked) == most
    for operator in ("swap", "interpolate", "noise", "reset"):
        asked.clear()
        run(counted, operator, dose=1.0)
        assert asked == []


def test_vectors_are_reset_and_interpolated_only() -> None:
    pair = Pair(MatrixView.of(torch.zeros(4)), MatrixView.of(torch.ones(4)))
    assert run(pair, "reset").tensor.tolist() == [0.0] * 4
    assert run(pair, "interpolate", dose=0.25).tensor.tolist() == [0.75] * 4
    with pytest.raises(UserError, match=r"tensor weight is \[4\]"):
        run(pair, "directions")


def test_other_shapes_are_refused() -> None:
    pair = Pair(MatrixView.of(torch.zeros(4, 3)), MatrixView.of(torch.ones(4, 4)))
    with pytest.raises(UserError, match=r"tensor weight is \[4, 3\] in base but \[4, 4\] in sft_end"):
        run(pair, "swap")


@pytest.mark.parametrize(("scale", "dtype"), [(1e-25, torch.float32), (1e-200, torch.float64), (1e-38, torch.bfloat16)])
def test_the_smallest_changes_have_a_size(scale: float, dtype: torch.dtype) -> None:
    one = torch.full((4, 5), scale, dtype=dtype)
    assert distance(2 * one, one) == pytest.approx(math.sqrt(20) * scale, rel=0.01)
    assert length(one) == pytest.approx(math.sqrt(20) * scale, rel=0.01)
    assert distance(one, one) == 0.0
    swap = Edit("swap", "all", "base", "sft_end", Scope())
    assert apply_edit(swap, Pair(MatrixView.of(2 * one), MatrixView.of(one)), name="x").change_norm > 0
