from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from rlheals.models.checkpoint import load_model
from rlheals.restoration.patch import model_digest
from rlheals.spectra.reader import Weights
from tests.commands.test_restore import run
from tests.common import make_folder
from tests.models.mllama_folders import make_mllama, rename, write_mllama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_mllama(tmp_path / "vision", make_mllama())


def test_it_tells_what_went_where(source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run(capsys, "extract-text", source, out, "--shard-gb", "0.0002")
    assert code == 0, err
    with Weights(out) as written:
        digest = model_digest(written)
    assert f"wrote {out}: a Llama of 3 layers and 158,144 parameters, sha256 of the weights {digest}\n" in text
    assert "cross-attention layers (39 tensors), projector (2 tensors), vision tower (39 tensors)" in text
    assert "cut from 520 to 512 rows: rows 512 to 519 went (512 is the image token's)" in text
    assert "hashing vision: 110/110 tensors" in err
    assert "writing out: 30/30 tensors" in err
    assert len(list(out.glob("*.safetensors"))) > 3
    load_model(out)


def test_json_is_one_object(source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run(capsys, "extract-text", source, out, "--json")
    told = json.loads(text)
    assert code == 0
    assert (told["out"], told["parameters"], told["cut_rows"]) == (str(out), 158_144, [512, 520])
    assert told["left_out"] == {"cross-attention layers": 39, "projector": 2, "vision tower": 39}
    assert told["llama_to_mllama"] == {"0": 0, "1": 2, "2": 5}
    assert told["llama_to_mllama"] == json.loads((out / "layers.json").read_text())["llama_to_mllama"]


def test_bad_input_is_one_line_and_exits_2(source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = make_folder(tmp_path / "plain")
    rename(source, lambda name: None if name.endswith("model.norm.weight") else name)
    for folder, told in (
        (plain, "nothing to extract"),
        (source, "norm.weight is missing"),
        (tmp_path / "no", "does not exist"),
    ):
        code, text, err = run(capsys, "extract-text", folder, tmp_path / "out")
        assert (code, text) == (2, "")
        assert err.startswith("error: ")
        assert told in err
        assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"vision", "plain"}


def test_the_result_is_edited_and_patched_like_any_other(
    source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = write_mllama(tmp_path / "tuned", make_mllama(seed=1))
    for folder in (source, other):
        assert run(capsys, "extract-text", folder, folder.with_suffix(".text"))[0] == 0
    edit = ["--operator", "interpolate", "--layers", "2", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    code, _, err = run(capsys, "restore", source.with_suffix(".text"), other.with_suffix(".text"), *edit)
    assert code == 0, err
    load_model(tmp_path / "out")
    assert (tmp_path / "out" / "layers.json").is_file()
