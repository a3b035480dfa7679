from __future__ import annotations

import json
import re
import shlex
from logging import Handler
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from rlheals import cli
from rlheals.commands._diagnosis_text import duration, plan_lines
from rlheals.models.topology import read_topology
from rlheals.spectra.gauge_insert import random_gauge
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
    assert f"{stored / 1024:.3g} KiB of decompositions in {tmp_path / 'c' / 'factors'}" in out
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


MODEL: dict[str, Any] = {"layers": 1, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 2**20}
FAST = ("--device", "cpu", "--no-function", "--nulls", 10)


def trailing(name: str, tensor: Tensor) -> Tensor:
    """A change of 2 % among the trailing singular vectors of each matrix: structured, and hardly a turn."""
    if tensor.ndim < 2 or "layers" not in name:
        return tensor
    left, values, right = torch.linalg.svd(tensor, full_matrices=False)
    half = len(values) // 2
    inner = torch.randn(half, half, generator=torch.Generator().manual_seed(len(name)))
    change = left[:, -half:] @ inner @ right[-half:]
    return tensor + 0.02 * tensor.norm() * change / change.norm()


def test_structured_is_told_beside_how_far_it_turned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    small = write_checkpoint(tmp_path / "small", **MODEL, change=trailing)
    code, out, _ = run(capsys, folders[0], small, *FAST, "--no-gauge", "--cache", tmp_path)
    assert code == 1
    row = next(line for line in out.splitlines() if "q_proj" in line)
    assert "1 structured" in row
    assert "1 less" in row
    assert re.search(r"<0\.001° \([\d.]+–[\d.]+\)", row), "an angle beside its band"
    assert "rotation" not in out
    code, out, _ = run(capsys, folders[0], small, *FAST, "--no-gauge", "--cache", tmp_path, "--all")
    assert len(re.findall(r"structured +│ less", out)) == 7
    code, out, _ = run(capsys, folders[0], small, *FAST, "--no-gauge", "--cache", tmp_path, "--json")
    told = json.loads(out)
    assert {row["turn"] for row in told["verdicts"]} == {"less than noise"}
    angles = told["leading_angles"]
    assert len(angles) == 2 * 7
    assert all(row["value"] < row["noise_low"] < row["noise_high"] for row in angles)


def test_function_equal_models_are_told_to_be_free(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    state: dict[str, Tensor] = {}
    for file in folders[0].glob("*.safetensors"):
        state |= load_file(file)
    config = json.loads((folders[0] / "config.json").read_text())
    topology = read_topology(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    other = random_gauge(state, topology, seed=3)
    equal = write_checkpoint(tmp_path / "equal", **MODEL, change=lambda name, _: other[name])
    arguments = (folders[0], equal, *FAST, "--cache", tmp_path)
    code, out, _ = run(capsys, *arguments)
    assert code == 1, "the stored weights differ"
    assert re.search(r"value and output .* 100 % \(", out)
    assert "the change of 7 of the 7 changed matrices is free" in out
    assert "compute the same up to rounding, so there is nothing to repair" in out
    assert "rlheals restore" not in out
    _, out, _ = run(capsys, *arguments, "--json")
    gauge = json.loads(out)["gauge"]
    shares = [row["value"] for row in gauge if row["quantity"] == "gauge_share"]
    assert len(shares) == 2 + 2 + 1  # two heads of values, two of keys, the MLP
    assert min(shares) > 0.999999
    assert min(row["value"] for row in gauge if row["quantity"] == "raw_change") > 0.3


def test_a_free_change_with_another_one_is_not_called_equal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    """The neurons in another order do nothing; a scaled query matrix does."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))

    def mixed(name: str, tensor: Tensor) -> Tensor:
        if "down_proj" in name:
            return tensor[:, order]
        return tensor[order] if ".mlp." in name else scaled(name, tensor)

    other = write_checkpoint(tmp_path / "mixed", **MODEL, change=mixed)
    code, out, _ = run(capsys, folders[0], other, *FAST, "--cache", tmp_path)
    assert code == 1
    assert "the change of 3 of the 4 changed matrices is free" in out
    assert "nothing to repair" not in out
    assert "rlheals restore" in out


def command_in(out: str) -> list[str]:
    return shlex.split(re.search(r"^Next: rlheals (.*)$", out, re.MULTILINE)[1])  # type: ignore[index]


def test_the_command_it_ends_with_runs_as_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters of the way back, of folders whose names a shell would split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = write_checkpoint(tmp_path / "my base", **MODEL)
    tuned = write_checkpoint(tmp_path / "tuned's", **MODEL, change=trailing)
    _, out, _ = run(capsys, "my base", "tuned's", *FAST, "--no-gauge")
    lines = out.splitlines()
    assert "7 of 7 matrices compared changed, the median one by 2 % of its norm" in out
    assert "say nothing about what was lost" in out
    assert "Doses from 0.5 to 0.95" in out
    assert lines[-1].startswith("Exit code 1: ")
    said = next(place for place, line in enumerate(lines) if line.startswith("compared were"))
    assert lines[said - 1].strip().endswith("medians."), "what the verdicts cover stands first behind the table"
    command = command_in(out)
    assert command[:3] == ["restore", "my base", "tuned's"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert not stopped.value.code
    before, after, repaired = (
        next(iter(load_file(file)[SCALED] for file in folder.glob("*.safetensors")))
        for folder in (base, tuned, tmp_path / "repaired")
    )
    assert torch.allclose(repaired, 0.25 * after + 0.75 * before, atol=1e-7)


def test_where_no_matrix_changed_the_command_takes_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    other = write_checkpoint(
        tmp_path / "other", **MODEL, change=lambda name, tensor: tensor * 1.1 if "norm" in name else tensor
    )
    code, out, _ = run(capsys, folders[0], other, *options(folders[2]))
    assert code == 1
    assert "0 of 7 matrices compared changed." in out
    assert "--everything" in command_in(out)


def test_in_a_ladder_the_command_is_for_the_last_model_that_can_be_repaired(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path, Path]
) -> None:
    base, tuned, cache = folders
    _, out, _ = run(capsys, base, tuned, base, *options(cache))
    assert command_in(out)[1:3] == [str(base), str(tuned)]
    assert "Size: base → tuned: 1 of 7 matrices compared changed, the median one by 10 % of its norm." in out


def test_equal_models_are_told_that_nothing_changed(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path, Path]
) -> None:
    _, out, _ = run(capsys, folders[0], folders[0], *options(folders[2]))
    assert out.splitlines()[-1].startswith("Nothing changed: ")
    assert "rlheals restore" not in out


def test_noise_alone_exits_0_and_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: tuple[Path, Path, Path]
) -> None:
    def noisy(name: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) if name == SCALED else tensor

    other = write_checkpoint(tmp_path / "noisy", **MODEL, change=noisy)
    code, out, _ = run(capsys, folders[0], other, *options(folders[2]))
    assert code == 0
    assert "1 like noise" in out
    assert out.splitlines()[-1].startswith("Exit code 0: ")
    assert "rlheals restore" in out, "like noise is not the same as harmless"


def test_warnings_are_one_line_a_kind_and_all_of_them_with_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fresh(name: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return 0.02 * torch.randn(tensor.shape, generator=generator) if tensor.ndim > 1 else tensor

    base = write_checkpoint(tmp_path / "base", **{**MODEL, "hidden": 64, "intermediate": 96}, change=fresh)
    arguments = (base, base, *options(tmp_path / "cache"))
    _, out, _ = run(capsys, *arguments)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2, "the base, and the model after under its own name"
    assert all(line.startswith("warning: 7 matrices (model.layers.0.self_attn.q_proj.weight, ") for line in warnings)
    assert all("4 more): base" in line and "never trained" in line for line in warnings)
    _, out, _ = run(capsys, *arguments, "--all")
    assert len([line for line in out.splitlines() if line.startswith("warning: ")]) == 14


def test_what_the_library_advises_stays_off_the_terminal(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    folders: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that warns whenever it is run, as those do that find padding without a mask."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logger, ran = logging.get_logger("transformers.modeling_utils"), []
    forward = LlamaForCausalLM.forward

    def advising(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        ran.append(self)
        logger.warning("We strongly recommend passing in an attention_mask")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", advising)
    heard: list[str] = []
    handler = Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        code, out, err = run(
            capsys,
            folders[0],
            folders[1],
            "--function",
            "--no-gauge",
            "--device",
            "cpu",
            "--nulls",
            2,
            "--cache",
            tmp_path,
        )
    finally:
        logger.removeHandler(handler)
    assert (code, bool(ran)) == (1, True)
    assert heard == []
    assert "kl_base_tuned" in out
    assert "attention_mask" not in out + err
