import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.models.topology import read_topology
from rlheals.spectra import function_drift as module
from rlheals.spectra.function_drift import (
    Batch,
    change_norms,
    compare_states,
    function_drift,
    linear_cka,
    noise_bands,
    noisy_state,
    principal_components,
    read_states,
)
from rlheals.spectra.gauge import random_gauge
from tests.common import make_model, make_tokenizer

BATCHES = [
    Batch(torch.tensor([[5, 9, 40, 3, 8, 21], [7, 7, 2, 30, 0, 0]]), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])),
    Batch(torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18]]), torch.ones(1, 8, dtype=torch.int64)),
]
TOKENS = 18
SINGLES = [[5, 9, 40, 3, 8, 21], [7, 7, 2, 30], [11, 12, 13, 14, 15, 16, 17, 18]]


def tiny(family="llama", seed=0, dtype=torch.float64):
    return make_model(family, make_tokenizer(family), seed=seed).to(dtype)


def nudged(model, scale, seed=3, family="llama"):
    """A copy with Gaussian noise on every weight."""
    other = tiny(family, dtype=next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for old, new in zip(model.parameters(), other.parameters(), strict=True):
            new.copy_(old + scale * torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype))
    return other


def by_name(rows):
    return {(row.layer, row.quantity): row for row in rows}


def every_logit(model):
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in SINGLES])


def every_state(model, layer):
    with torch.inference_mode():
        runs = [model(input_ids=torch.tensor([ids]), output_hidden_states=True) for ids in SINGLES]
    return torch.cat([run.hidden_states[layer][0] for run in runs]).numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_distributions_are_those_of_each_text_alone(family, chunk, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", chunk)
    base = tiny(family)
    tuned = nudged(base, 0.05, family=family)
    found = by_name(function_drift(base, tuned, BATCHES))
    before, after = (torch.distributions.Categorical(logits=every_logit(model)) for model in (base, tuned))
    best = [d.probs.sort(-1, descending=True).values for d in (before, after)]
    expected = {
        "kl_base_tuned": torch.distributions.kl_divergence(before, after).mean(),
        "entropy_before": before.entropy().mean(),
        "entropy_after": after.entropy().mean(),
        "margin_before": (best[0][:, 0] - best[0][:, 1]).mean(),
        "margin_after": (best[1][:, 0] - best[1][:, 1]).mean(),
    }
    assert expected["kl_base_tuned"] > 0.01
    for quantity, value in expected.items():
        assert found[-1, quantity].value == pytest.approx(float(value), rel=1e-9), quantity
        assert found[-1, quantity].tokens == TOKENS


def test_hidden_states_are_the_embedding_the_blocks_and_the_last_normed_once():
    base = tiny()
    tuned = nudged(base, 0.05)
    states = read_states(base, BATCHES)
    assert len(states.hidden) == 3
    for layer in range(3):
        assert states.hidden[layer].numpy() == pytest.approx(every_state(base, layer), abs=1e-12)
    # base.lm_head of the last state is the model's own logits: a second norm would show here.
    assert torch.allclose(base.lm_head(states.hidden[-1].clone()), every_logit(base), atol=1e-12)
    found = by_name(compare_states(states, read_states(tuned, BATCHES)))
    for layer in range(3):
        x, y = every_state(base, layer), every_state(tuned, layer)
        centred = x - x.mean(0), y - y.mean(0)
        _, values, directions = np.linalg.svd(centred[0], full_matrices=False)
        other = np.linalg.svd(centred[1], full_matrices=False)[2]
        shift = (y.mean(0) - x.mean(0)) @ directions[:2].T / (values[:2] / math.sqrt(TOKENS))
        angles = scipy.linalg.subspace_angles(directions[:8].T, other[:8].T)
        assert found[layer, "pca_shift"].value == pytest.approx(np.linalg.norm(shift), rel=1e-6)
        assert found[layer, "pca_angle"].value == pytest.approx(angles.mean(), abs=1e-7)


def test_a_model_against_itself_and_against_its_gauge_has_no_drift():
    base = tiny()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    topology = read_topology(base.config.to_dict(), {name: tuple(tensor.shape) for name, tensor in state.items()})
    turned = tiny()
    turned.load_state_dict(random_gauge(state, topology, 0))
    for tuned in (base, turned):
        found = by_name(function_drift(base, tuned, BATCHES))
        assert abs(found[-1, "kl_base_tuned"].value) < 1e-12
        assert found[-1, "entropy_after"].value == pytest.approx(found[-1, "entropy_before"].value, abs=1e-12)
        for layer in range(3):
            assert found[layer, "cka"].value == pytest.approx(1, abs=1e-12)
            assert found[layer, "pca_shift"].value < 1e-10
            assert found[layer, "pca_angle"].value < 1e-6


def test_positions_are_bounded_and_spread_over_all_texts():
    base = tiny()
    few, every = read_states(base, BATCHES, positions=5), read_states(base, BATCHES)
    assert few.positions == 5
    assert torch.allclose(few.hidden[1], every.hidden[1][[0, 4, 8, 13, 17]], atol=1e-12)


def test_bands_hold_noise_of_that_norm_and_the_base_comes_back_bit_for_bit():
    base = tiny("qwen2", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = nudged(base, 0.02, family="qwen2")
    rows = function_drift(base, tuned, BATCHES, draws=12, seed=4)
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)
    alone = [row for row in rows if row.noise_low is None]
    assert {row.quantity for row in alone} == {"entropy_before", "margin_before"}
    inside = [row.noise_low <= row.value <= row.noise_high for row in rows if row.noise_low is not None]
    assert np.mean(inside) >= 0.8
    assert rows == function_drift(base, tuned, BATCHES, draws=12, seed=4)
    assert rows != function_drift(base, tuned, BATCHES, draws=12, seed=5)


def test_the_base_comes_back_when_a_draw_fails(monkeypatch):
    base = tiny()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    states = read_states(base, BATCHES)
    rows = compare_states(states, states)
    monkeypatch.setattr(module, "compare_states", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        noise_bands(rows, base, states, BATCHES, dict.fromkeys(before, 1.0), draws=2, seed=0)
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)


def test_noisy_state_is_full_has_the_norms_and_moves_tied_tensors_together():
    base = tiny("qwen2").state_dict()
    norms = {"model.embed_tokens.weight": 0.5, "model.layers.0.mlp.up_proj.weight": 2.0}
    noisy = noisy_state(base, norms, 1, tied={"lm_head.weight": "model.embed_tokens.weight"})
    assert noisy.keys() == base.keys()
    found = change_norms(base, noisy)
    expected = dict.fromkeys(base, 0.0) | norms | {"lm_head.weight": 0.5}
    assert found == pytest.approx(expected, rel=1e-9)
    assert torch.equal(noisy["lm_head.weight"], noisy["model.embed_tokens.weight"])
    again = noisy_state(base, {"model.layers.0.mlp.up_proj.weight": 2.0}, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again[name], noisy[name])


def test_noisy_state_keeps_the_dtype():
    base = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()}
    noisy = noisy_state(base, {"w": 10.0}, 0)
    assert noisy["w"].dtype == torch.bfloat16
    assert change_norms(base, noisy)["w"] == pytest.approx(10, rel=0.01)


@given(st.integers(0, 10_000), st.integers(3, 30), st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_cka_is_the_definition_and_ignores_turns_scale_and_place(seed, count, width):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    grams = [centre @ side @ side.T @ centre for side in (x, y)]
    expected = torch.trace(grams[0] @ grams[1]) / (grams[0].norm() * grams[1].norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(3 * x @ turn + 5, y) == pytest.approx(float(expected), rel=1e-9)
    assert linear_cka(x, 0.1 * x @ turn - 2) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_principal_components_are_those_of_an_svd(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = principal_components(x, 8)
    _, values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    count = found.directions.shape[1]
    assert count == (6 if shape[0] == 40 else 5)
    assert torch.allclose(found.deviations, values[:count] / math.sqrt(shape[0]))
    overlap = (directions[:count] @ found.directions).abs()
    assert torch.allclose(overlap, torch.eye(count, dtype=torch.float64), atol=1e-8)


def test_bad_input_is_one_clear_sentence():
    base = tiny()
    with pytest.raises(UserError, match="no token"):
        function_drift(base, base, [Batch(torch.tensor([[1, 2]]), torch.zeros(1, 2))])
    with pytest.raises(UserError, match="no token"):
        read_states(base, [])
    wider = make_model("llama", make_tokenizer("llama"), hidden_size=32).double()
    with pytest.raises(UserError, match="cannot be compared"):
        function_drift(base, wider, BATCHES)


def test_a_model_that_caps_its_logits_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=2, logits_scaling=8.0, pad_token_id=0)).eval()
    with pytest.raises(UserError, match="after the output head"):
        read_states(model, BATCHES)
