"""Stage ``spectra`` on a study whose RL branch is a copy of a rung, so that part of the answer is known."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.publish import verify
from rlheals.reporting.schemas import read_table
from rlheals.spectra.matrix_question import MatrixQuestion
from rlheals.stages.base import base
from rlheals.stages.common import Run
from rlheals.stages.dataset import dataset
from rlheals.stages.probe_sft import probe_sft
from rlheals.stages.sft import sft
from rlheals.stages.spectra import PAIRS, spectra
from tests.stages.test_probe_rl import make_branch, params

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.spectra.results import Finding

SMALL = [
    "compute.threads=1",
    "spectra.rl_start=3",
    "spectra.nulls=2",
    "spectra.prompts=2",
    "spectra.modules=[q_proj, down_proj]",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(params(*SMALL), "tiny", 0, tmp_path_factory.mktemp("spectra"))
    for before in (dataset, base, sft, probe_sft):
        before(run)
    make_branch(run, "ppo", 3, 3)
    return run


@pytest.fixture(scope="module")
def finished(prepared: Run) -> Run:
    spectra(prepared)
    return prepared


@pytest.fixture
def own(prepared: Run, tmp_path: Path) -> Run:
    shutil.copytree(prepared.root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("spectra"))
    return Run(prepared.params, "tiny", 0, tmp_path)


def test_everything_is_published_and_scratch_is_gone(finished: Run) -> None:
    names = {"spectra", "verdicts", "gauge", "function_drift", "ladder"}
    assert set(verify(finished.output("spectra"))) == {f"{name}.parquet" for name in names}
    assert [path for path in (finished.root / "scratch").rglob("*") if path.is_file()] == []


def test_a_branch_that_is_its_start_is_unchanged(finished: Run) -> None:
    verdicts = read_table(finished.output("spectra") / "verdicts.parquet", "spectra_verdicts")
    assert verdicts["pair"].unique(maintain_order=True).to_list() == [f"{a} → {b}" for a, b in PAIRS]
    copied = verdicts.filter(pl.col("pair") == "sft_end → rl")
    assert set(copied["verdict"]) == {"unchanged"}
    trained = verdicts.filter((pl.col("pair") == "base → sft_end") & (pl.col("module") == "down_proj"))
    assert (trained["relative_change"] > 0).all()


def test_the_ladder_has_every_rung(finished: Run) -> None:
    ladder = read_table(finished.output("spectra") / "ladder.parquet", "spectra_ladder")
    assert set(ladder["checkpoint_step"]) == {0, 3}
    assert set(ladder.filter(pl.col("checkpoint_step") == 0)["value"]) == {0.0}


def test_a_killed_stage_goes_on_where_it_stopped(own: Run, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = MatrixQuestion.answer, []

    def stops(self: MatrixQuestion) -> Finding:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(self.matrix.name)
        return answer(self)

    monkeypatch.setattr(MatrixQuestion, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        spectra(own)
    assert not own.output("spectra").exists()
    asked.clear()
    monkeypatch.setattr(MatrixQuestion, "answer", answer)
    spectra(own)
    assert verify(own.output("spectra")) == verify(finished.output("spectra"))


def test_two_processes_write_the_same_tables(own: Run, finished: Run) -> None:
    several = own.params.model_copy(update={"compute": own.params.compute.model_copy(update={"threads": 2})})
    spectra(replace(own, params=several))
    assert verify(own.output("spectra")) == verify(finished.output("spectra"))


def test_a_missing_branch_is_told(own: Run) -> None:
    shutil.rmtree(own.branch("ppo", 3))
    with pytest.raises(UserError, match="does not exist"):
        spectra(own)
