"""Every measure against its definition on small matrices, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.spectra.angles import principal_angles
from rlheals.spectra.drift import Key, MeasureSettings, embedding_head_angles, measure, thinned
from rlheals.spectra.factors import MemoryFactors
from rlheals.spectra.norms import frobenius, spectral_norm
from tests.spectra.planted import basis, matrix, noise, plane_turn, spectrum

SETTINGS = MeasureSettings(ks=(4, 0.5))


def measured(base, tuned, chosen=SETTINGS):
    """Values by key; the change in float64."""
    views = [MemoryFactors.of(each) for each in (base, tuned)]
    return {each.key: each.value for each in measure(*views, tuned - base, chosen)}


@pytest.fixture(params=[(20, 20), (16, 30), (30, 16)], ids=str)
def pair(request):
    base = noise(*request.param, 1)
    return base, base + 0.1 * noise(*request.param, 2)


def test_scalars_follow_their_definitions(pair):
    base, tuned = pair
    change, values = tuned - base, measured(*pair)
    before, after = (torch.linalg.svdvals(each) for each in pair)
    norms = {name: float(torch.linalg.matrix_norm(change, ord)) for name, ord in (("f", "fro"), ("2", 2))}
    expected = {
        "weyl_ratio": float((after - before).abs().max()) / norms["2"],
        "sigma_change_norm": float((after - before).norm()) / norms["f"],
        "relative_change": norms["f"] / float(base.norm()),
        "energy_change": float(tuned.norm() / base.norm()) - 1,
        "stable_rank_before": float(base.norm() / before[0]) ** 2,
        "stable_rank_after": float(tuned.norm() / after[0]) ** 2,
        "stable_rank_of_change": (norms["f"] / norms["2"]) ** 2,
    }
    for name, value in expected.items():
        assert values[Key(name)] == pytest.approx(value, rel=1e-9), name
    assert values[Key("weyl_ratio")] <= 1
    assert values[Key("sigma_change_norm")] <= 1
    for index in (0, 7, 15):
        assert values[Key("sigma_before", index=index)] == pytest.approx(float(before[index]))
        assert values[Key("sigma_after", index=index)] == pytest.approx(float(after[index]))
        assert values[Key("sigma_change", index=index)] == pytest.approx(float(after[index] - before[index]), abs=1e-12)
        relative = float(after[index] / before[index]) - 1
        assert values[Key("sigma_relative_change", index=index)] == pytest.approx(relative, abs=1e-10)


def test_shares_of_energy_follow_their_definitions(pair):
    base, tuned = pair
    values = measured(*pair)
    left, _, right = torch.linalg.svd(base, full_matrices=False)
    inside = left.mT @ (tuned - base) @ right.mT
    total = float((tuned - base).square().sum())
    stretch = float(inside.diagonal().square().sum()) / total
    assert values[Key("stretch_share")] == pytest.approx(stretch)
    assert values[Key("rotation_share")] == pytest.approx(1 - stretch)
    for k in (4, base.shape[0] // 2 if base.shape[0] <= base.shape[1] else base.shape[1] // 2):
        corner = inside[:k, :k] - inside[:k, :k].diagonal().diag()
        assert values[Key("block_share", "", "top", k)] == pytest.approx(float(corner.square().sum()) / total)


def test_angles_and_their_summaries_belong_together(pair):
    values = measured(*pair)
    sides = [torch.linalg.svd(each, full_matrices=False) for each in pair]
    rank = min(pair[0].shape)
    for part, span in {"top": slice(0, 4), "bottom": slice(rank - 4, rank)}.items():
        expected = principal_angles(sides[0][0][:, span], sides[1][0][:, span])
        found = [values[Key("angle", "left", part, 4, index)] for index in range(4)]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)
        assert values[Key("angle_mean", "left", part, 4)] == pytest.approx(float(expected.mean()))
        assert values[Key("angle_max", "left", part, 4)] == pytest.approx(float(expected.max()))
        assert values[Key("angle_min", "left", part, 4)] == pytest.approx(float(expected.min()))
        rms = math.sqrt(float(expected.sin().square().mean()))
        assert values[Key("angle_rms_sine", "left", part, 4)] == pytest.approx(rms)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_scaling_and_transposition_change_nothing_but_the_sides(seed, scale):
    base = noise(10, 14, seed)
    tuned = base + 0.1 * noise(10, 14, seed + 1)
    chosen = MeasureSettings(ks=(3,))
    plain, scaled = measured(base, tuned, chosen), measured(scale * base, scale * tuned, chosen)
    other = {"left": "right", "right": "left", "": ""}
    transposed = measured(base.mT, tuned.mT, chosen)
    for key, value in plain.items():
        unit = scale if key.quantity in ("sigma_before", "sigma_after", "sigma_change") else 1.0
        assert scaled[key] == pytest.approx(unit * value, rel=1e-6, abs=1e-7 * unit)
        mirrored = Key(key.quantity, other[key.side], key.part, key.k, key.index)
        assert transposed[mirrored] == pytest.approx(value, rel=1e-6, abs=1e-7)


def test_identical_matrices_have_drifted_nowhere():
    base = noise(12, 18, 0)
    values = measured(base, base)
    moved = ("angle", "sigma_change", "vector_angle", "intruders", "relative_change", "energy_change", "weyl_ratio")
    assert values[Key("vectors_identified")] == 1.0
    for key, value in values.items():
        if key.quantity.startswith(moved):
            assert abs(value) < 1e-6, key


def test_pure_scaling_is_all_stretch():
    base = noise(12, 18, 0)
    values = measured(base, 1.1 * base)
    assert values[Key("stretch_share")] == pytest.approx(1.0)
    assert values[Key("block_share", "", "top", 4)] == pytest.approx(0.0, abs=1e-12)
    assert values[Key("energy_change")] == pytest.approx(0.1)


def test_vectors_are_compared_one_by_one_only_where_their_values_stand_apart():
    gaps = torch.tensor([9.0, 7.0, 5.0, 4.99, 4.98, 2.0, 1.99, 0.3], dtype=torch.float64)
    left, right = (basis(8, 8, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    inside = plane_turn(8, [(2, 3)], [1.2])  # turning both sides alike hardly changes a matrix of equal values
    base = (left * gaps) @ right.mT
    tuned = (left @ plane_turn(8, [(0, 1)], [0.03]) @ inside * gaps) @ (right @ inside).mT
    assert 0.2 < spectral_norm(tuned - base) < 0.4
    values = measured(base, tuned)
    assert values[Key("vectors_identified")] == pytest.approx(3 / 8)
    assert {key.index for key in values if key.quantity == "vector_angle"} == {0, 1, 7}
    assert values[Key("vector_angle", "left", index=0)] == pytest.approx(0.03, abs=1e-6)
    assert values[Key("vector_angle", "right", index=0)] == pytest.approx(0.0, abs=1e-6)
    found = {(key.index, key.k) for key in values if key.quantity == "cluster_angle"}
    assert found == {(2, 3), (5, 2)}
    assert values[Key("cluster_angle", "left", k=3, index=2)] == pytest.approx(0.0, abs=1e-6)


def test_a_turned_vector_that_no_base_vector_resembles_is_an_intruder():
    base = matrix(40, 40, spectrum(40, 4, gap=1.0))
    generator = torch.Generator().manual_seed(3)
    left, right = basis(40, 1, generator), basis(40, 1, generator)
    tuned = base + 20 * left @ right.mT
    values = measured(base, tuned)
    assert values[Key("intruders", "left", "top", 4)] == 0.25
    before, after = (torch.linalg.svd(each)[2] for each in (base, tuned))
    best = (before @ after[:20].mT).abs().amax(0)
    assert values[Key("intruders", "right", "top", 20)] == pytest.approx(float((best < 0.6).double().mean()))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 2))
def test_the_split_inside_equal_values_does_not_depend_on_the_vectors_chosen(seed, value):
    """Inside a group of equal values the symmetric part is stretch and the antisymmetric one rotation."""
    generator = torch.Generator().manual_seed(seed)
    left, right = basis(9, 6, generator), basis(7, 6, generator)
    values = torch.tensor([4.0, value, value, value, value, 0.1], dtype=torch.float64)
    base, square = (left * values) @ right.mT, noise(4, 4, seed)
    symmetric, skew = (square + square.mT) / 2, (square - square.mT) / 2
    for inside, share in ((symmetric, 1.0), (skew, 0.0)):
        change = left[:, 1:5] @ inside @ right[:, 1:5].mT
        assert measured(base, base + 1e-3 * change)[Key("stretch_share")] == pytest.approx(share, abs=1e-9)


def test_everything_that_fills_the_null_space_is_a_stretch():
    base = torch.zeros(5, 4, dtype=torch.float64)
    base[0, 0] = 3.0
    change = torch.zeros_like(base)
    change[2, 1:], change[3, 2] = 1.0, -2.0
    left, _, right = torch.linalg.svd(base, full_matrices=False)
    inside = frobenius(left[:, 1:].mT @ change @ right[1:].mT) ** 2 / frobenius(change) ** 2
    values = measured(base, base + change, MeasureSettings(ks=(1, 2)))
    assert values[Key("stretch_share")] == pytest.approx(inside)
    assert Key("sigma_relative_change", index=0) in values
    assert Key("sigma_relative_change", index=1) not in values  # a share of nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_in_low_precision_is_measured_in_float32(dtype):
    base = noise(12, 18, 0)
    change = noise(12, 18, 1).to(dtype)
    views = [MemoryFactors.of(base), MemoryFactors.of(base + change.double())]
    low = {each.key: each.value for each in measure(*views, change, SETTINGS)}
    high = {each.key: each.value for each in measure(*views, change.double(), SETTINGS)}
    for key, value in high.items():
        assert low[key] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_curves_are_thinned_evenly_with_both_ends():
    assert thinned(1000, 5) == [0, 250, 500, 749, 999]
    base = noise(30, 30, 0)
    values = measured(base, base + noise(30, 30, 1), MeasureSettings(ks=(20,), curve_points=4))
    assert [key.index for key in values if key.quantity == "sigma_after"] == [0, 10, 19, 29]
    assert [key.index for key in values if key == Key("angle", "left", "top", 20, key.index)] == [0, 6, 13, 19]


def test_a_k_above_the_rank_is_refused():
    base = noise(5, 9, 0)
    with pytest.raises(UserError, match="rank at most 5"):
        measured(base, base, MeasureSettings(ks=(6,)))


def test_keys_are_unique(pair):
    views = [MemoryFactors.of(each) for each in pair]
    keys = [each.key for each in measure(*views, pair[1] - pair[0], SETTINGS)]
    assert len(keys) == len(set(keys))


class Watched(MemoryFactors):
    """Counts the widest slice that is read at a time."""

    def left(self, columns):
        self.widest.append(columns.stop - columns.start)
        return super().left(columns)

    right = left


def test_at_most_half_a_basis_is_read_at_a_time_for_k_up_to_half_the_rank(monkeypatch):
    monkeypatch.setattr("rlheals.spectra.angles.BLOCK", 4)
    base = noise(40, 40, 0)
    views = [Watched(MemoryFactors.of(each).factors) for each in (base, base + noise(40, 40, 1))]
    for view in views:
        object.__setattr__(view, "widest", [])
    measure(*views, noise(40, 40, 1), MeasureSettings(ks=(0.25, 0.5)))
    assert max(max(view.widest) for view in views) <= 20


def test_embedding_and_head_are_compared_in_the_hidden_space():
    embedding, head = noise(50, 12, 0), noise(40, 12, 1)
    views = [MemoryFactors.of(each) for each in (embedding, head)]
    found = {each.key: each.value for each in embedding_head_angles(*views, MeasureSettings(ks=(3,)), "after")}
    expected = principal_angles(views[0].right(slice(0, 3)), views[1].right(slice(0, 3)))
    curve = [found[Key("embedding_head_angle_after", "right", "top", 3, index)] for index in range(3)]
    np.testing.assert_allclose(curve, expected.numpy(), atol=1e-9)
    assert found[Key("embedding_head_angle_mean_after", "right", "top", 3)] == pytest.approx(float(expected.mean()))
    tied = embedding_head_angles(views[0], views[0], MeasureSettings(ks=(3,)), "before")
    assert max(each.value for each in tied) < 1e-6


@pytest.mark.parametrize("shape", [(600, 600), (540, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectral_norm_of_large_matrices_is_lapacks(shape, dtype):
    for weight in (noise(*shape, 0), matrix(*shape, torch.linspace(2, 1, 530, dtype=torch.float64))):
        expected = float(torch.linalg.matrix_norm(weight, 2))
        assert spectral_norm(weight.to(dtype)) == pytest.approx(expected, rel=1e-5)
    rank_one = noise(shape[0], 1, 0) @ noise(1, shape[1], 1)
    assert spectral_norm(rank_one.to(dtype)) == pytest.approx(float(rank_one.norm()), rel=1e-5)
    assert spectral_norm(torch.zeros(shape, dtype=dtype)) == 0.0
