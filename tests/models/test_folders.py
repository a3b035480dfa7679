"""What people point at that is no plain model folder: each kind has a sentence that says what it is and what to do."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model, load_state
from rlheals.spectra.reader import Weights
from tests.common import make_folder, make_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ADAPTER = '{"peft_type": "LORA"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def _adapter_alone(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(ADAPTER)
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return folder


def _adapter_beside(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(ADAPTER)
    return folder


def _adapter_weights_beside(folder: Path) -> Path:
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return folder


def _unmerged(folder: Path) -> Path:
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name.replace(".weight", ".base_layer.weight")] = state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _fsdp(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "scheduler.pt").write_bytes(b"")
    return folder


def _deepspeed(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "global_step100").mkdir()
    return folder


def _training_state(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").write_bytes(b"")
    return folder


def _pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _parent(folder: Path) -> Path:
    run = folder.parent / "run"
    for name in ("checkpoint-5", "checkpoint-100"):
        shutil.copytree(folder, run / name)
    return run


def _hub_cache(folder: Path) -> Path:
    repository = folder.parent / "models--org--name"
    shutil.copytree(folder, repository / "snapshots" / "0123abcd")
    return repository


def _shards_alone(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    return folder


def _pointer(folder: Path) -> Path:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
    (folder / "model.safetensors").write_text(text)
    return folder


def _two_sets(folder: Path) -> Path:
    make_model("llama", make_tokenizer("llama")).save_pretrained(folder, max_shard_size="200KB")
    make_model("llama", make_tokenizer("llama"), seed=5).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "model.safetensors")
    return folder


def _null_in_index(folder: Path) -> Path:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names)}))
    return folder


def _outside_index(folder: Path) -> Path:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "../model/model.safetensors")})
    )
    return folder


def _gguf(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "model.Q4_1.gguf")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_adapter_alone, r"is an adapter, which is a change and not a model; merge it into its base"),
        (
            _adapter_beside,
            r"full weights and adapter_config.json beside them, so loaders answer with the adapter",
        ),
        (
            _adapter_weights_beside,
            r"weights and adapter_model.safetensors beside them.*delete the adapter's files",
        ),
        (_unmerged, r"an adapter that is not merged \(tensor .*q_proj.base_layer.weight\); merge it"),
        (_fsdp, r"sharded state of FSDP and no model; consolidate it \(accelerate merge-weights .*fsdp_0"),
        (_deepspeed, r"sharded state of DeepSpeed and no model; gather it \(zero_to_fp32.py"),
        (_training_state, r"holds the state of a training run \(optimizer.pt\) but no weights"),
        (_pickled, r"pytorch_model.bin is a pickled checkpoint.*convert it to safetensors"),
        (_parent, r"run is no model folder but holds some \(checkpoint-5, checkpoint-100\); point to one of these"),
        (_hub_cache, r"holds some \(snapshots/0123abcd\); point to one of these"),
        (_shards_alone, r"model-00001-of-00001.safetensors but not model.safetensors.index.json"),
        (_pointer, r"model.safetensors is a git-lfs pointer and not the file itself; run `git lfs pull`"),
        (_two_sets, r"holds two sets of weights, .* delete the one that is out of date"),
        (_null_in_index, r"index.json gives None as the file of .*, not the name of one"),
        (_outside_index, r"gives '../model/model.safetensors' as the file of"),
        (_gguf, r"model.Q4_1.gguf is not in the format of transformers; convert the model"),
    ],
)
def test_each_kind_has_its_sentence(folder: Path, make: Callable[[Path], Path], message: str) -> None:
    made = make(folder)
    for read in (Weights, load_model, load_state):
        if make is _unmerged and read is load_state:
            continue  # whoever takes the state checks its names
        with pytest.raises(UserError, match=message) as raised:
            read(made)
        assert "\n" not in str(raised.value)


def test_an_index_that_names_the_one_file_is_no_second_set(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder)
    with Weights(folder) as weights:
        assert set(weights.shapes) == set(names)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_a_wrapper_left_are_read_without_it(folder: Path, prefix: str) -> None:
    plain = load_file(folder / "model.safetensors")
    save_file({prefix + name: each for name, each in plain.items()}, folder / "model.safetensors")
    with Weights(folder) as weights:
        assert set(weights.shapes) == set(plain)
        assert weights.renamed
        assert all(torch.equal(weights.tensor(name), plain[name]) for name in plain)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_model(folder)  # transformers would start such a model from random numbers


def test_buffers_of_old_savers_are_neither_weights_nor_an_obstacle(folder: Path) -> None:
    plain = load_file(folder / "model.safetensors")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "model.position_ids": torch.arange(16),
    }
    save_file(plain | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    with Weights(folder) as weights:
        assert weights.buffers == set(buffers)
        assert {weights.topology.left_out[name].split(",")[0] for name in buffers} == {
            "buffer that the model computes from its config"
        }
    state = load_model(folder).state_dict()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_placeholders_of_zero_3_are_told(folder: Path) -> None:
    plain = load_file(folder / "model.safetensors")
    empty = {name: each if "norm" in name else torch.empty(0) for name, each in plain.items()}
    save_file(empty, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensors without a number in them .* ZeRO-3 .* gather them"):
        Weights(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder: Path, dtype: torch.dtype) -> None:
    plain = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(plain | {name: plain[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (Weights, load_model):
        with pytest.raises(
            UserError, match=rf"tensor {name} is \w+, not floating point; use an unquantised checkpoint"
        ):
            read(folder)
