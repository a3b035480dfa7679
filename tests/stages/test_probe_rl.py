"""Stage ``probe_rl`` on branches that are copies of rungs, so that what it must find is known."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import SCHEMAS, read_table, write_table
from rlheals.stages import probe_rl as stage
from rlheals.stages.base import base
from rlheals.stages.common import Run
from rlheals.stages.dataset import dataset
from rlheals.stages.probe_rl import probe_rl
from rlheals.stages.probe_sft import probe_sft
from rlheals.stages.sft import sft
from tests.common import make_params

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

# Which rung the weights of each branch's only kept update are copied from, by arm and start.
COPIES = {("ppo", 0): 0, ("ppo", 3): 0, ("kl_only", 0): 3, ("kl_only", 3): 3}


def params(*more: str) -> Params:
    return make_params(
        "compute.device=cpu",
        "dataset.sft_rows=8",
        "dataset.rl_prompts=4",
        "dataset.loss_rows=3",
        "dataset.probe.select=2",
        "dataset.probe.confirm=3",
        "base.steps=3",
        "base.warmup_steps=1",
        "base.batch_size=4",
        "sft.steps=3",
        "sft.checkpoints=[0, 3]",
        "sft.batch_size=2",
        "sft.learning_rate=0.01",
        "ppo.starts=[0, 3]",
        "spectra.rl_start=3",
        "ppo.arms=[ppo, kl_only]",
        "ppo.updates=2",
        "ppo.checkpoints=[2]",
        "probe_rl.attempts=2",
        "probe_rl.bootstrap=20",
        *more,
        preset="smoke",
    )


def make_branch(run: Run, arm: str, start: int, rung: int) -> None:
    names = {**run.columns(), "checkpoint_step": start, "arm": arm, "update": 1}
    with publish(run.branch(arm, start)) as out:
        shutil.copytree(run.output("sft") / f"checkpoint-{rung}", out / "update-2")
        for name in stage.COLLECTED:
            row = dict.fromkeys(SCHEMAS[name]) | names
            write_table(pl.DataFrame([row], schema=SCHEMAS[name]), name, out / f"{name}.parquet")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything up to its branches."""
    run = Run(params(), "tiny", 0, tmp_path_factory.mktemp("probe_rl"))
    for before in (dataset, base, sft, probe_sft):
        before(run)
    for (arm, start), rung in COPIES.items():
        make_branch(run, arm, start, rung)
    return run


@pytest.fixture(scope="module")
def finished(prepared: Run) -> Run:
    probe_rl(prepared)
    return prepared


@pytest.fixture
def own(prepared: Run, tmp_path: Path) -> Run:
    """A private copy without the stage's output."""
    shutil.copytree(prepared.root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("probe_rl"))
    return Run(prepared.params, "tiny", 0, tmp_path)


def table(run: Run, name: str, schema: str | None = None) -> pl.DataFrame:
    return read_table(run.output("probe_rl") / f"{name}.parquet", schema or name)


def test_everything_is_published_and_scratch_is_gone(finished: Run) -> None:
    names = {"answers", "probe_summary", "recovery", "recovery_window", "losses", *stage.COLLECTED}
    assert set(verify(finished.output("probe_rl"))) == {f"{name}.parquet" for name in names}
    assert [path for path in (finished.root / "scratch").rglob("*") if path.is_file()] == []


def test_a_copy_of_a_rung_answers_as_the_rung_does(finished: Run) -> None:
    """Each branch got its own weights: the engine was swapped for every one."""
    asked = ["condition", "hand_id", "response", "verdict", "tokens"]
    first = (pl.col("split") == "confirm") & (pl.col("attempt") == 1)
    rungs = read_table(finished.output("probe_sft") / "answers.parquet", "answers").filter(first)
    answers = table(finished, "answers")
    assert set(answers["split"]) == {"confirm"}
    assert set(answers["stage"]) == {"rl"}
    responses = []
    for (arm, start), rung in COPIES.items():
        mine = answers.filter(first & (pl.col("checkpoint_step") == start) & (pl.col("cell_id") == f"{arm}/2"))
        expected = rungs.filter(pl.col("checkpoint_step") == rung)
        assert mine.select(asked).sort(asked).equals(expected.select(asked).sort(asked))
        responses.append(mine["response"].to_list())
    assert responses[0] == responses[1] != responses[2], "the rungs differ, or the test would show nothing"


def test_losses_are_those_of_the_weights_and_begin_with_the_start(finished: Run) -> None:
    ladder = read_table(finished.output("sft") / "losses.parquet", "losses")
    at = {(row["series"], row["step"]): row["nll_per_token"] for row in ladder.to_dicts()}
    losses = table(finished, "losses", "rl_losses")
    assert len(losses) == len(COPIES) * 2 * 3
    for row in losses.to_dicts():
        branch = (row["arm"], row["checkpoint_step"])
        rung = COPIES[branch] if row["update"] else row["checkpoint_step"]
        assert row["nll_per_token"] == pytest.approx(at[row["series"], rung], rel=1e-5)


def test_recovery_compares_every_branch_with_its_start(finished: Run) -> None:
    recovery = table(finished, "recovery")
    assert set(recovery.select("arm", "checkpoint_step", "update").iter_rows()) == {(*key, 2) for key in COPIES}
    assert set(recovery["n"]) == {3}
    assert set(table(finished, "recovery_window")["arm"]) == {"ppo", "kl_only"}
    summary = table(finished, "probe_summary")
    assert set(summary["attempts"]) == {1, 2}


def test_tables_of_the_branches_are_collected(finished: Run) -> None:
    for name in stage.COLLECTED:
        found = table(finished, name).select("arm", "checkpoint_step").rows()
        assert found == [("ppo", 0), ("ppo", 3), ("kl_only", 0), ("kl_only", 3)]


def test_a_killed_stage_does_not_ask_again(own: Run, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = stage.Checkpoints._measure
    done = []

    def stops(self: stage.Checkpoints, branch: stage.Branch, update: int) -> dict[str, pl.DataFrame]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(branch)
        return measured(self, branch, update)

    monkeypatch.setattr(stage.Checkpoints, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        probe_rl(own)
    assert not own.output("probe_rl").exists()
    done.clear()
    probe_rl(own)
    assert done == [("kl_only", 0), ("kl_only", 3)]
    assert verify(own.output("probe_rl")) == verify(finished.output("probe_rl"))


def test_a_missing_branch_is_named(own: Run) -> None:
    shutil.rmtree(own.branch("kl_only", 3))
    with pytest.raises(UserError, match=r"ppo/tiny/0/kl_only/3 is missing though the params declare arm kl_only from"):
        probe_rl(own)


@pytest.mark.parametrize(("arm", "start"), [("grpo", 0), ("ppo", 7)])
def test_a_branch_that_params_do_not_declare_is_refused(own: Run, arm: str, start: int) -> None:
    make_branch(own, arm, start, 0)
    with pytest.raises(UserError, match=rf"{arm}/{start} is stale.*rlheals prune"):
        probe_rl(own)


def test_half_written_branches_do_not_matter(own: Run) -> None:
    (own.branch("ppo", 7).parent / ".7.partial").mkdir()
    assert stage.declared_branches(own) == list(COPIES)


def test_a_corrupted_branch_is_noticed(own: Run) -> None:
    file = own.branch("ppo", 3) / "update-2" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="is corrupted"):
        probe_rl(own)


def test_a_table_of_another_branch_is_noticed(own: Run) -> None:
    shutil.rmtree(own.branch("ppo", 3))
    shutil.copytree(own.branch("ppo", 0), own.branch("ppo", 3))
    with pytest.raises(UserError, match="another checkpoint_step than 3"):
        probe_rl(own)


def test_an_update_that_was_not_kept_is_told(own: Run) -> None:
    changed = Run(params("ppo.updates=4", "ppo.checkpoints=[2, 4]"), "tiny", 0, own.root)
    with pytest.raises(UserError, match="update-4"):
        probe_rl(changed)
    assert not own.output("probe_rl").exists()
