from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rlheals.inference import Sampling
from rlheals.inference.choose import choose_tokens, uniform_streams


def sampling(**values: float) -> Sampling:
    return Sampling(max_new_tokens=1, temperature=1.0, **values)


def reference_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Plain NumPy, one row, written from the definition: temperature, then top-k, then top-p."""
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = list(order[:top_k]) if top_k else list(order)
    total, nucleus, mass = probabilities[kept].sum(), [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += probabilities[token] / total
        if mass >= top_p:
            break
    result = np.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.3, 5, 0.8)]
)
def test_frequencies_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=12) * 2
    draws = 20_000
    rule = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = torch.from_numpy(np.random.default_rng(1).random(draws))
    tokens = choose_tokens(torch.tensor(logits).expand(draws, -1), rule, uniforms).numpy()
    expected = reference_distribution(logits, temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert chisquare(counts[possible], expected[possible] * draws).pvalue > 1e-3


@given(
    st.lists(st.floats(-50, 50, width=16, allow_subnormal=False), min_size=2, max_size=30),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 5),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_only_possible_tokens_are_drawn(row: list[float], uniform: float, top_k: int, top_p: float) -> None:
    token = int(
        choose_tokens(torch.tensor([row]), sampling(top_k=top_k, top_p=top_p), torch.tensor([uniform]).double())
    )
    assert 0 <= token < len(row)
    if top_k:
        assert row[token] >= sorted(row, reverse=True)[min(top_k, len(row)) - 1]


def test_the_largest_uniform_never_draws_a_filtered_token() -> None:
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(choose_tokens(torch.tensor([[5.0, 4.0, 3.0, 2.0]]), sampling(top_k=2), last)) == 1


def test_top_p_zero_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(9, -1)
    assert choose_tokens(logits, sampling(top_p=0.0), torch.linspace(0, 0.99, 9).double()).tolist() == [1] * 9


def test_streams_depend_on_seed_and_row_only() -> None:
    both = uniform_streams(3, [5, 900], 8)
    assert torch.equal(uniform_streams(3, [900], 8)[0], both[1])
    assert torch.equal(uniform_streams(3, [5], 4)[0], both[0, :4])
    assert not torch.equal(uniform_streams(4, [5], 8)[0], both[0])
    assert len({float(value) for value in both.flatten()}) == 16
