import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.models.topology import read_topology
from rlheals.spectra import neurons
from rlheals.spectra.alignment import Grams, Tally, best_map, best_scale, best_turn, procrustes
from rlheals.spectra.gauge import gauge_drift, layer_modules, random_gauge
from rlheals.spectra.neurons import match_neurons
from tests.common import make_model, make_tokenizer

IDS = torch.tensor([[3, 9, 27, 14, 5, 40, 11, 2], [8, 8, 1, 30, 22, 17, 6, 4]])


def tiny(family):
    """A float64 model with grouped heads; Qwen2's biases are drawn, as they start at zero."""
    model = make_model(family, make_tokenizer(family)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    topology = read_topology(model.config.to_dict(), {name: tuple(tensor.shape) for name, tensor in state.items()})
    return model, state, topology


def logits(model, state):
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def noised(state, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in state.items()
    }


def table(base, tuned, topology, layer=1, **options):
    rows = gauge_drift(
        layer_modules(base, topology, layer), layer_modules(tuned, topology, layer), topology, layer, **options
    )
    return {(row.block, row.head, row.quantity): row for row in rows}


def left_angles(base, tuned, name, k=8):
    """The angles one would report without thinking of gauges: top-k left singular subspaces, in radians."""
    tops = [torch.linalg.svd(state[name])[0][:, :k].numpy() for state in (base, tuned)]
    return scipy.linalg.subspace_angles(*tops)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_inserted_gauge_keeps_the_logits_and_turns_the_weights_but_not_the_gauge_aware_ones(family, orthogonal):
    model, base, topology = tiny(family)
    tuned = random_gauge(base, topology, 7, orthogonal=orthogonal)
    assert (logits(model, tuned) - logits(model, base)).abs().max() <= 1e-10
    for module in ("self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj", "mlp.up_proj"):
        assert left_angles(base, tuned, f"model.layers.1.{module}.weight").max() > 0.3, module
    found = table(base, tuned, topology)
    assert {key[:2] for key in found} == {
        *((block, head) for block in ("value_output", "query_key") for head in range(2)),
        ("mlp", None),
    }
    for (block, head, quantity), row in found.items():
        where = (block, head, quantity, row.value)
        if quantity.startswith("raw"):
            assert row.value > 0.3, where
        elif quantity == "gauge_share":
            assert row.value == pytest.approx(1, abs=1e-12), where
        else:
            assert row.value < 1e-10, where


def test_a_gauge_on_top_of_a_real_change_is_taken_off_and_the_change_stays():
    _, base, topology = tiny("qwen2")
    tuned = noised(base, 1e-3)
    plain, turned = table(base, tuned, topology), table(base, random_gauge(tuned, topology, 3), topology)
    for key, row in plain.items():
        if not key[2].startswith(("raw", "gauge")):
            assert turned[key].value == pytest.approx(row.value, rel=1e-3), key
            assert 1e-4 < row.value < 1e-2, key


def test_orthogonal_gauges_keep_singular_values_and_others_do_not():
    _, base, topology = tiny("llama")
    name = "model.layers.0.self_attn.v_proj.weight"
    before = torch.linalg.svdvals(base[name])
    assert torch.allclose(torch.linalg.svdvals(random_gauge(base, topology, 1, orthogonal=True)[name]), before)
    assert not torch.allclose(torch.linalg.svdvals(random_gauge(base, topology, 1)[name]), before, rtol=0.05)


def test_random_gauge_follows_its_seed_and_leaves_its_input_and_other_tensors_alone():
    _, base, topology = tiny("qwen2")
    copy = {name: tensor.clone() for name, tensor in base.items()}
    first, again, other = (random_gauge(base, topology, seed) for seed in (1, 1, 2))
    assert all(torch.equal(base[name], copy[name]) for name in base)
    assert all(torch.equal(first[name], again[name]) for name in base)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])
    same = {name for name in base if first[name] is base[name]}
    assert {name for name in base if "norm" in name or "embed" in name} <= same
    assert not any("q_proj" in name or "v_proj" in name for name in same)


def test_product_change_is_that_of_the_products_formed_outright():
    _, base, topology = tiny("qwen2")
    tuned = noised(base, 0.05)
    found = table(base, tuned, topology)
    size, prefix = topology.head_size, "model.layers.1.self_attn"

    def widened(state, module):
        return torch.cat([state[f"{prefix}.{module}.weight"], state[f"{prefix}.{module}.bias"][:, None]], dim=1)

    def value_output(state):
        value = widened(state, "v_proj")[size : 2 * size]
        output = state[f"{prefix}.o_proj.weight"]
        return torch.cat([output[:, head * size : (head + 1) * size] @ value for head in (2, 3)])

    def query_key(state):
        key = widened(state, "k_proj")[size : 2 * size]
        parts = []
        for head in (2, 3):
            query = widened(state, "q_proj")[head * size : (head + 1) * size]
            for plane in range(size // 2):
                q, k = query[[plane, plane + size // 2]], key[[plane, plane + size // 2]]
                parts += [q.T @ k, q.T @ torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64) @ k]
        return torch.cat(parts)

    def relative(product):
        return float((product(tuned) - product(base)).norm() / product(base).norm())

    assert found["value_output", 1, "product_change"].value == pytest.approx(relative(value_output), rel=1e-9)
    assert found["query_key", 1, "product_change"].value == pytest.approx(relative(query_key), rel=1e-9)


def test_mlp_product_change_is_that_of_the_neurons_products_formed_outright():
    _, base, topology = tiny("llama")
    tuned = noised(base, 0.05)

    def parts(state):
        gate, up, down = (state[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return gate, torch.einsum("hn,ni->nhi", down, up)

    shares = [float((b - a).norm() / a.norm()) for a, b in zip(parts(base), parts(tuned), strict=True)]
    found = table(base, tuned, topology)["mlp", None, "product_change"].value
    assert found == pytest.approx(math.sqrt((shares[0] ** 2 + shares[1] ** 2) / 2), rel=1e-9)


def test_bands_hold_noise_follow_the_seed_and_tell_a_gauge_from_it():
    _, base, topology = tiny("llama")
    noise = table(base, noised(base, 0.05), topology, draws=20, seed=1)
    again = table(base, noised(base, 0.05), topology, draws=20, seed=1)
    assert noise == again
    assert noise != table(base, noised(base, 0.05), topology, draws=20, seed=2)
    inside = [row.noise_low <= row.value <= row.noise_high for row in noise.values()]
    assert np.mean(inside) >= 0.8
    turned = table(base, random_gauge(base, topology, 0), topology, draws=5)
    for head in range(2):
        assert (
            turned["value_output", head, "gauge_share"].value > turned["value_output", head, "gauge_share"].noise_high
        )
        assert turned["query_key", head, "product_change"].value < turned["query_key", head, "product_change"].noise_low


def test_no_change_is_zero_with_a_band_of_zero():
    _, base, topology = tiny("llama")
    for row in table(base, base, topology, draws=2).values():
        assert row.value == pytest.approx(0, abs=1e-12)
        assert row.noise_low == pytest.approx(0, abs=1e-12)
        assert row.noise_high == pytest.approx(0, abs=1e-12)


def test_blocks_without_a_known_freedom_or_with_a_missing_matrix_are_left_out():
    _, base, topology = tiny("llama")
    modules = layer_modules(base, topology, 0)
    assert {row.block for row in gauge_drift(modules, modules, topology, 0)} == {"value_output", "query_key", "mlp"}
    normed = {**modules, "q_norm": torch.ones(16)}
    assert {row.block for row in gauge_drift(normed, normed, topology, 0)} == {"value_output", "mlp"}
    less = {name: tensor for name, tensor in modules.items() if name not in ("o_proj", "up_proj")}
    assert {row.block for row in gauge_drift(less, less, topology, 0)} == {"query_key"}


def test_attention_with_norms_on_queries_keeps_its_logits_under_random_gauge():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).double().eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.uniform_(0.5, 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    topology = read_topology(model.config.to_dict(), {name: tuple(tensor.shape) for name, tensor in state.items()})
    tuned = random_gauge(state, topology, 0)
    assert not torch.equal(
        tuned["model.layers.0.self_attn.v_proj.weight"], state["model.layers.0.self_attn.v_proj.weight"]
    )
    assert (logits(model, tuned) - logits(model, state)).abs().max() <= 1e-10


def test_rotary_planes_of_neighbouring_dimensions_are_known():
    from transformers import HeliumConfig, HeliumForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = HeliumConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = HeliumForCausalLM(config).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    topology = read_topology(model.config.to_dict(), {name: tuple(tensor.shape) for name, tensor in state.items()})
    assert topology.rotary_pairs == "neighbours"
    tuned = random_gauge(state, topology, 0)
    assert (logits(model, tuned) - logits(model, state)).abs().max() <= 1e-10
    assert table(state, tuned, topology, layer=0)["query_key", 0, "aligned_change"].value < 1e-10


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_procrustes_is_scipys(seed, size):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(2, 9, size))
    expected, _ = scipy.linalg.orthogonal_procrustes(a, b)
    assert procrustes(torch.from_numpy(a), torch.from_numpy(b)).numpy() == pytest.approx(expected, abs=1e-10)


@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 1.0]))
@settings(max_examples=25, deadline=None)
def test_best_map_is_stationary_and_no_worse_than_procrustes(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(30, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    a2, b2 = (x + noise * torch.randn(30, 4, generator=generator, dtype=torch.float64) for x in (a, b))
    skew = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    a2, b2 = a2 @ skew.mT, b2 @ torch.linalg.inv(skew)

    def misfit(chosen):
        return (a - a2 @ chosen.mT).square().sum() + (b - b2 @ torch.linalg.inv(chosen)).square().sum()

    found = best_map(Grams.of(a, a2), Grams.of(b, b2)).requires_grad_()
    value = misfit(found)
    value.backward()
    assert value <= misfit(procrustes(torch.cat([a2, b2]), torch.cat([a, b])).mT) + 1e-12
    assert found.grad.abs().max() < 1e-4 * a.square().sum()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_best_scale_and_best_turn_beat_a_fine_grid(seed):
    generator = np.random.default_rng(seed)
    u, v, d, e = (generator.normal(size=5) + 1j * generator.normal(size=5) for _ in range(4))

    def misfit(c, *sums):
        grown, overlap, shrunk, other = sums
        size = np.abs(c) ** 2
        return size * grown + shrunk / size - 2 * np.real(c * overlap) - 2 * np.real(other / np.conj(c))

    sizes = np.geomspace(0.1, 10, 200)
    for sums, solve, phases in (
        (
            [np.vdot(v, v).real, np.vdot(u, v), np.vdot(e, e).real, np.vdot(d, e)],
            best_turn,
            np.linspace(0, 2 * np.pi, 90),
        ),
        ([v.real @ v.real, u.real @ v.real, e.real @ e.real, d.real @ e.real], best_scale, np.array([0, np.pi])),
    ):
        found = solve(*(torch.tensor([x]) for x in sums)).item()
        assert misfit(found, *sums) <= misfit(np.outer(sizes, np.exp(1j * phases)), *sums).min() + 1e-9


@given(st.floats(1e-9, math.pi - 1e-3), st.floats(0.2, 5))
def test_tally_gives_the_angle_whatever_the_scale(angle, stretch):
    before = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    after = stretch * torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert float(Tally.of(before, after).angles()) == pytest.approx(angle, abs=1e-7)


def mlp(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (count, 12), "up_proj": (count, 12), "down_proj": (12, count)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def shuffled(base, noise, seed=1):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(base["gate_proj"].shape[0], generator=generator)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name in tuned:
        tuned[name] += noise * torch.randn(tuned[name].shape, generator=generator, dtype=torch.float64)
        tuned[name] = tuned[name][:, order] if name == "down_proj" else tuned[name][order]
    return tuned, order


@pytest.mark.parametrize("at_once", [2, 512])
def test_neurons_are_found_again_whatever_the_memory(at_once, monkeypatch):
    monkeypatch.setattr("rlheals.spectra.block_factors.PIECE", 7)
    monkeypatch.setattr(neurons, "_SMALL", at_once)
    base = mlp(40)
    tuned, order = shuffled(base, 0.1)
    assert torch.equal(order[match_neurons(base, tuned)], torch.arange(40))


def test_contested_neurons_get_the_optimal_assignment():
    from scipy.optimize import linear_sum_assignment

    base = mlp(30)
    tuned, _ = shuffled(base, 2.0)
    found = match_neurons(base, tuned)
    assert sorted(found.tolist()) == list(range(30))
    gate = base["gate_proj"] @ tuned["gate_proj"].T / base["gate_proj"].square().sum()
    outer = (base["up_proj"] @ tuned["up_proj"].T) * (base["down_proj"].T @ tuned["down_proj"])
    norm = (base["up_proj"].square().sum(1) * base["down_proj"].square().sum(0)).sum()
    score = (gate + outer / norm).numpy()
    rows, columns = linear_sum_assignment(score, maximize=True)
    reached, best = score[np.arange(30), found.numpy()].sum(), score[rows, columns].sum()
    assert reached == pytest.approx(best, rel=1e-6)


def test_a_tight_memory_limit_still_gives_a_permutation(monkeypatch):
    monkeypatch.setattr(neurons, "_SMALL", 4)
    base = mlp(30)
    tuned, _ = shuffled(base, 2.0)
    assert sorted(match_neurons(base, tuned).tolist()) == list(range(30))
