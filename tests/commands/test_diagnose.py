from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from rlheals import cli
from rlheals.commands._diagnosis_text import duration, plan_lines
from rlheals.spectra.plan import Forecast, Rates, Workload, plan
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrates on small matrices."""
    monkeypatch.setattr("rlheals.spectra.plan.CALIBRATION", {"square": (64, 64), "tall": (128, 32)})
    monkeypatch.setattr("rlheals.spectra.plan.GAUGE_LAYER", (32, 48, 4, 2))


@pytest.mark.usefixtures("quick")
def test_the_plan_needs_no_tuned_and_speaks_of_the_model_asked(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, folders[0], "--plan", "--device", "cpu", "--nulls", 20)
    assert code == 0
    assert "base, first run: --nulls 20: " in out
    assert "; --nulls 2: " in out
    assert "in processor time of all threads together" in out
    assert "Qwen" not in out
    assert "not measured: work over" in out
    assert "Left out: function drift on the GPU; loading the models, writing the page." in out
    assert "Qwen2.5-7B-Instruct" in run(capsys, folders[0], "--plan", "--all", "--device", "cpu")[1]
    out = run(capsys, folders[0], "--plan", "--device", "cpu", "--no-function", "--nulls", 1)[1]
    assert "Left out: function drift, which this run would not measure" in out
    assert "--nulls 2" not in out, "it would be more than asked for"


@pytest.mark.usefixtures("quick")
def test_the_plan_adds_up_in_json(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, folders[0], "--plan", "--json", "--device", "cpu", "--no-gauge")[1])
    here, there = told["estimates"]
    assert (here["model"], here["draws"], here["gauge"], there["function"]) == ("base", 20, 0, None)
    matrices = here["start_up"] + here["factorise"] + here["measure"] + here["read"] + 20 * here["null"]
    assert here["function"] > 0
    assert here["first_run"] == pytest.approx(matrices + here["function"] + 5 * here["function_draw"])
    few = here["first_run"] - 18 * here["null"] - 3 * here["function_draw"]
    assert here["first_run_with_2_nulls"] == pytest.approx(few)
    assert told["clock_over_processor"] >= 1
    assert told["left_out"] == ""


def test_a_busy_machine_is_told() -> None:
    rates = Rates("here", *[{"square": 1.0, "tall": 1.0}] * 3, gauge=1.0, digest=1.0, source="by hand")
    estimates = tuple(plan([Workload("m", {(2, 2): 1}, 1)], rates, 1, 3))
    assert any("3.4 times as long" in line for line in plan_lines(Forecast(estimates, 3.4)))
    assert not any("times as long" in line for line in plan_lines(Forecast(estimates, 1.1)))


def test_what_stays_on_disk_is_told_at_the_end(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, tuned, _ = folders
    out = run(capsys, base, tuned, *options(tmp_path / "c"))[1]
    stored = sum(file.stat().st_size for file in (tmp_path / "c" / "factors").rglob("*") if file.is_file())
    assert f"{stored / 1024:.3g} KiB of decompositions in {tmp_path / 'c' / 'factors'}" in out.splitlines()[-1]
    told = json.loads(run(capsys, base, tuned, "--json", *options(tmp_path / "c"))[1])
    assert (told["factor_cache_bytes"], told["factor_cache"]) == (stored, str(tmp_path / "c" / "factors"))


def test_the_report_is_written_whole(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, _ = run(capsys, folders[0], folders[1], "--out", out, *options(folders[2]))
    assert code == 1
    assert {"index.html", "spectra.parquet", "spectra_verdicts.parquet"} <= {path.name for path in out.iterdir()}


def test_durations() -> None:
    assert [duration(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2 h"]
