"""Build the tables of the study: hands, SFT rows, RL prompts, probe sets, loss sets and the leakage report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rlheals.publish import publish
from rlheals.reporting.schemas import write_table
from rlheals.stages.common import Run, run_stage
from rlheals.tasks import DatasetSizes, make_task

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Dataset
    from rlheals.tasks import TaskData

TABLES = ("hands", "sft", "rl_prompts", "probes", "loss_sets")


def sizes(dataset: Dataset) -> DatasetSizes:
    """The sizes a task builds its tables with, from the ``dataset`` block of params."""
    return DatasetSizes(
        sft_rows=dataset.sft_rows,
        rl_prompts=dataset.rl_prompts,
        select=dataset.probe.select,
        confirm=dataset.probe.confirm,
        loss_rows=dataset.loss_rows,
    )


def write(data: TaskData, directory: Path) -> None:
    """Write every table as ``<name>.parquet`` and the leakage report as ``leakage.json``.

    Raises:
        UserError: a table does not have the columns of its schema.
    """
    for name in TABLES:
        write_table(getattr(data, name), name, directory / f"{name}.parquet")
    (directory / "leakage.json").write_text(json.dumps(data.leakage, indent=1, sort_keys=True) + "\n")


def dataset(run: Run) -> None:
    """Stage entry."""
    task = make_task(run.params.task_spec)
    data = task.build(run.spec.prompt_format, sizes(run.params.dataset), run.seed)
    with publish(run.output("dataset")) as directory:
        write(data, directory)


if __name__ == "__main__":
    run_stage(dataset)
