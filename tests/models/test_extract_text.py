from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from rlheals.errors import UserError
from rlheals.models.checkpoint import generation_config, load_model, load_tokenizer, quiet_bars
from rlheals.models.extract_text import extract_text
from rlheals.models.mllama import plan_extraction
from rlheals.publish import verify
from rlheals.restoration.patch import model_digest
from rlheals.spectra.reader import Weights
from tests.common import make_folder
from tests.models.mllama_folders import (
    CROSSED,
    LAYERS,
    ROPE,
    VOCABULARY,
    edit_config,
    in_memory_name,
    make_mllama,
    rename,
    write_mllama,
)
from tests.restoration.folders import same_bits, same_state, state
from tests.spectra.test_memory import ENVIRONMENT, ROOT, size

if TYPE_CHECKING:
    from pathlib import Path

STEM = "language_model.model"
QUERY = f"{STEM}.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def mllama() -> Any:
    return make_mllama()


@pytest.fixture
def source(mllama: Any, tmp_path: Path) -> Path:
    return write_mllama(tmp_path / "vision", mllama)


def prompts() -> torch.Tensor:
    """Random texts, longer than the context llama3's rope was made for, so that its scaling has an effect."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(4, VOCABULARY, (3, 2 * int(ROPE["original_max_position_embeddings"])), generator=draw)


def gap(one: Any, other: Any) -> float:
    tokens = prompts()
    with torch.no_grad():
        return float((one(input_ids=tokens).logits - other(input_ids=tokens).logits).abs().max())


def greedy(model: Any) -> torch.Tensor:
    tokens = prompts()[:, :20]
    settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)


def assert_same_answers(llama: Any, mllama: Any) -> None:
    assert gap(llama, mllama) == 0.0
    answers = greedy(llama)
    assert torch.equal(answers, greedy(mllama))
    assert len(answers[0, 20:].unique()) > 5, "an answer that repeats one token shows little"


def test_the_text_model_answers_as_the_whole_one(mllama: Any, source: Path, tmp_path: Path) -> None:
    done = extract_text(source, tmp_path / "out")
    llama = load_model(tmp_path / "out")
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert_same_answers(llama, mllama)
    assert done.parameters == sum(tensor.numel() for tensor in llama.parameters())
    tokenizers = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": "4 cards"}]) for tokenizer in tokenizers]
    assert ids[0]["input_ids"] == ids[1]["input_ids"]


def test_the_comparison_can_fail(mllama: Any, source: Path, tmp_path: Path) -> None:
    """Each thing that extraction must get right, done wrong, shows in the logits."""
    extract_text(source, tmp_path / "out")
    llama = load_model(tmp_path / "out")
    assert gap(llama, make_mllama(seed=1)) > 0.1
    layers = llama.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert gap(llama, mllama) > 0.1
    for wrong in ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, {"rms_norm_eps": 1e-6}):
        extract_text(source, tmp_path / "out")
        edit_config(tmp_path / "out", lambda config, wrong=wrong: config.update(wrong))
        (tmp_path / "out" / "manifest.json").unlink()
        assert gap(load_model(tmp_path / "out"), mllama) > 1e-4
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_every_weight_is_the_source_s(source: Path, tmp_path: Path) -> None:
    extract_text(source, tmp_path / "out")
    ours, theirs = state(tmp_path / "out"), state(source)
    used = 0
    for layer, origin in enumerate(LAYERS):
        stem, other = f"model.layers.{layer}.", f"{STEM}.layers.{origin}."
        inner = [name.removeprefix(stem) for name in ours if name.startswith(stem)]
        assert len(inner) == 9
        used += sum(same_bits(ours[stem + name], theirs[other + name]) for name in inner)
    assert used == 9 * len(LAYERS) == len(ours) - 3
    assert same_bits(ours["model.embed_tokens.weight"], theirs[f"{STEM}.embed_tokens.weight"][:VOCABULARY])
    assert same_bits(ours["model.norm.weight"], theirs[f"{STEM}.norm.weight"])
    assert same_bits(ours["lm_head.weight"], theirs["language_model.lm_head.weight"])


def test_the_folder_says_where_it_comes_from(source: Path, tmp_path: Path) -> None:
    done = extract_text(source, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert config["rope_parameters"] == ROPE
    assert json.loads((out / "layers.json").read_text()) == {
        "mllama_layers": 6,
        "cross_attention_layers": list(CROSSED),
        "llama_to_mllama": {"0": 0, "1": 2, "2": 5},
    }
    with Weights(out) as written, Weights(source) as read:
        assert done.weights_sha256 == model_digest(written)
        assert done.source == {"name": "vision", "weights_sha256": model_digest(read)}
    card = (out / "README.md").read_text()
    assert done.weights_sha256 in card
    assert done.source["weights_sha256"] in card
    assert "rows 512 to 519 went (512 is the image token's)" in card
    assert "\n| 2 | 5 |\n" in card
    names = {file.name for file in out.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"} <= names
    assert "preprocessor_config.json" not in names
    assert set(verify(out)) == names - {"manifest.json"}


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [({}, [1, 3], [1, 3]), ({"eos_token_id": 4}, [1, 3], 4), ({}, None, None)],
)
def test_end_tokens_are_the_source_s_without_a_generation_config(
    source: Path, tmp_path: Path, outer: dict[str, Any], inner: Any, expected: Any
) -> None:
    def name_end_tokens(config: dict[str, Any]) -> None:
        config.pop("eos_token_id", None)
        config.update(outer)
        config["text_config"].pop("eos_token_id", None)
        config["text_config"].update({} if inner is None else {"eos_token_id": inner})

    (source / "generation_config.json").unlink()
    edit_config(source, name_end_tokens)
    extract_text(source, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert generation_config(source).eos_token_id == expected
    assert generation_config(tmp_path / "out").eos_token_id == expected
    assert load_model(tmp_path / "out").generation_config.eos_token_id == expected


def test_sharded_folders_in_and_out(mllama: Any, source: Path, tmp_path: Path) -> None:
    extract_text(source, tmp_path / "whole")
    sharded = write_mllama(tmp_path / "sharded", mllama, shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 5
    extract_text(sharded, tmp_path / "out", shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert same_state(tmp_path / "whole", tmp_path / "out")
    assert_same_answers(load_model(tmp_path / "out"), mllama)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    source = write_mllama(tmp_path / "vision", make_mllama(), torch.bfloat16)
    extract_text(source, tmp_path / "out")
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    # Read from disk as users do: a model that is cast in memory has its rotary frequencies rounded, too.
    with quiet_bars():
        mllama = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).eval()
    assert_same_answers(load_model(tmp_path / "out", "bfloat16"), mllama)


def test_names_in_memory_give_the_same(source: Path, tmp_path: Path) -> None:
    extract_text(source, tmp_path / "out")
    rename(source, in_memory_name)
    assert "model.language_model.layers.2.self_attn.q_proj.weight" in load_file(source / "model.safetensors")
    extract_text(source, tmp_path / "again")
    assert same_state(tmp_path / "out", tmp_path / "again")


def test_a_text_model_without_vision(tmp_path: Path) -> None:
    mllama = make_mllama(text_only=True)
    source = write_mllama(tmp_path / "text", mllama)
    assert json.loads((source / "config.json").read_text())["model_type"] == "mllama_text_model"
    done = extract_text(source, tmp_path / "out")
    assert set(done.plan.left_out.values()) == {"cross-attention layers"}
    assert_same_answers(load_model(tmp_path / "out"), mllama)


def test_a_config_as_on_the_hub(mllama: Any, source: Path, tmp_path: Path) -> None:
    """Written by transformers 4: rope under two keys, ``torch_dtype``, settings of generation in between."""

    def older(config: dict[str, Any]) -> None:
        text = config["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text |= {"rope_scaling": rope, "torch_dtype": "bfloat16", "top_k": 50, "_name_or_path": "", "pruned_heads": {}}
        config["torch_dtype"] = config.pop("dtype")

    edit_config(source, older)
    extract_text(source, tmp_path / "out")
    llama = load_model(tmp_path / "out")
    assert llama.config.rope_parameters == ROPE
    assert gap(llama, mllama) == 0.0


def test_the_real_size_is_that_of_llama_8b() -> None:
    """Names and shapes of Llama-3.2-11B-Vision, whose defaults the classes have, without its weights."""
    with torch.device("meta"):
        whole = MllamaForConditionalGeneration(MllamaConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    plan = plan_extraction({**whole.config.to_dict(), "model_type": "mllama"}, shapes, "the model")
    assert sum(map(math.prod, plan.shapes.values())) == 8_030_261_248, "as published for Llama 3.1 8B"
    assert set(range(40)) - set(plan.layers) == {3, 8, 13, 18, 23, 28, 33, 38} == set(plan.cross_attention_layers)
    assert (plan.cut_rows, plan.image_token) == (range(128256, 128264), 128256)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**plan.config))
    assert {name: tuple(tensor.shape) for name, tensor in llama.state_dict().items()} == plan.shapes
    assert set(plan.sources.values()) | set(plan.left_out) == set(shapes)


def fails(source: Path, out: Path, match: str) -> None:
    """Extraction is refused, and nothing is left beside the source."""
    before = {path: path.lstat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(UserError, match=match):
        extract_text(source, out)
    assert {path: path.lstat().st_mtime_ns for path in out.parent.rglob("*")} == before


@pytest.mark.parametrize(
    "name",
    [
        QUERY,
        f"{STEM}.embed_tokens.weight",
        f"{STEM}.norm.weight",
        "language_model.lm_head.weight",
        f"{STEM}.layers.3.cross_attn_mlp_gate",
    ],
)
def test_a_missing_tensor_is_named(source: Path, tmp_path: Path, name: str) -> None:
    rename(source, lambda each: None if each == name else each)
    rest = name.removeprefix(f"{STEM}.").removeprefix("language_model.")
    fails(source, tmp_path / "out", f"vision does not hold the Mllama .*: {rest} is missing. Use the config")


@pytest.mark.parametrize(
    "name",
    [
        f"{STEM}.layers.2.self_attn.q_proj.bias",
        f"{STEM}.layers.3.self_attn.q_proj.weight",
        f"{STEM}.layers.6.mlp.up_proj.weight",
        "speech_model.weight",
    ],
)
def test_an_unexpected_tensor_is_named(source: Path, tmp_path: Path, name: str) -> None:
    weights = load_file(source / "model.safetensors")
    save_file({**weights, name: torch.ones(64, 64)}, source / "model.safetensors", metadata={"format": "pt"})
    fails(source, tmp_path / "out", f": {name} is unexpected. Use the config")


def test_a_tensor_under_two_names(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(64)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    fails(source, tmp_path / "out", "norm.weight is there a second time as")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cross_attention_layers": [1, 2, 4]}, "layers.2.self_attn.k_proj.weight is unexpected"),
        ({"vocab_size": 520}, r"embed_tokens.weight has shape \[520, 64\], not \[528, 64\]"),
        ({"intermediate_size": 95}, r"has shape \[64, 96\], not \[64, 95\]"),
        ({"cross_attention_layers": "all"}, "config.json describes no Mllama that can be built"),
        ({"num_hidden_layers": 5}, "layers.5.input_layernorm.weight is unexpected"),
        ({"num_hidden_layers": 7}, "layers.6.input_layernorm.weight is missing"),
    ],
)
def test_a_config_of_another_model(source: Path, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    edit_config(source, lambda config: config["text_config"].update(change))
    fails(source, tmp_path / "out", match)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_text_model_has_nothing_to_extract(tmp_path: Path, family: str) -> None:
    source = make_folder(tmp_path / "model", family)
    fails(source, tmp_path / "out", f"type {family}, which has no vision part, so there is nothing to extract")


def test_other_families_are_refused(source: Path, tmp_path: Path) -> None:
    edit_config(source, lambda config: config.update(model_type="llava"))
    fails(source, tmp_path / "out", "type llava, whose parts are not known here")
    edit_config(source, lambda config: config.pop("model_type"))
    fails(source, tmp_path / "out", r"vision/config.json names no model_type")
    (source / "config.json").unlink()
    fails(source, tmp_path / "out", "has no config.json")


def test_nothing_is_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    fails(source, tmp_path / "notes", "exists and is no output of rlheals")
    for inside in (source, source / "text", source / ".." / "vision"):
        fails(source, inside, "is or lies in .*, which is read")
    fails(source, tmp_path, "exists and is no output of rlheals")
    extract_text(source, tmp_path / "out")
    extract_text(source, tmp_path / "out")  # an earlier output may be replaced
    assert load_model(tmp_path / "out")


def test_nan_is_not_passed_on(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights[QUERY][0, 0] = torch.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    fails(source, tmp_path / "out", f"tensor {QUERY} holds NaN")


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """Three times the largest tensor beyond the start-up's address space is enough; half of it is not."""
    write_mllama(tmp_path / "small", make_mllama(text_only=True))
    shape = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 20}
    write_mllama(tmp_path / "large", make_mllama(text_only=True, **shape), shard="30MB")
    largest = (16384 + 8) * 256 * 4
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.memory_child", *map(str, (tmp_path, 3 * largest, largest // 2))],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed weights leave no holes
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["extracted", "refused"]), done.stderr
    assert size(tmp_path / "large-text") > 5 * largest
    assert not (tmp_path / "again").exists()
