from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.publish import verify
from rlheals.restoration.patch import model_digest
from rlheals.restoration.write_model import write_model
from rlheals.spectra.reader import Weights
from tests.common import make_folder
from tests.restoration.folders import same_bits, same_state, state, write

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EDITED = "model.layers.0.self_attn.q_proj.weight"


def twice(weights: Weights, out: Path, **options: int) -> str:
    """Write the model with one tensor doubled."""
    return write_model(
        weights,
        lambda name: 2 * weights.tensor(name) if name == EDITED else None,
        lambda digest: f"card {digest}",
        out,
        **options,
    )


def test_the_folder_loads_and_answers_by_itself(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("another card")
    (source / "trainer_state.json").write_text("{}")
    (source / "optimizer.bin").write_text("")
    with Weights(source) as weights:
        digest = twice(weights, tmp_path / "out")
    out = tmp_path / "out"
    assert load_tokenizer(out).chat_template == load_tokenizer(source).chat_template
    model, old = load_model(out), load_model(source)
    assert torch.equal(model.get_parameter(EDITED), 2 * old.get_parameter(EDITED))
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.safetensors"} <= names
    assert not {"trainer_state.json", "optimizer.bin", "model.safetensors.index.json"} & names
    assert (out / "README.md").read_text() == f"card {digest}"
    with Weights(out) as written:
        assert model_digest(written) == digest
    assert set(verify(out)) == names - {"manifest.json"}
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_stay_below_the_size_and_change_nothing(tmp_path: Path, dtype: str) -> None:
    source, out = write(tmp_path / "source", dtype=dtype), tmp_path / "out"
    with Weights(source) as weights:
        largest = max(tensor.numel() * tensor.element_size() for tensor in state(source).values())
        one = twice(weights, tmp_path / "whole")
        assert twice(weights, out, shard_bytes=largest) == one
        order = list(weights.shapes)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size <= largest + 4096 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == order
    assert same_state(tmp_path / "whole", out)
    before, after = state(source), state(out)
    assert [name for name in before if not same_bits(before[name], after[name])] == [EDITED]


def test_nothing_appears_when_an_edit_fails(tmp_path: Path) -> None:
    source = write(tmp_path / "source")

    def infinite(name: str) -> Tensor | None:
        return torch.full((32, 32), torch.inf) if name == EDITED else None

    def wide(name: str) -> Tensor | None:
        return torch.zeros(32, 32, dtype=torch.float64) if name == EDITED else None

    with Weights(source) as weights:
        with pytest.raises(UserError, match=f"tensor {EDITED} holds NaN or infinite"):
            write_model(weights, infinite, str, tmp_path / "out")
        with pytest.raises(ValueError, match="not F32"):
            write_model(weights, wide, str, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_models_are_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "ladder" / "source")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with Weights(source) as weights:
        twice(weights, tmp_path / "out")
        twice(weights, tmp_path / "out")  # an earlier output may be replaced
        for taken in (source, tmp_path / "notes"):
            with pytest.raises(UserError, match="exists and is no output of rlheals"):
                twice(weights, taken)
    with Weights(tmp_path / "out") as weights, pytest.raises(UserError, match="which is read"):
        twice(weights, tmp_path / "out")
    assert (tmp_path / "notes" / "mine.txt").exists()
    assert len(state(source)) == 21
