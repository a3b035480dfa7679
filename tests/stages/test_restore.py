"""Stage ``restore`` on a study whose RL branch is a copy of a rung, so that part of the answer is known."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.publish import verify
from rlheals.reporting.schemas import read_table
from rlheals.restoration import grid
from rlheals.stages import restore as stage
from rlheals.stages.base import base
from rlheals.stages.common import Run
from rlheals.stages.dataset import dataset
from rlheals.stages.probe_sft import probe_sft
from rlheals.stages.restore import restore
from rlheals.stages.sft import sft
from tests.stages.test_probe_rl import make_branch, params

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from rlheals.restoration.edit import Edit

SMALL = [
    "spectra.rl_start=3",
    "sft.checkpoints=[0, 2, 3]",
    "ppo.starts=[2, 3]",
    "ppo.arms=[ppo]",
    "restore.layer_blocks=2",
    "restore.heads=[0.2, 1.0]",
    "restore.doses=[0.5]",
    "restore.references=[base]",
    "restore.screen=1",
    "restore.best=2",
    "restore.id_budget=1.0",
]
UNTIMED = pl.exclude("seconds")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(params(*SMALL), "tiny", 0, tmp_path_factory.mktemp("restore"))
    for before in (dataset, base, sft, probe_sft):
        before(run)
    make_branch(run, "ppo", 3, 2)
    return run


@pytest.fixture(scope="module")
def calls() -> Counter[str]:
    """How often the engine was started and given a full state while the stage ran."""
    return Counter()


@pytest.fixture(scope="module")
def finished(prepared: Run, calls: Counter[str]) -> Run:
    started, swapped = TransformersEngine.__init__, TransformersEngine.swap

    def start(self: TransformersEngine, *arguments: Any) -> None:
        calls["start"] += 1
        started(self, *arguments)

    def swap(self: TransformersEngine, state_dict: Mapping[str, Tensor]) -> None:
        calls["swap"] += 1
        swapped(self, state_dict)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "__init__", start)
        patch.setattr(TransformersEngine, "swap", swap)
        restore(prepared)
    return prepared


@pytest.fixture
def own(prepared: Run, tmp_path: Path) -> Run:
    shutil.copytree(prepared.root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("restore"))
    return Run(prepared.params, "tiny", 0, tmp_path)


def table(run: Run, name: str, schema: str | None = None) -> pl.DataFrame:
    return read_table(run.output("restore") / f"{name}.parquet", schema or name)


def test_everything_is_published_and_scratch_is_gone(finished: Run) -> None:
    assert set(verify(finished.output("restore"))) == {"cells.parquet", "answers.parquet", "probe_summary.parquet"}
    assert [path for path in (finished.root / "scratch").rglob("*") if path.is_file()] == []


def test_cells_are_screened_and_contrasts_confirmed_with_their_controls(finished: Run) -> None:
    cells = table(finished, "cells")
    select, confirm = (cells.filter(pl.col("split") == split) for split in ("select", "confirm"))
    assert set(select["n"]) == {1}
    assert set(confirm["n"]) == {3}
    assert not set(select["group"]) & {"control"}
    assert select["cell_id"].is_unique().all()
    edits = confirm.filter(pl.col("group") != "control")
    assert set(edits["cell_id"]) >= set(select.filter("contrast")["cell_id"])
    assert edits["contrast"].sum() == 7
    assert len(edits) == 7 + 2
    assert edits["p_holm"].is_not_null().all()
    assert edits["p_control"].is_not_null().all()
    controls = confirm.filter(pl.col("group") == "control")
    assert set(edits["best_control"]) <= set(controls["cell_id"])
    assert set(controls["control_of"]) - {""} == set(edits["cell_id"])
    trips = controls.filter(pl.col("operator") == "round_trip")
    assert sorted(trips["target"]) == ["rl", "sft_end"]
    assert (trips["change_norm"] < 1e-5).all()
    assert controls["p_holm"].is_null().all()


def test_controls_change_the_weights_as_much_as_their_cell(finished: Run) -> None:
    cells = table(finished, "cells").filter(pl.col("split") == "confirm")
    norms = dict(cells.select("cell_id", "change_norm").iter_rows())
    equal = cells.filter(pl.col("operator").is_in(["noise", "interpolate"]) & (pl.col("control_of") != ""))
    assert len(equal) > 10
    for of, norm in equal.select("control_of", "change_norm").iter_rows():
        assert norm <= norms[of] * (1 + 1e-3)
    noise = equal.filter(pl.col("operator") == "noise")
    assert [norms[of] for of in noise["control_of"]] == pytest.approx(noise["change_norm"].to_list(), rel=1e-3)


def test_unedited_models_answer_as_in_probe_sft(finished: Run) -> None:
    """The engine went through every edit of SFT_End and back before; and the swap of all matrices is an edit."""
    asked = ["condition", "hand_id", "response", "verdict", "tokens"]
    answers = table(finished, "answers")
    assert set(answers["split"]) == {"confirm"}
    assert set(answers["stage"]) == {"edit"}
    assert set(answers["condition"]) == {"id", "ood"}
    first = (pl.col("attempt") == 1) & (pl.col("split") == "confirm") & pl.col("condition").is_in(["id", "ood"])
    rungs = read_table(finished.output("probe_sft") / "answers.parquet", "answers").filter(first)
    for name, step in {"unedited-sft_end": 3, "unedited-rl": 2, "unedited-base": 0}.items():
        mine = answers.filter(pl.col("cell_id") == name)
        expected = rungs.filter(pl.col("checkpoint_step") == step)
        assert mine.select(asked).sort(asked).equals(expected.select(asked).sort(asked))
    edited = answers.filter(pl.col("cell_id").str.starts_with("swap_all_base-to-sft_end_all"))
    assert edited["response"].to_list() != answers.filter(pl.col("cell_id") == "unedited-sft_end")["response"].to_list()


def test_the_summary_covers_both_passes(finished: Run) -> None:
    summary, cells = table(finished, "probe_summary"), table(finished, "cells")
    joined = cells.join(summary.filter(pl.col("condition") == "ood"), on=["cell_id", "split"])
    assert len(joined) == len(cells)
    assert joined["ood_accuracy"].to_list() == joined["accuracy"].to_list()
    named = summary.filter(pl.col("cell_id") == "unedited-sft_2")
    assert set(named["checkpoint_step"]) == {2}


def test_the_engine_is_started_once_and_loaded_once_a_target(finished: Run, calls: Counter[str]) -> None:
    unedited = table(finished, "probe_summary").filter(pl.col("cell_id").str.starts_with("unedited-"))
    loads = unedited.select("cell_id", "split").unique()
    assert dict(calls) == {"start": 1, "swap": len(loads)}


def test_a_killed_stage_goes_on_at_the_next_cell(own: Run, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while screening, again while confirming; in the end the tables are those of a run in one piece."""
    edit_model, done, limits = grid.edit_model, [], [0]

    def stops(edit: Edit, models: grid.ModelSet) -> grid.EditedModel:
        if len(done) == limits[-1]:
            raise KeyboardInterrupt
        done.append(edit.cell_id)
        return edit_model(edit, models)

    monkeypatch.setattr(grid, "edit_model", stops)
    cells = table(finished, "cells")
    for limit in (4, len(cells) - 5):
        limits.append(limit)
        with pytest.raises(KeyboardInterrupt):
            restore(own)
        assert not own.output("restore").exists()
    limits.append(len(cells))
    restore(own)
    assert done == cells["cell_id"].to_list(), "each cell once, in the order of the table"
    assert table(own, "cells").select(UNTIMED).equals(cells.select(UNTIMED))
    assert table(own, "answers").equals(table(finished, "answers"))


def test_the_branch_is_the_one_that_params_name(own: Run) -> None:
    shutil.rmtree(own.branch("ppo", 3))
    with pytest.raises(UserError, match="ppo/tiny/0/ppo/3 does not exist"):
        restore(own)


def test_a_cache_that_is_too_small_ends_the_stage_at_once(own: Run) -> None:
    tight = Run(params(*SMALL, "restore.cache_gib=1.0e-6"), "tiny", 0, own.root)
    with pytest.raises(UserError, match=r"restore\.cache_gib"):
        restore(tight)


def test_models_have_the_names_and_steps_of_the_study(finished: Run) -> None:
    chosen = json.loads((finished.output("probe_sft") / "selection.json").read_text())
    steps = {"base": 0, "sft_max_ood": chosen["max_ood"], "sft_end": 3, "rl": 3, "sft_2": 2, "sft_3": 3}
    assert stage.checkpoint_steps(finished) == steps
    assert set(stage.model_folders(finished)) == set(steps)
    alone = Run(params(*SMALL, "restore.starts=false"), "tiny", 0, finished.root)
    assert set(stage.model_folders(alone)) == {"base", "sft_max_ood", "sft_end", "rl"}
