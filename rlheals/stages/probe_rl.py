"""Ask every RL branch the confirm hands of its start, and measure what RL gave back."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError, disk_errors
from rlheals.evaluation.probes import Prober, summarise
from rlheals.evaluation.recovery import STAGE, cell_id, recovery_table, recovery_windows
from rlheals.progress import Progress
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import SCHEMAS, read_table, write_table
from rlheals.stages.common import Run, resolve_device, run_stage
from rlheals.stages.probe_sft import make_prober
from rlheals.stages.sft import loss_sets

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.evaluation.dialogue import EncodedRow
    from rlheals.inference.fingerprint import Proof

COLLECTED = ("rl_training", "advantages", "doctor")
"""Tables that a branch writes about its training; here those of all branches are put below each other."""
Branch = tuple[str, int]
"""Arm and start."""


def probe_rl(run: Run) -> None:
    """Publish ``data/<profile>/probe_rl/<model>/<seed>``.

    That is answers.parquet, probe_summary.parquet, recovery.parquet, recovery_window.parquet, losses.parquet (schema
    ``rl_losses``) and the training curves, advantages and doctor's findings of all branches.
    """
    params, dataset, ladder = run.params, run.output("dataset"), run.output("probe_sft")
    inputs = [verify(dataset), verify(ladder)]
    branches = declared_branches(run)
    inputs += [verify(run.branch(*branch)) for branch in branches]
    collected = {name: collect(run, branches, name) for name in COLLECTED}
    blocks = (params.probe_rl, params.ppo.checkpoints, run.answering(), params.task, params.compute)
    scratch = run.scratch("probe_rl", *blocks, params.sft.ood_loss_target, inputs)
    hands = read_table(dataset / "probes.parquet", "probes").filter(pl.col("split") == "confirm")
    before = read_table(ladder / "answers.parquet", "answers")
    max_ood = json.loads((ladder / "selection.json").read_text())["max_ood"]
    answers, losses = _probe(run, branches, hands, scratch)
    recovery = recovery_table(answers, before, max_ood)
    windows = recovery_windows(answers, before, params.probe_rl.bootstrap, run.seed)
    starts = losses_of_starts(read_table(ladder / "losses.parquet", "losses"), branches)
    with publish(run.output("probe_rl")) as directory:
        write_table(answers, "answers", directory / "answers.parquet")
        summary = summarise(answers, [1, params.probe_rl.attempts])
        write_table(summary, "probe_summary", directory / "probe_summary.parquet")
        write_table(recovery, "recovery", directory / "recovery.parquet")
        write_table(windows, "recovery_window", directory / "recovery_window.parquet")
        write_table(pl.concat([starts, losses]), "rl_losses", directory / "losses.parquet")
        for name, table in collected.items():
            write_table(table, name, directory / f"{name}.parquet")
    shutil.rmtree(scratch, ignore_errors=True)


def declared_branches(run: Run) -> list[Branch]:
    """Arm and start of every branch that params declare, which must be exactly those on disk.

    Raises:
        UserError: a declared branch is missing, or there is one that params do not declare.
    """
    settings = run.params.ppo
    declared: list[Branch] = [(arm, start) for arm in settings.arms for start in settings.starts]
    for arm, start in declared:
        if not run.branch(arm, start).is_dir():
            raise UserError(
                f"{run.branch(arm, start)} is missing though the params declare arm {arm} from step {start}; "
                "run `dvc repro`, or take it out of ppo.arms or ppo.starts."
            )
    known = {run.branch(arm, start) for arm, start in declared}
    # Hidden folders are half written; publishing renames them or throws them away.
    stale = sorted(path for path in run.output("ppo").glob("[!.]*/[!.]*") if path not in known)
    if stale:
        raise UserError(
            f"{stale[0]} is stale: the params do not declare this arm and start; remove it with "
            "`rlheals prune`, or declare it in ppo.arms and ppo.starts."
        )
    return declared


def collect(run: Run, branches: list[Branch], name: str) -> pl.DataFrame:
    """One table of all branches, below each other.

    Raises:
        UserError: a branch's table is missing, of another schema, or about another branch.
    """
    tables = []
    for arm, start in branches:
        path = run.branch(arm, start) / f"{name}.parquet"
        table = read_table(path, name)
        expected = {**run.columns(), "checkpoint_step": start, "arm": arm}
        odd = [key for key, value in expected.items() if set(table[key]) - {value}]
        if odd:
            raise UserError(f"{path} holds rows of another {odd[0]} than {expected[odd[0]]}; delete {path.parent}.")
        tables.append(table)
    return pl.concat(tables)


def losses_of_starts(ladder: pl.DataFrame, branches: list[Branch]) -> pl.DataFrame:
    """The ladder's teacher-forced losses at each start, as update 0 of its branches (schema ``rl_losses``).

    Raises:
        UserError: the ladder has no losses at a start.
    """
    tables = []
    for arm, start in branches:
        rows = ladder.filter(pl.col("step") == start)
        if rows.is_empty():
            raise UserError(f"losses.parquet of probe_sft has no row at step {start}; run `dvc repro`.")
        columns = {"checkpoint_step": pl.lit(start, pl.Int64), "arm": pl.lit(arm), "update": pl.lit(0, pl.Int64)}
        tables.append(rows.with_columns(**columns).select(list(SCHEMAS["rl_losses"])))
    return pl.concat(tables)


def _probe(run: Run, branches: list[Branch], hands: pl.DataFrame, scratch: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Answers and losses of every kept update of every branch."""
    updates = run.params.ppo.checkpoints
    prober = make_prober(run, update_folder(run, branches[0], updates[0]))
    path = run.output("dataset") / "loss_sets.parquet"
    rows = loss_sets(prober.dialogue, path, run.params.sft.ood_loss_target)
    bar = Progress("probe_rl", len(branches) * len(updates) * len(hands), "hand")
    probe = Checkpoints(run, scratch, prober, hands, rows, bar)
    with closing(prober.engine):
        pairs = [probe.tables(branch, update) for branch in branches for update in updates]
    return pl.concat([answers for answers, _ in pairs]), pl.concat([losses for _, losses in pairs])


def update_folder(run: Run, branch: Branch, update: int) -> Path:
    """The model folder of one kept update."""
    return run.branch(*branch) / f"update-{update}"


@dataclass
class Checkpoints:
    """One live engine that takes the weights of one RL checkpoint after the other; what is in scratch is not redone."""

    run: Run
    scratch: Path
    prober: Prober
    hands: pl.DataFrame
    loss_rows: dict[str, list[EncodedRow]]
    bar: Progress
    proof: Proof | None = None

    def tables(self, branch: Branch, update: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Schemas ``answers`` and ``rl_losses`` of one checkpoint."""
        name = f"{branch[0]}-{branch[1]}-{update}"
        files = {schema: self.scratch / f"{schema}-{name}.parquet" for schema in ("answers", "rl_losses")}
        if all(file.is_file() for file in files.values()):
            self.bar.update(len(self.hands))
        else:
            for schema, table in self._measure(branch, update).items():
                _write(table, schema, files[schema])
        return read_table(files["answers"], "answers"), read_table(files["rl_losses"], "rl_losses")

    def _measure(self, branch: Branch, update: int) -> dict[str, pl.DataFrame]:
        losses = self._make_live(branch, update)
        arm, start = branch
        columns: dict[str, Any] = {
            **self.run.columns(),
            "stage": STAGE,
            "checkpoint_step": start,
            "cell_id": cell_id(arm, update),
        }
        attempts = self.run.params.probe_rl.attempts
        note = f"{arm} from {start}"
        answers = self.prober.answers(self.hands, attempts, columns, lambda count: self.bar.update(count, note))
        return {"answers": answers, "rl_losses": losses}

    def _make_live(self, branch: Branch, update: int) -> pl.DataFrame:
        """Give the engine the checkpoint's weights, and measure its losses on the copy that proves them."""
        from rlheals.evaluation.losses import teacher_forced_loss
        from rlheals.inference.live import serve
        from rlheals.models.checkpoint import load_model

        folder, dtype = update_folder(self.run, branch, update), self.run.spec.dtype
        model = load_model(folder, dtype)
        self.proof = serve(self.prober.engine, model, str(folder), dtype, self.proof)
        model = model.to(resolve_device(self.run.params.compute.device))
        names = {"checkpoint_step": branch[1], "arm": branch[0], "update": update}
        records = [
            {**self.run.columns(), **names, "series": series, **teacher_forced_loss(model, rows)._asdict()}
            for series, rows in self.loss_rows.items()
        ]
        return pl.DataFrame(records, schema=SCHEMAS["rl_losses"])


def _write(table: pl.DataFrame, schema: str, file: Path) -> None:
    """Write a table in one rename, so that a kill leaves none or all of it."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        write_table(table, schema, partial)
        partial.rename(file)


if __name__ == "__main__":
    run_stage(probe_rl)
