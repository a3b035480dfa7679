"""Controls in weights of narrow types have the norm of the edit after rounding, where there is such a change."""

from __future__ import annotations

import math

import pytest
import torch

from rlheals.restoration.controls import controls_of
from rlheals.restoration.edit import FULL, Edit, Scope, Window, head
from rlheals.restoration.job import MatrixView, distance
from rlheals.restoration.matching import CLOSE, of_norm
from rlheals.restoration.operators import Pair, apply_edit
from tests.restoration.pairs import tensors

NARROW = [torch.bfloat16, torch.float16]


def tuned(dtype: torch.dtype, drift: float, size: int = 96) -> Pair:
    """A reference, and a target this relative norm away, both as they are after rounding."""
    draw = torch.Generator().manual_seed(1)
    reference = (torch.randn(size, size, generator=draw) * 0.02).to(dtype)
    target = (reference.float() + 0.02 * drift * torch.randn(size, size, generator=draw)).to(dtype)
    return Pair(MatrixView.of(reference), MatrixView.of(target))


def ratios(pair: Pair, operator: str, basis: str, window: Window) -> dict[str, float]:
    """How large each control is, relative to the edit."""
    edit = Edit(operator, basis, "base", "sft_end", Scope(), window)
    norm = apply_edit(edit, pair, name="x").change_norm
    found = controls_of(edit, {"x": norm}, {"x": distance(*tensors(pair))})
    return {each.operator: apply_edit(each, pair, name="x").change_norm / norm for each in found}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("drift", [0.0005, 0.002, 0.01])
@pytest.mark.parametrize(
    ("operator", "basis", "window"),
    [("directions", "uv", FULL), ("values", "sigma", FULL), ("remove_inside", "uv", head(0.2))],
)
def test_rounding_does_not_change_a_control(
    dtype: torch.dtype, drift: float, operator: str, basis: str, window: Window
) -> None:
    found = ratios(tuned(dtype, drift), operator, basis, window)
    for control in ("noise", "random_rotation"):
        assert found.get(control, 1.0) == pytest.approx(1.0, rel=0.01)
    if drift > 0.002:  # below, the two models are a few numbers apart, and a step has no more sizes than that
        assert found["interpolate"] == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_noise_by_a_dose_has_the_norm_of_the_drift(dtype: torch.dtype) -> None:
    pair = tuned(dtype, 0.001)
    edit = Edit("noise", "all", "base", "sft_end", Scope(), dose=0.5)
    wanted = 0.5 * distance(*tensors(pair))
    assert apply_edit(edit, pair, name="x").change_norm == pytest.approx(wanted, rel=0.01)


def test_a_step_that_rounding_forbids_is_the_nearest_there_is() -> None:
    """Numbers that are neighbours have nothing between them: all of the way, or nothing of it."""
    target = torch.full((8, 8), 1.0, dtype=torch.bfloat16)
    reference = torch.nextafter(target, torch.full_like(target, 2.0))
    pair = Pair(MatrixView.of(reference), MatrixView.of(target))
    whole = distance(reference, target)
    for share, expected in ((0.3, 0.0), (0.7, whole)):
        step = Edit("interpolate", "all", "base", "sft_end", Scope(), control_of="x", amounts=(("x", share),))
        assert apply_edit(step, pair, name="x").change_norm == expected


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e3])
def test_the_amount_is_found_from_anywhere(start: float) -> None:
    target = torch.zeros(50)
    draw = torch.randn(50, generator=torch.Generator().manual_seed(0))
    found = of_norm(lambda amount: draw * math.sqrt(amount), target, 3.0, start)
    assert distance(found, target) == pytest.approx(3.0, rel=CLOSE)


def test_no_change_is_the_target_and_too_large_a_one_is_the_most() -> None:
    target = torch.zeros(4)
    assert of_norm(lambda amount: target + amount, target, 0.0, 1.0) is target
    assert torch.equal(of_norm(lambda amount: target + amount, target, 9.0, 1.0, most=2.0), target + 2.0)
