from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from rlheals.spectra.random_law import (
    RandomLawWarning,
    looks_untrained,
    marchenko_pastur_cdf,
    marchenko_pastur_edges,
)
from tests.spectra.synthetic import trained_like

SHAPES = [(32, 32), (64, 64), (32, 128), (128, 384), (384, 128), (224, 128)]


def fresh(shape: tuple[int, int], seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def quantiles(shape: tuple[int, int], std: float) -> torch.Tensor:
    """Singular values at the mid-ranks of the Marchenko-Pastur law, found by bisection."""
    low, high = marchenko_pastur_edges(shape, std)
    grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
    rank = min(shape)
    at = torch.searchsorted(
        marchenko_pastur_cdf(grid, shape, std), (torch.arange(rank, dtype=torch.float64) + 0.5) / rank
    )
    return grid[at.clamp(max=200_000)].flip(0)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (100, 10), (1000, 3)])
def test_distribution_is_the_integral_of_the_density(shape: tuple[int, int]) -> None:
    """Oracle: the textbook density of the squares, integrated by SciPy."""
    c = min(shape) / max(shape)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * c * x)

    squares = np.linspace(low, high, 9)[1:-1]
    expected = [integrate.quad(density, low, x, limit=200)[0] for x in squares]
    values = torch.tensor(np.sqrt(squares * max(shape)) * 0.02)
    assert marchenko_pastur_cdf(values, shape, 0.02).tolist() == pytest.approx(expected, abs=1e-5)
    outside = torch.tensor([0.0, 10.0], dtype=torch.float64)
    assert marchenko_pastur_cdf(outside, shape, 0.02).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_matrices_match(shape: tuple[int, int]) -> None:
    for seed in range(10):
        law = looks_untrained(torch.linalg.svdvals(fresh(shape, seed)), shape, 0.02)
        assert law is not None
        assert law.distance < 0.13


def test_storage_as_bfloat16_changes_nothing() -> None:
    weight = fresh((128, 128)).bfloat16().float()
    assert looks_untrained(torch.linalg.svdvals(weight), (128, 128), 0.02) is not None


def test_order_of_the_values_does_not_matter() -> None:
    values = torch.linalg.svdvals(fresh((64, 64)))
    assert looks_untrained(values.flip(0), (64, 64), 0.02) == looks_untrained(values, (64, 64), 0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.016, 0.025])
def test_another_scale_does_not_match(shape: tuple[int, int], std: float) -> None:
    assert looks_untrained(torch.linalg.svdvals(fresh(shape, std=std)), shape, 0.02) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_another_distribution_of_the_same_norm_does_not_match(shape: tuple[int, int]) -> None:
    weight = trained_like("any", shape, 0)
    weight *= 0.02 * math.sqrt(math.prod(shape)) / weight.norm()
    assert looks_untrained(torch.linalg.svdvals(weight), shape, 0.02) is None


def test_one_large_direction_is_enough_not_to_match() -> None:
    values = torch.linalg.svdvals(fresh((256, 256)))
    values[0] *= 1.5
    assert looks_untrained(values, (256, 256), 0.02) is None


def test_flat_spectrum_of_the_same_norm_and_edge_does_not_match() -> None:
    """Only the comparison of whole distributions can tell this one."""
    values = quantiles((256, 256), 0.02)
    values[1:] = values[1:].square().mean().sqrt()
    assert looks_untrained(values, (256, 256), 0.02) is None


@pytest.mark.parametrize(
    ("shape", "found", "edge"),
    [((4096, 4096), (0.0, 2.553), (0.0, 2.56)), ((1024, 4096), (0.64, 1.92), (0.64, 1.92))],
    ids=["published Q", "published K and V"],
)
def test_published_llama_spectra_are_recognised(
    shape: tuple[int, int], found: tuple[float, float], edge: tuple[float, float]
) -> None:
    """The figures' edges are those of N(0, 0.02²), and quantiles of that law with the figure's largest value match."""
    assert marchenko_pastur_edges(shape, 0.02) == pytest.approx(edge, abs=5e-4)
    values = quantiles(shape, 0.02)
    values[0] = found[1]
    law = looks_untrained(values, shape, 0.02)
    assert law is not None
    assert (law.smallest, law.largest) == pytest.approx(found, abs=0.005)
    # A trained matrix of such a model: Qwen's first layer has a largest value of 22.884.
    values[0] = 22.884
    assert looks_untrained(values, shape, 0.02) is None


def test_small_zero_and_unscaled_matrices_are_not_judged() -> None:
    assert looks_untrained(torch.linalg.svdvals(fresh((16, 64))), (16, 64), 0.02) is None
    assert looks_untrained(torch.zeros(64), (64, 64), 0.02) is None
    assert looks_untrained(torch.ones(64), (64, 64), 0.0) is None


def test_warning_names_tensor_and_law() -> None:
    law = looks_untrained(torch.linalg.svdvals(fresh((64, 64))), (64, 64), 0.02)
    assert law is not None
    assert law.text.startswith("matches the random law of its initialiser (N(0, 0.02²)), so its weights were ")
    with pytest.warns(RandomLawWarning, match=r"model\.layers\.0\.mlp\.up_proj\.weight matches the random law"):
        law.warn("model.layers.0.mlp.up_proj.weight")
