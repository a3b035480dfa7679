from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from rlheals import cli
from rlheals.commands.ppo import bars
from rlheals.reporting.schemas import write_table
from tests.training.ppo.test_doctor import advantages, ramp, table

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ppo", *arguments])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


def branch(folder: Path, training: pl.DataFrame) -> str:
    write_table(training, "rl_training", folder / "rl_training.parquet")
    write_table(advantages([-1.0, 0.2, 0.3, 1.0]), "advantages", folder / "advantages.parquet")
    return str(folder)


def test_a_healthy_run_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", branch(tmp_path, table()))
    assert code == 0
    assert out == f"{tmp_path}: 0 error, 0 warning, 0 note, 23 ok\n"
    _, out, _ = run(capsys, "doctor", str(tmp_path), "--all")
    assert "explained_variance" in out


def test_an_error_exits_1_with_cause_and_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", branch(tmp_path, table(format_error_rate=ramp(0.0, 0.9))))
    assert code == 1
    assert "ppo from step 40\n  error   format_collapse" in out
    assert "forgets the answer format" in out
    assert out.rstrip().endswith("change ppo.change.kl_coefficient.")


def test_a_warning_alone_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", branch(tmp_path, table(solved_rate=0.99)))
    assert code == 0
    assert "1 warning" in out


def test_json_holds_findings_and_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = branch(tmp_path, table(clip_fraction=0.9))
    code, out, _ = run(capsys, "doctor", folder, "--advantages", "--json")
    told = json.loads(out)
    assert (code, told["checks"]) == (1, 23)
    assert [finding["check"] for finding in told["findings"]] == ["clip_fraction"]
    assert told["advantages"][0]["n"] == 4


def test_advantages_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "doctor", branch(tmp_path, table()), "--advantages")
    assert "update   1     4" in out
    assert "█" in out


def test_bars_never_hide_an_occupied_bin() -> None:
    assert bars([0, 1, 1000]) == " ▁█"
    assert bars([]) == ""


def test_a_folder_without_the_table_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "doctor", str(tmp_path))
    assert code == 2
    assert "rl_training.parquet does not exist" in err


def test_help_gives_its_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--help")
    assert code == 0
    assert "Exit codes: 0 no finding of level error, 1 at least one, 2 bad input" in " ".join(out.split())
