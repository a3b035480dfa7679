from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model
from rlheals.restoration.adapter import adapter_config, export_lora
from rlheals.restoration.patch import make_patch
from tests.restoration.folders import drifted, low_rank, state, write

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


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


def test_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before, after = write(tmp_path / "a"), write(tmp_path / "b", change=uneven)
    make_patch(before, after, tmp_path / "p")
    done = export_lora(tmp_path / "p", before, tmp_path / "lora")
    assert adapter_config(done, "a")["r"] == 2
    model = peft.PeftModel.from_pretrained(load_model(before), tmp_path / "lora").merge_and_unload()
    expected = load_model(after)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)
