"""Null bands against closed forms and against brute force: a real base plus real noise, real random bases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from rlheals.spectra.angles import principal_angles
from rlheals.spectra.drift import Key, MeasureSettings, measure, series
from rlheals.spectra.factors import MemoryFactors
from rlheals.spectra.nulls import (
    embedding_head_bands,
    jacobi_edges,
    random_angles,
    random_subspace_bands,
    random_vector_band,
    same_norm_bands,
)
from tests.spectra.planted import basis, noise

SETTINGS = MeasureSettings(ks=(3, 0.5))


@pytest.mark.parametrize(("k", "degrees"), [(512, 48.6), (768, 38.7), (1024, 30.0)])
def test_the_published_curves_start_where_random_subspaces_do(k, degrees):
    f = k / 4096
    assert math.degrees(math.acos(math.sqrt(4 * f * (1 - f)))) == pytest.approx(degrees, abs=0.05)
    assert math.degrees(jacobi_edges(4096, k, k)[0]) == pytest.approx(degrees, abs=0.05)
    drawn = np.degrees(random_angles(4096, k, k, 3, seed=0)[:, 0])
    assert np.abs(drawn - degrees).max() < 0.7


def test_more_than_half_the_space_overlaps_by_count():
    drawn = random_angles(1024, 768, 768, 2, seed=0)
    assert (drawn[:, :512] == 0).all()
    assert (drawn[:, 512:] > 0).all()
    assert jacobi_edges(1024, 768, 768)[0] == 0.0


@pytest.mark.parametrize(
    ("n", "k", "l"), [(12, 3, 3), (12, 2, 5), (12, 5, 2), (9, 6, 7), (8, 4, 4), (6, 1, 2), (5, 5, 3)]
)
def test_sampled_angles_follow_the_law_of_real_random_bases(n, k, l):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    real = np.stack([principal_angles(basis(n, k, generator), basis(n, l, generator)).numpy() for _ in range(800)])
    drawn = random_angles(n, k, l, 4000, seed=1)
    for index in range(min(k, l)):
        if drawn[:, index].max() == 0:
            assert real[:, index].max() < 1e-6
        else:
            assert ks_2samp(real[:, index], drawn[:, index]).pvalue > 1e-3
    assert np.square(np.sin(drawn)).mean() == pytest.approx(1 - max(k, l) / n, abs=0.02)


def test_bands_of_random_lines_and_subspaces_hold_95_percent_of_real_ones():
    generator = torch.Generator().manual_seed(0)
    band = random_vector_band(20)
    lines = [float(principal_angles(basis(20, 1, generator), basis(20, 1, generator))) for _ in range(1500)]
    assert np.mean([band.low <= angle <= band.high for angle in lines]) == pytest.approx(0.95, abs=0.02)
    bands = random_subspace_bands((20, 30), MeasureSettings(ks=(4,)))
    inside = []
    for _ in range(400):
        angles = principal_angles(basis(30, 4, generator), basis(30, 4, generator))
        band = bands[Key("angle_mean", "right", "top", 4)]
        inside.append(band.low <= float(angles.mean()) <= band.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize("shape", [(24, 24), (20, 30), (16, 60), (60, 16)])
def test_unrelated_matrices_lie_within_the_random_bands(shape):
    inside = []
    for seed in range(6):
        base, tuned = (MemoryFactors.of(noise(*shape, 2 * seed + i)) for i in (0, 1))
        measures = measure(base, tuned, noise(*shape, 0), SETTINGS)
        bands = random_subspace_bands(shape, SETTINGS, [each.key for each in measures])
        pairs = [(each, bands[each.key]) for each in measures if each.key in bands]
        expected = [each.quantity for each in measures if each.quantity.startswith(("angle", "cluster", "intr"))]
        assert len(pairs) == len([name for name in expected if name != "angle_error_bound"])
        inside += [band.low - 1e-6 <= each.value <= band.high + 1e-6 for each, band in pairs]
    assert np.mean(inside) > 0.9


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (10, 40), (40, 10)])
def test_the_shortcut_in_the_bases_own_basis_agrees_with_real_noise_on_a_real_base(shape):
    """Tall and wide shapes are compressed; the law of every measure must not notice."""
    base = noise(*shape, 0)
    base[:, 0] *= 6  # a vector that stands apart
    view = MemoryFactors.of(base)
    norm, spectral = 0.05 * float(base.norm()), 0.05 * float(base.norm()) / 2
    real = []
    for seed in range(60):
        change = noise(*shape, 100 + seed)
        change *= norm / change.norm()
        tuned = MemoryFactors.of(base + change)
        found = series(view, tuned, change, SETTINGS, spectral)
        real.append(dict(zip(found.keys(), found.vector(), strict=True)))
    bands = same_norm_bands(view, norm, SETTINGS, 60, 0, spectral=spectral)
    assert {key.quantity for key in real[0]} - {key.quantity for key in bands} == {
        "relative_change",
        "sigma_before",
        "stable_rank_before",
        "angle_error_bound",
    }
    inside, distances = [], []
    for key, band in bands.items():
        values = np.array([draw[key] for draw in real])
        inside.append(np.mean((values >= band.low - 1e-6) & (values <= band.high + 1e-6)))
        width = band.high - band.low
        if width > 1e-6 and band.low > 0:
            distances.append(abs(values.mean() - (band.low + band.high) / 2) / width)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)
    assert min(inside) > 0.75
    assert max(distances) < 0.25  # a quarter of a band is one standard deviation; the means' error is a fifth of it


def test_bands_are_seeded_and_absent_where_there_is_nothing_to_draw():
    view = MemoryFactors.of(noise(8, 12, 0))
    first, again, other = (same_norm_bands(view, 0.3, SETTINGS, 3, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert same_norm_bands(view, 0.3, SETTINGS, 0, 0) == {}
    assert same_norm_bands(view, 0.0, SETTINGS, 20, 0) == {}
    assert same_norm_bands(MemoryFactors.of(torch.zeros(5, 4)), 0.3, SETTINGS, 3, 0)


def test_large_draws_go_through_the_measured_drivers(monkeypatch):
    view = MemoryFactors.of(noise(24, 60, 0))
    expected = same_norm_bands(view, 0.01, SETTINGS, 3, 0)
    monkeypatch.setattr("rlheals.spectra.nulls.SMALL", 10)
    found = same_norm_bands(view, 0.01, SETTINGS, 3, 0, spectral=None)
    key = Key("angle_mean", "left", "top", 3)
    assert found.keys() == expected.keys()
    assert found[key].high == pytest.approx(expected[key].high, rel=0.9)


def test_unrelated_embedding_and_head_lie_within_their_band():
    bands = embedding_head_bands(12, 12, MeasureSettings(ks=(3,)), "after")
    a, b = (MemoryFactors.of(noise(50, 12, seed)).right(slice(0, 3)) for seed in (0, 1))
    band = bands[Key("embedding_head_angle_mean_after", "right", "top", 3)]
    assert band.low < float(principal_angles(a, b).mean()) < band.high
