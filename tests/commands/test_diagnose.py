from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from rlheals import cli
from rlheals.commands._diagnosis_text import duration
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCALED = "model.layers.0.self_attn.q_proj.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["diagnose", *map(str, arguments)])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


def scaled(name: str, tensor: Tensor) -> Tensor:
    return tensor * 1.1 if name == SCALED else tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("models")
    shape = {"layers": 1, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 2**20}
    tuned = write_checkpoint(root / "tuned", **shape, change=scaled)
    return write_checkpoint(root / "base", **shape), tuned, root / "cache"


def options(cache: Path) -> list[object]:
    return ["--cache", cache, "--nulls", 2, "--no-function", "--device", "cpu", "--no-gauge"]


def test_a_change_exits_1_and_the_second_run_computes_nothing(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, cache = folders
    run(capsys, base, tuned, *options(cache))
    code, out, _ = run(capsys, base, tuned, "--json", *options(cache))
    told = json.loads(out)
    assert code == 1
    assert (told["changed"], told["factorised"], told["measured"]) == (True, 0, 0)
    found = {row["tensor"]: row["verdict"] for row in told["verdicts"]}
    assert found.pop(SCALED) == "magnitude change"
    assert set(found.values()) == {"unchanged"}
    code, out, _ = run(capsys, base, tuned, "--all", *options(cache))
    assert SCALED in out
    assert "0 tensors factorised" in out


def test_equal_models_exit_0(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, folders[0], folders[0], *options(folders[2]))
    assert code == 0
    assert "unchanged" in out


def test_bad_input_exits_2_and_writes_nothing(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, tuned, cache = folders
    pickled, out = tmp_path / "pickled", tmp_path / "out"
    pickled.mkdir()
    (pickled / "config.json").write_text((base / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    (tmp_path / "file").write_text("")
    wrong = [
        ([base, pickled], "pickled checkpoint"),
        ([base], "name at least one TUNED"),
        ([base, tuned, "--modules", "q_prj"], "did you mean 'q_proj'"),
        ([base, tuned, "--layers", "7"], "layer 7 is outside"),
        ([base, tuned, "--k", "2000"], "q_proj.weight: k = 2000"),
        ([base, tuned, "--device", "tpu"], "--device tpu is not known"),
    ]
    for arguments, message in wrong:
        code, _, err = run(capsys, *options(cache), "--out", out, *arguments)
        assert (code, message in err) == (2, True), err
        assert not out.exists()
    code, _, err = run(capsys, base, tuned, "--cache", tmp_path / "file", "--no-function")
    assert (code, "cannot be written to" in err) == (2, True)


def test_a_truncated_file_exits_2(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = {"layers": 1, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 2**20}
    cut = write_checkpoint(tmp_path / "cut", **shape)
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    code, _, err = run(capsys, folders[0], cut, *options(folders[2]))
    assert code == 2
    assert "truncated or corrupted" in err


def test_the_plan_needs_no_tuned(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlheals.spectra.plan.CALIBRATION", {"square": (64, 64), "tall": (128, 32)})
    code, out, _ = run(capsys, folders[0], "--plan", "--device", "cpu")
    assert code == 0
    assert "Qwen2.5-7B-Instruct" in out
    assert "not measured" in out


def test_the_report_is_written_whole(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, _ = run(capsys, folders[0], folders[1], "--out", out, *options(folders[2]))
    assert code == 1
    assert {"index.html", "spectra.parquet", "spectra_verdicts.parquet"} <= {path.name for path in out.iterdir()}


def test_durations() -> None:
    assert [duration(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2 h"]
