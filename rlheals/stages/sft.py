"""Fine-tune the base on the dataset's rows and publish every rung of the ladder with its losses."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import SCHEMAS, read_table, write_table
from rlheals.stages.common import Run, resolve_device, run_stage

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.evaluation.dialogue import Dialogue, EncodedRow
    from rlheals.training.sft import Curves

SERIES = ("train_id", "test_id", "ood")
MISMATCHED = "ood_mismatched"
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system answers that cannot link these two paths."""


def sft(run: Run) -> None:
    """Publish ``data/<profile>/sft/<model>/<seed>``: ``checkpoint-<step>/`` folders, losses and training curves."""
    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.models.checkpoint import load_model, load_tokenizer
    from rlheals.training.sft import RUNGS, SftRun, train_sft

    dataset, base = run.output("dataset"), run.output("base")
    inputs = [verify(dataset), verify(base)]
    scratch = run.scratch("sft", run.params.sft, run.params.compute, run.spec, inputs)
    device = resolve_device(run.params.compute.device)
    tokenizer = load_tokenizer(base)
    dialogue = Dialogue(tokenizer)
    # Weights stay float32 whatever the model's dtype: bfloat16 rounds away steps of a usual learning rate.
    curves = train_sft(
        load_model(base, "float32", device),
        SftRun(
            tokenizer=tokenizer,
            rows=encode(dialogue, read_table(dataset / "sft.parquet", "sft")),
            loss_sets=loss_sets(dialogue, dataset / "loss_sets.parquet", run.params.sft.ood_loss_target),
            settings=run.params.sft,
            seed=run.seed,
            scratch=scratch,
            bfloat16=run.spec.dtype == "bfloat16",
            device=device,
        ),
    )
    _publish(run, scratch / RUNGS, curves)
    shutil.rmtree(scratch, ignore_errors=True)


def encode(dialogue: Dialogue, table: pl.DataFrame) -> list[EncodedRow]:
    """Tokens of a table with columns ``prompt`` and ``completion``."""
    return dialogue.encode(list(table.select("prompt", "completion").iter_rows()))


def loss_sets(dialogue: Dialogue, path: Path, ood_target: str) -> dict[str, list[EncodedRow]]:
    """The encoded rows of each loss series; the series ``ood`` holds the target that params asks for.

    Raises:
        UserError: a series has no rows.
    """
    table = read_table(path, "loss_sets")
    sources = {series: series for series in SERIES}
    if ood_target == "paper_mismatched":
        sources["ood"] = MISMATCHED
    encoded = {}
    for series, source in sources.items():
        rows = table.filter(pl.col("series") == source)
        if rows.is_empty():
            raise UserError(f"{path} has no rows of series {source}, which sft.ood_loss_target {ood_target} needs.")
        encoded[series] = encode(dialogue, rows)
    return encoded


def _publish(run: Run, rungs: Path, curves: Curves) -> None:
    with publish(run.output("sft")) as directory:
        for step in run.params.sft.checkpoints:
            _link_tree(rungs / f"checkpoint-{step}", directory / f"checkpoint-{step}")
        losses = _table("losses", [{**run.columns(), **row} for row in curves.losses])
        training = _table("training", [{**run.columns(), "stage": "sft", **row} for row in curves.training])
        write_table(losses, "losses", directory / "losses.parquet")
        write_table(training, "training", directory / "training.parquet")


def _table(schema: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMAS[schema])


def _link_tree(source: Path, target: Path) -> None:
    """Hard links instead of copies where possible: a ladder of large models might not fit twice on the disk."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copy2(source, target)


if __name__ == "__main__":
    run_stage(sft)
