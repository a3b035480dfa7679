from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.models.topology import parse_layers, read_topology, select
from tests.spectra.synthetic import llama_shapes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.02,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
SHAPES = llama_shapes(12, 64, 128)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mllama(prefix: str, head: str, vision: str, projector: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and shapes of a two-layer Mllama whose layer 1 is a cross-attention layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in llama_shapes(2, 64, 128).items():
        name = head if name == "lm_head.weight" else prefix + name.removeprefix("model.")
        shapes[name.replace("layers.1.self_attn", "layers.1.cross_attn")] = shape
    shapes |= {
        f"{prefix}layers.1.cross_attn.q_norm.weight": (16,),
        f"{prefix}layers.1.cross_attn_attn_gate": (1,),
        f"{vision}.patch_embedding.weight": (32, 3, 14, 14),
        f"{vision}.transformer.layers.0.self_attn.q_proj.weight": (32, 32),
        f"{vision}.transformer.layers.0.mlp.fc1.bias": (64,),
        f"{projector}.weight": (64, 32),
    }
    text = LLAMA | {"model_type": "mllama_text_model", "num_hidden_layers": 2}
    del text["tie_word_embeddings"]
    return {"model_type": "mllama", "text_config": text, "vision_config": {"num_hidden_layers": 9}}, shapes


def test_every_tensor_of_llama_is_accounted_for() -> None:
    topology = read_topology(LLAMA, SHAPES)
    assert {matrix.name for matrix in topology.matrices} | set(topology.left_out) == set(SHAPES)
    assert [m.module for m in topology.matrices if m.layer == 7] == MODULES
    assert [m.layer for m in topology.matrices] == [-1, *(layer for layer in range(12) for _ in MODULES), -1]
    assert (topology.matrices[0].kind, topology.matrices[-1].kind) == ("embedding", "head")
    assert set(topology.left_out.values()) == {"norm scale, not a matrix"}
    assert len(topology.left_out) == 2 * 12 + 1
    assert (topology.heads, topology.kv_heads, topology.head_size, topology.rotary_size) == (4, 2, 16, 16)
    assert (topology.rope_theta, topology.rotary_pairs, topology.tied) == (5e5, "half", False)


def test_kinds_follow_the_block() -> None:
    kinds = {m.module: m.kind for m in read_topology(LLAMA, SHAPES).matrices if m.layer == 0}
    assert kinds == dict.fromkeys(MODULES[:4], "self_attention") | dict.fromkeys(MODULES[4:], "mlp")


@pytest.mark.parametrize(
    ("prefix", "head", "vision", "projector"),
    [
        ("language_model.model.", "language_model.lm_head.weight", "vision_model", "multi_modal_projector"),
        ("model.language_model.", "lm_head.weight", "model.vision_model", "model.multi_modal_projector"),
    ],
    ids=["as published", "as of transformers 4.52"],
)
def test_mllama_under_either_prefix(prefix: str, head: str, vision: str, projector: str) -> None:
    topology = read_topology(*mllama(prefix, head, vision, projector))
    assert (topology.family, topology.layers, topology.tied) == ("mllama", 2, False)
    assert {m.kind for m in topology.matrices if m.layer == 1} == {"cross_attention", "mlp"}
    assert [m.module for m in topology.matrices if m.layer == 1] == MODULES
    assert topology.matrices[-1].name == head
    left_out = topology.left_out
    assert left_out[f"{vision}.transformer.layers.0.self_attn.q_proj.weight"].startswith("vision tower")
    assert left_out[f"{vision}.patch_embedding.weight"].startswith("vision tower")
    assert left_out[f"{projector}.weight"].startswith("projector")
    assert left_out[f"{prefix}layers.1.cross_attn_attn_gate"].startswith("gate")
    assert left_out[f"{prefix}layers.1.cross_attn.q_norm.weight"].startswith("norm")


def test_qwen2_biases_are_left_out_and_its_head_is_tied() -> None:
    shapes = llama_shapes(12, 64, 128, tied=True) | {"model.layers.3.self_attn.q_proj.bias": (64,)}
    topology = read_topology(LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}, shapes)
    assert topology.tied
    assert topology.left_out["model.layers.3.self_attn.q_proj.bias"] == "bias, not a matrix"
    assert "lm_head" not in {matrix.module for matrix in topology.matrices}


def test_a_tied_head_that_is_stored_again_is_left_out() -> None:
    topology = read_topology(LLAMA | {"tie_word_embeddings": True}, SHAPES)
    assert topology.left_out["lm_head.weight"] == "the head is tied to the embedding"


@pytest.mark.parametrize(("stored", "tied"), [(True, False), (False, True)])
def test_without_a_word_of_the_config_a_missing_head_is_a_tied_one(stored: bool, tied: bool) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    assert read_topology(config, llama_shapes(12, 64, 128, tied=not stored)).tied is tied


def test_unknown_families_are_read_by_pattern() -> None:
    shapes = {
        "decoder.layers.0.self_attn.qkv_proj.weight": (96, 64),
        "decoder.layers.0.mlp.experts.0.up_proj.weight": (8, 64),
        "decoder.layers.0.mlp.router.weight": (4, 64),
        "decoder.layers.1.self_attn.qkv_proj.weight": (96, 64),
        "mtp.layers.0.self_attn.qkv_proj.weight": (96, 64),
    }
    topology = read_topology(LLAMA | {"model_type": "new", "num_hidden_layers": 1, "head_dim": 24}, shapes)
    assert [(m.layer, m.module, m.kind) for m in topology.matrices] == [
        (0, "up_proj", "expert"),
        (0, "router", "mlp"),
        (0, "qkv_proj", "self_attention"),
    ]
    assert topology.left_out == {
        "decoder.layers.1.self_attn.qkv_proj.weight": "layer beyond the 1 of the config",
        "mtp.layers.0.self_attn.qkv_proj.weight": "outside the decoder's layers (decoder.layers)",
    }
    assert topology.head_size == 24


def test_rotary_settings_of_newer_configs() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    topology = read_topology(LLAMA | {"rope_parameters": rope}, SHAPES)
    assert (topology.rope_theta, topology.rotary_size) == (1e6, 8)
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert read_topology(LLAMA | {"rope_parameters": by_kind}, SHAPES).rope_theta is None
    assert read_topology(LLAMA | {"model_type": "cohere"}, SHAPES).rotary_pairs == "neighbours"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "must give num_hidden_layers as a positive whole number, not None"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": "12"}, "not '12'"),
        ({"num_hidden_layers": 13}, "layer 12 has no weight under model.layers.12"),
        ({"num_attention_heads": 8, "head_dim": 16}, r"layers.0.self_attn.q_proj.weight has 64 rows.* make 128"),
    ],
)
def test_configs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_topology(LLAMA | change, SHAPES)


@pytest.mark.parametrize("name", ["fc.weight", "vision_model.layers.0.mlp.fc1.weight", "model.layers.0.norm.weight"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"no weight is named as in a decoder.*" + name):
        read_topology(LLAMA, {name: (64,) if "norm" in name else (64, 64)})


def test_selection() -> None:
    topology = read_topology(LLAMA, SHAPES)
    assert len(select(topology)) == 12 * 7
    assert [m.layer for m in select(topology, ["q_proj"], [3, 1])] == [1, 3]
    assert [m.module for m in select(topology, ["v_proj"], [0], embeddings=True)] == [
        "embed_tokens",
        "v_proj",
        "lm_head",
    ]
    assert [m.module for m in select(topology, ["lm_head"])] == ["lm_head"]


@pytest.mark.parametrize(
    ("modules", "layers", "message"),
    [
        (["q_porj"], None, "no module 'q_porj', did you mean 'q_proj'"),
        (None, [0, 12], "layer 12 is outside the model, which has layers 0 to 11"),
        (None, [-1], "layer -1 is outside"),
        (None, [], r"no matrix is selected .* layers \(none\)"),
        ([], None, r"no matrix is selected"),
    ],
)
def test_bad_selections(modules: list[str] | None, layers: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(read_topology(LLAMA, SHAPES), modules, layers)


def test_a_tied_head_cannot_be_selected() -> None:
    topology = read_topology(LLAMA | {"tie_word_embeddings": True}, llama_shapes(12, 64, 128, tied=True))
    with pytest.raises(UserError, match="tied to its embedding; name embed_tokens"):
        select(topology, ["lm_head"])


@given(st.sets(st.integers(0, 99), min_size=1))
def test_layers_survive_being_written_out(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == sorted(layers)
    assert parse_layers(f"{min(layers)}-{max(layers)}") == list(range(min(layers), max(layers) + 1))


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "all", "0-", "1.5"])
def test_bad_layer_lists(text: str) -> None:
    with pytest.raises(UserError, match="is not a list of layers"):
        parse_layers(text)


def test_topology_needs_no_torch() -> None:
    code = "import sys, rlheals.models.topology; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
