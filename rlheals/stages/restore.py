"""Weight edits on SFT_End, the RL branch and the rungs RL starts from: screened on ``select``, told on ``confirm``."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.evaluation.probes import summarise
from rlheals.progress import Progress
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import read_table, write_table
from rlheals.stages.common import Run, resolve_device, run_stage
from rlheals.stages.probe_sft import make_prober
from rlheals.stages.spectra import BASE, END, GIB, MAX_OOD, RL, RUNG, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from rlheals.restoration.grid import Finished, Grid, ModelSet
    from rlheals.restoration.plan import Cell, Subjects

STAGE = "edit"
SELECT, CONFIRM = "select", "confirm"
START = "sft_"
"""Before the step in the name of a rung that RL starts from."""


def restore(run: Run) -> None:
    """Publish ``data/<profile>/restore/<model>/<seed>``: cells, answers (of ``confirm``) and probe_summary."""
    from rlheals.restoration.grid import ModelSet
    from rlheals.spectra.store import FactorStore

    params = run.params
    inputs = [verify(run.output(stage)) for stage in ("dataset", "base", "sft", "probe_sft")]
    inputs.append(verify(run.branch(params.spectra.rl_arm, params.spectra.rl_start)))
    branch = (params.spectra.rl_arm, params.spectra.rl_start, params.ppo.updates, params.ppo.starts)
    blocks = (params.restore, *branch, run.answering(), params.task, params.compute)
    scratch = run.scratch("restore", *blocks, inputs)
    device = resolve_device(params.compute.device)
    store = FactorStore(scratch / "factors", round(params.restore.cache_gib * GIB), device)
    with ModelSet(model_folders(run), store) as models:
        cells, answers = _evaluate(run, models, scratch)
    with publish(run.output("restore")) as directory:
        write_table(cells, "cells", directory / "cells.parquet")
        write_table(answers.filter(pl.col("split") == CONFIRM), "answers", directory / "answers.parquet")
        write_table(summarise(answers), "probe_summary", directory / "probe_summary.parquet")
    print(
        f"restore: {len(models.decomposed)} tensors used decomposed, {store.factorised} decomposed now", file=sys.stderr
    )
    shutil.rmtree(scratch, ignore_errors=True)


def model_folders(run: Run) -> dict[str, Path]:
    """Folder of every reference and target, by the name it has in the tables.

    Raises:
        UserError: one is missing.
    """
    found = folders(run)
    starts = {start_name(step): found[f"{RUNG}{step}"] for step in run.params.ppo.starts}
    return {name: found[name] for name in (BASE, MAX_OOD, END, RL)} | (starts if run.params.restore.starts else {})


def start_name(step: int) -> str:
    """Name of a rung that RL starts from."""
    return f"{START}{step}"


def checkpoint_steps(run: Run) -> dict[str, int]:
    """The column ``checkpoint_step`` of every model; of the RL branch, as everywhere, the rung it starts from."""
    chosen = json.loads((run.output("probe_sft") / "selection.json").read_text())
    own = {BASE: 0, MAX_OOD: chosen["max_ood"], END: chosen["end"], RL: run.params.spectra.rl_start}
    return own | {start_name(step): step for step in run.params.ppo.starts}


def hands_of(probes: pl.DataFrame, split: str, count: int | None = None) -> pl.DataFrame:
    """The first ``count`` hands, or all, of the conditions that edits are judged by."""
    from rlheals.restoration.table import CONDITIONS

    asked = probes.filter((pl.col("split") == split) & pl.col("condition").is_in(CONDITIONS))
    return asked if count is None else asked.group_by("condition", maintain_order=True).head(count)


def _evaluate(run: Run, models: ModelSet, scratch: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables ``cells`` and ``answers`` of both passes."""
    from rlheals.restoration.plan import plan

    settings = run.params.restore
    starts = [start_name(step) for step in run.params.ppo.starts] if settings.starts else []
    subjects = models.subjects(starts)
    cells = plan(settings, subjects)
    models.check_room(cells)
    probes = read_table(run.output("dataset") / "probes.parquet", "probes")
    grid = make_grid(run, models, scratch)
    passes = Passes(run, grid, subjects)
    others = [*settings.references, MAX_OOD]
    with closing(grid.engine):
        screened = passes.ask(cells, hands_of(probes, SELECT, settings.screen), SELECT, [MAX_OOD])
        confirmed = passes.ask(passes.to_confirm(screened), hands_of(probes, CONFIRM), CONFIRM, others)
    return pl.concat([screened.cells, confirmed.cells]), pl.concat([screened.answers, confirmed.answers])


def make_grid(run: Run, models: ModelSet, scratch: Path) -> Grid:
    """The live engine, started once, and everything that is asked of it."""
    from rlheals.models.checkpoint import load_model
    from rlheals.restoration.grid import Grid

    prober, steps = make_prober(run, models.weights[END].path), checkpoint_steps(run)

    def probe(hands: pl.DataFrame, target: str, cell_id: str, count: Callable[[int], None]) -> pl.DataFrame:
        columns: dict[str, Any] = {
            **run.columns(),
            "stage": STAGE,
            "checkpoint_step": steps[target],
            "cell_id": cell_id,
        }
        return prober.answers(hands, 1, columns, count)

    def load(name: str) -> Any:
        return load_model(models.weights[name].path, run.spec.dtype)

    return Grid(models, prober.engine, probe, scratch / "cells", load, run.spec.dtype)


@dataclass(frozen=True)
class Pass:
    """What one pass found: the finished cells, and both tables of them."""

    finished: list[Finished]
    cells: pl.DataFrame
    answers: pl.DataFrame


@dataclass(frozen=True)
class Passes:
    """The two passes over cells: ``select``, then ``confirm``."""

    run: Run
    grid: Grid
    subjects: Subjects

    def ask(self, cells: Sequence[Cell], hands: pl.DataFrame, split: str, others: Iterable[str]) -> Pass:
        """Ask ``hands`` of every cell, of the targets unedited, and of the models ``others``."""
        from rlheals.restoration.table import cells_table

        targets = list(dict.fromkeys(cell.edit.target for cell in cells))
        names = list(dict.fromkeys([*others, *targets]))
        bar = Progress(f"restore: {split}", (len(cells) + len(names)) * len(hands), "hand")
        unedited = {name: self.grid.unedited(name, hands, split, bar.update) for name in names if name not in targets}
        finished: list[Finished] = []
        for target in targets:  # one after the other: each is made live once
            unedited[target] = self.grid.unedited(target, hands, split, bar.update)
            finished += self.grid.run([c for c in cells if c.edit.target == target], hands, split, bar.update)
        table = cells_table(finished, unedited, self.run.columns(), split)
        answers = pl.concat([*(unedited[name] for name in names), *(each.answers for each in finished)])
        return Pass(finished, table, answers)

    def to_confirm(self, screened: Pass) -> list[Cell]:
        """The pre-registered contrasts, the best repairs, the controls of both, and one round trip a target."""
        from rlheals.restoration.plan import controls_for, in_order, round_trip
        from rlheals.restoration.table import best_repairs

        settings = self.run.params.restore
        best = best_repairs(screened.cells, settings.best, settings.id_budget)
        chosen = [each for each in screened.finished if each.cell.contrast or each.cell.cell_id in best]
        cells = [each.cell for each in chosen]
        for each in chosen:
            distances = self.grid.models.distances(each.cell.edit)
            cells += controls_for(each.cell, each.facts.norms, distances, settings.control_draws)
        cells += [round_trip(target) for target in dict.fromkeys(each.cell.edit.target for each in chosen)]
        self.grid.models.check_room(cells)
        return in_order(cells, self.subjects)


if __name__ == "__main__":
    run_stage(restore)
