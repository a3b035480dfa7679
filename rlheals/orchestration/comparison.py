"""The table that compares the experiments of a sweep."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from rlheals.errors import disk_errors
from rlheals.orchestration.sweep import dvc, leaves
from rlheals.params import PARAMS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from rlheals.orchestration.schedule import Row
    from rlheals.orchestration.sweep import Sweep

TABLES = Path("reports/sweeps")
SHOWN = ("rev", "typ", "Created", "parent")
"""Columns of ``dvc exp show --csv`` beside the name, metrics, params and dependencies."""


def comparison(sweep: Sweep, rows: Sequence[Row]) -> pl.DataFrame:
    """One row an experiment, in the order of the grid, failed ones too.

    Columns: those of ``dvc exp show --csv`` (Experiment, rev, typ, Created, parent, the metrics, the params the grid
    sets), then verdict, seconds and message.
    """
    import polars as pl

    planned = [
        {"Experiment": each.name} | {key: _cell(value) for key, value in each.params.items()}
        for each in sweep.experiments
    ]
    ended = [
        {"Experiment": row.name, "verdict": row.verdict.value, "seconds": round(row.seconds, 1), "message": row.message}
        for row in rows
    ]
    found = _shown(sweep)
    table = pl.DataFrame(planned, infer_schema_length=None).join(found, on="Experiment", how="left")
    table = table.join(pl.DataFrame(ended, infer_schema_length=None), on="Experiment", how="left")
    front = ["Experiment", *(name for name in SHOWN if name in found.columns)]
    metrics = [name for name in found.columns if name not in front]
    keys = list(dict.fromkeys(key for row in planned for key in row if key != "Experiment"))
    return table.select(*front, *metrics, *keys, "verdict", "seconds", "message")


def _cell(value: Any) -> Any:
    """A params value as a table cell: DVC writes lists and empty blocks as text."""
    return str(value) if isinstance(value, list | dict) else value


def _shown(sweep: Sweep) -> pl.DataFrame:
    """Rows of the sweep's experiments in ``dvc exp show --csv``, with their metrics and without params and deps."""
    import polars as pl

    text = dvc(sweep.root, "exp", "show", "--csv", "--hide-workspace", "--precision", "10", "--rev", sweep.baseline)
    shown = pl.read_csv(io.StringIO(text), infer_schema_length=None, null_values=["", "!", "-"])
    raw = YAML(typ="safe").load(sweep.experiments[0].params_text)
    params = {key for key, _ in leaves(raw)}
    # The order is fixed: metrics, params, dependencies. A column is prefixed where two files have the same name.
    begin = next(place for place, name in enumerate(shown.columns) if name.removeprefix(f"{PARAMS_FILE}:") in params)
    mine = shown.select(shown.columns[:begin]).filter(
        pl.col("Experiment").cast(pl.String).is_in([each.name for each in sweep.experiments])
    )
    return mine.select(
        column.name for column in mine if column.name in SHOWN or column.name == "Experiment" or column.count()
    )


def differences(table: pl.DataFrame) -> pl.DataFrame:
    """Params and metrics in which the experiments of a `comparison` differ: one row each, one column an experiment."""
    import polars as pl

    names = [name for name in table.columns if name not in (*SHOWN, "Experiment", "seconds", "message")]
    varying = [name for name in names if table[name].n_unique() > 1]
    cells = [[name, *(None if value is None else str(value) for value in table[name])] for name in varying]
    schema = {"param or metric": pl.String} | dict.fromkeys(table["Experiment"], pl.String)
    return pl.DataFrame(cells, schema=schema, orient="row")


def write_tables(sweep: Sweep, table: pl.DataFrame) -> Path:
    """Write ``table.csv`` and ``params_metrics_diff.csv`` to the sweep's folder and give the path of the first."""
    path = sweep.root / TABLES / sweep.name / "table.csv"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write_csv(path)
        differences(table).write_csv(path.parent / "params_metrics_diff.csv")
    return path
