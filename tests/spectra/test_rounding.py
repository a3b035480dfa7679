"""Rounding alone is no change, a change is one in any type: decided number by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from rlheals.spectra.drift import MeasureSettings, measure
from rlheals.spectra.factors import MemoryFactors
from rlheals.spectra.rounding import NONE, rounding_of
from rlheals.spectra.verdict import MAGNITUDE, ROTATION, UNCHANGED, Verdict, judge
from tests.spectra.planted import noise

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 40
SETTINGS = MeasureSettings(ks=(0.25,), parts=())
NARROW = [torch.bfloat16, torch.float16]


def heavy(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(2, (32, 48))).float()


def outlier_column(seed: int) -> Tensor:
    matrix = noise(32, 48, seed).float()
    matrix[:, 5] *= 60
    return matrix


def sparse(seed: int) -> Tensor:
    kept = torch.rand(32, 48, generator=torch.Generator().manual_seed(seed)) < 0.05
    return noise(32, 48, seed).float() * kept


def one_large(seed: int) -> Tensor:
    matrix = noise(32, 48, seed).float()
    matrix[0, 0] = 300.0
    return matrix


KINDS = {
    "gaussian": lambda seed: noise(32, 48, seed).float(),
    "student": heavy,
    "outlier column": outlier_column,
    "sparse": sparse,
    "uniform": lambda seed: torch.rand(32, 48, generator=torch.Generator().manual_seed(seed)),
    "rank one": lambda seed: (noise(32, 1, seed) @ noise(1, 48, seed + 1)).float(),
    "one large": one_large,
    "small": lambda seed: noise(8, 8, seed).float(),
}


def verdict(base: Tensor, tuned: Tensor) -> Verdict:
    view = MemoryFactors.of(base)
    measures = measure(view, MemoryFactors.of(tuned), tuned.double() - base.double(), SETTINGS)
    return judge(measures, view, rounding_of([(base, tuned)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_alone_is_never_a_change(kind: str, dtype: torch.dtype) -> None:
    for seed in range(DRAWS):
        base = KINDS[kind](seed)
        stored = base.to(dtype)
        for tuned in (stored, stored.float()):  # stored so, or gone through it and back
            found = verdict(base, tuned)
            assert found.verdict == UNCHANGED
            assert f"rounded to {str(dtype).removeprefix('torch.')}" in found.test


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_a_drift_far_below_the_rounding_of_the_base_is_a_change(
    kind: str, before: torch.dtype, after: torch.dtype
) -> None:
    """A base has no rounding error with respect to itself: the verdict hangs on the numbers, not on the file's type."""
    base = KINDS[kind](0).to(before).float()
    change = (noise(base.shape[0], 4, 1) @ noise(4, base.shape[1], 2)).float()
    tuned = (base + 0.0015 * change * base.norm() / change.norm()).to(after)
    found = verdict(base.to(before), tuned)
    assert found.verdict in (ROTATION, MAGNITUDE)
    assert found.p_value is not None
    assert found.p_value < 1e-3
    assert found.relative_change == pytest.approx(0.0015, rel=1e-3)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_change_stored_in_a_coarser_type_is_told_from_its_rounding(dtype: torch.dtype) -> None:
    base = noise(64, 96, 0).float()
    change = (noise(64, 4, 1) @ noise(4, 96, 2)).float()
    tuned = (base + 0.05 * change * base.norm() / change.norm()).to(dtype)
    found = rounding_of([(base, tuned)])
    missed = float((base.to(dtype).double() - base.double()).norm() / (tuned.double() - base.double()).norm())
    assert found.type == ""
    assert found.share == pytest.approx(missed, rel=1e-12)
    assert "rounding alone makes" in verdict(base, tuned).test


def test_one_number_off_is_a_change_however_many_are_rounded() -> None:
    base = noise(64, 64, 0).float()
    tuned = base.to(torch.bfloat16)
    assert rounding_of([(base, tuned)]).type == "bfloat16"
    tuned[3, 4] *= 1.01
    assert rounding_of([(base, tuned)]).type == ""


def test_blocks_give_what_the_whole_gives() -> None:
    base = noise(64, 64, 0).float().flatten()
    tuned = (base * 1.001).to(torch.bfloat16)
    whole, parts = rounding_of([(base, tuned)]), rounding_of(zip(base.split(100), tuned.split(100), strict=True))
    assert whole.type == parts.type
    assert whole.share == pytest.approx(parts.share, rel=1e-12)


def test_the_other_direction_excuses_nothing() -> None:
    tuned = noise(16, 16, 0).float()
    assert rounding_of([(tuned.to(torch.bfloat16), tuned)]) == NONE
    assert rounding_of([(tuned.to(torch.bfloat16).float(), tuned)]) == NONE
