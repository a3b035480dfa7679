"""Groups of singular values, and that grouping by twice the change's norm identifies what it says."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.spectra.clusters import clusters, degenerate_clusters, stretch_coordinates
from rlheals.spectra.factors import MemoryFactors
from rlheals.spectra.norms import spectral_norm
from tests.spectra.planted import matrix, noise


def as_pairs(groups):
    return [(group.start, group.stop) for group in groups]


def test_values_closer_than_the_distance_share_a_group():
    values = torch.tensor([9.0, 8.9, 8.8, 5.0, 2.0, 1.95, 0.05])
    assert as_pairs(clusters(values, 0.2)) == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert as_pairs(clusters(values, 0.0)) == [(i, i + 1) for i in range(7)]
    assert as_pairs(clusters(values, 10.0)) == [(0, 7)]
    assert clusters(values[:0], 1.0) == []


def test_values_next_to_zero_are_one_group_unless_the_matrix_is_square():
    values = torch.tensor([9.0, 4.0, 0.9, 0.1])
    assert as_pairs(clusters(values, 0.5, square=True)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert as_pairs(clusters(torch.tensor([9.0, 0.5, 0.0]), 0.5, square=False)) == [(0, 1), (1, 3)]
    assert as_pairs(clusters(torch.tensor([0.5, 0.0]), 0.5, square=False)) == [(0, 2)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0, 3), st.booleans())
def test_groups_cover_every_rank_once_and_are_apart(values, distance, square):
    ordered = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    groups = clusters(ordered, distance, square=square)
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(len(values)))
    for group, following in pairwise(groups):
        assert float(ordered[group.stop - 1] - ordered[following.start]) > distance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 0))
def test_groups_apart_by_twice_the_changes_norm_keep_their_ranks(seed, exponent):
    weight = noise(12, 12, seed)
    change = 10**exponent * noise(12, 12, seed + 1)
    before, after = MemoryFactors.of(weight), MemoryFactors.of(weight + change)
    size = spectral_norm(change)
    for group in clusters(before.values, 2 * size):
        spread = after.values[group]
        low, high = before.values[group.stop - 1] - size, before.values[group.start] + size
        assert float(low) - 1e-12 <= float(spread.min())
        assert float(spread.max()) <= float(high) + 1e-12


def test_only_equal_values_are_degenerate():
    spread = MemoryFactors.of(matrix(6, 5, torch.tensor([5.0, 4.0, 4.0 - 1e-6, 1.0, 0.5], dtype=torch.float64)))
    assert degenerate_clusters(spread) == []
    assert stretch_coordinates(spread) == 5
    equal = MemoryFactors.of(matrix(6, 5, torch.tensor([5.0, 4.0, 4.0, 4.0, 0.0], dtype=torch.float64)))
    assert as_pairs(degenerate_clusters(equal)) == [(1, 4)]
    assert stretch_coordinates(equal) == 5 + 3


def test_in_the_null_space_every_coordinate_is_a_stretch():
    rank_two = MemoryFactors.of(matrix(6, 5, torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64)))
    assert as_pairs(degenerate_clusters(rank_two)) == [(2, 5)]
    assert stretch_coordinates(rank_two) == 2 + 9
    assert stretch_coordinates(MemoryFactors.of(torch.zeros(4, 3))) == 9
