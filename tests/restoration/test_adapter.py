from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model, save_model
from rlheals.restoration.adapter import export_lora
from rlheals.restoration.patch import make_patch
from tests.common import make_model, make_tokenizer
from tests.restoration.folders import drifted, low_rank, state, write

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel


def merged(model: Path, adapter: Path) -> dict[str, Tensor]:
    """The model with the adapter merged, read from the format's description alone: W + alpha / r · B A."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert {config[key] for key in ("fan_in_fan_out", "use_rslora", "use_dora")} == {False}
    stored = load_file(adapter / "adapter_model.safetensors")
    weights = state(model)
    modules = [name.removesuffix(".weight") for name in weights]
    for module in modules:
        targeted = any(module == each or module.endswith(f".{each}") for each in config["target_modules"])
        down = stored.pop(f"base_model.model.{module}.lora_A.weight", None)
        up = stored.pop(f"base_model.model.{module}.lora_B.weight", None)
        assert targeted == (down is not None) == (up is not None)
        if down is None or up is None:
            continue
        rank = pattern(config["rank_pattern"], module, config["r"])
        alpha = pattern(config["alpha_pattern"], module, config["lora_alpha"])
        assert (up.shape[1], down.shape[0]) == (rank, rank)
        weights[f"{module}.weight"] = (weights[f"{module}.weight"] + alpha / rank * up @ down).to(up.dtype)
    assert not stored
    return weights


def pattern(patterns: dict[str, int], module: str, default: int) -> int:
    """The entry whose key is a regular expression that ends the module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def uneven(name: str, tensor: Tensor) -> Tensor:
    """Rank 2 in queries and keys, rank 1 in the head and the values of one layer."""
    tensor = low_rank(name, tensor)
    if name in ("lm_head.weight", "model.layers.1.self_attn.v_proj.weight"):
        tensor = tensor + 0.01 * torch.outer(torch.arange(tensor.shape[0]).cos(), torch.arange(tensor.shape[1]).sin())
    return tensor


def test_the_merged_adapter_is_the_edited_model(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a"), write(tmp_path / "b", change=uneven)
    make_patch(before, after, tmp_path / "p")
    done = export_lora(tmp_path / "p", before, tmp_path / "lora")
    assert {each.module.split(".")[-1]: each.rank for each in done} == {
        "q_proj": 2,
        "k_proj": 2,
        "v_proj": 1,
        "lm_head": 1,
    }
    assert max(each.error for each in done) < 1e-5
    expected, found = state(after), merged(before, tmp_path / "lora")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert ((tmp_path / "lora" / "adapter_model.safetensors").stat().st_mode & 0o777) == 0o644


def test_a_change_of_higher_rank_is_refused_unless_allowed(tmp_path: Path) -> None:
    before = write(tmp_path / "a")
    after = write(tmp_path / "b", change=lambda name, tensor: drifted(name, tensor) if "q_proj" in name else tensor)
    make_patch(before, after, tmp_path / "p")
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.weight is not of rank 8 or less within"):
        export_lora(tmp_path / "p", before, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    (first, _) = export_lora(tmp_path / "p", before, tmp_path / "wide", most=32)
    assert first.rank > 16
    rough = export_lora(tmp_path / "p", before, tmp_path / "rough", most=30, tolerance=0.3)
    assert all(0.1 < each.error <= 0.3 and each.rank < first.rank for each in rough)


def test_other_tensors_and_other_models_are_refused(tmp_path: Path) -> None:
    before = write(tmp_path / "a")
    for part in ("embed_tokens", "input_layernorm"):
        after = write(tmp_path / part, change=lambda name, tensor, part=part: tensor + 1 if part in name else tensor)
        make_patch(before, after, tmp_path / "p")
        with pytest.raises(UserError, match=rf"{part}\.weight, which no adapter is written for"):
            export_lora(tmp_path / "p", before, tmp_path / "lora")
    with pytest.raises(UserError, match=r"does not fit|already has"):
        export_lora(tmp_path / "p", after, tmp_path / "lora")


def ranked(name: str, layers: int) -> int:
    """The rank of the change of a tensor in `planted`: 0 to 3, other ones in layers 1 and 11 with names alike."""
    found = re.search(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.weight", name)
    if found is None:
        return int(name == "lm_head.weight")
    return (int(found[1]) * layers + ["q", "k", "v", "o", "gate", "up", "down"].index(found[3])) % 4


def planted(model: PreTrainedModel, size: float) -> PreTrainedModel:
    """A copy of the model in which matrices of all kinds changed, each by ``size`` of its norm."""
    after = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in after.named_parameters():
        rank = ranked(name, model.config.num_hidden_layers + 1)
        if rank:
            left, right = (torch.randn(length, rank, generator=draw) for length in parameter.shape)
            change = left @ right.T
            wide = parameter.data.float()
            parameter.data = (wide + size * wide.norm() / change.norm() * change).to(parameter.dtype)
    return after


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40).reshape(2, 20) + 5).logits.float()


def farthest(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_peft_gives_the_patched_model(tmp_path: Path, family: str, dtype: str, layers: int) -> None:
    """Whatever PEFT makes of the adapter is the patched model but for a few roundings of the weights' own type."""
    tokenizer = make_tokenizer(family)
    before = make_model(family, tokenizer, num_hidden_layers=layers, initializer_range=0.05).to(getattr(torch, dtype))
    after = planted(before, 0.3)
    for name, model in (("before", before), ("after", after)):
        save_model(model, tokenizer, tmp_path / name)
    make_patch(tmp_path / "before", tmp_path / "after", tmp_path / "patch")
    done = export_lora(tmp_path / "patch", tmp_path / "before", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "before", dtype), tmp_path / "lora").eval()

    adapted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert adapted == {each.module: (each.rank, 1.0) for each in done}
    wanted = {name: rank for name in after.state_dict() if (rank := ranked(name, layers + 1))}
    if family == "qwen2":
        wanted.pop("lm_head.weight")  # tied, and so not changed
    assert {f"{module}.weight": rank for module, (rank, _) in adapted.items()} == wanted
    assert set(wanted.values()) == {1, 2, 3}, "the adapter needs patterns"

    eps = torch.finfo(after.dtype).eps
    expected, start = logits(after), logits(before)
    assert farthest(start, expected) > 0.1, "the adapter has something to do"
    assert farthest(logits(loaded), expected) < 16 * eps
    merged_in = loaded.merge_and_unload()
    state, weights = merged_in.state_dict(), after.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        if name in wanted:
            assert farthest(state[name], tensor) < 8 * eps, name
        else:
            assert torch.equal(state[name], tensor), name
    assert farthest(logits(merged_in), expected) < 16 * eps
