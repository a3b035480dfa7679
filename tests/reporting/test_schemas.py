"""Table schemas are checked when written and when read."""

from __future__ import annotations

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS, check, read_table, write_table


def empty(schema: str) -> pl.DataFrame:
    return pl.DataFrame(schema=SCHEMAS[schema])


@pytest.mark.parametrize("schema", sorted(SCHEMAS))
def test_round_trip(schema, tmp_path):
    write_table(empty(schema), schema, tmp_path / "table.parquet")
    assert read_table(tmp_path / "table.parquet", schema).schema == pl.Schema(SCHEMAS[schema])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop("tokens"), "missing tokens"),
        (lambda t: t.with_columns(extra=pl.lit(1)), "unexpected extra"),
        (lambda t: t.with_columns(pl.col("step").cast(pl.Float64)), "step is Float64, not Int64"),
        (lambda t: t.select(sorted(t.columns)), "another order"),
    ],
)
def test_deviations_are_named(change, told):
    with pytest.raises(UserError, match=f"here is not a valid losses table: .*{told}"):
        check(change(empty("losses")), "losses", "here")


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.parquet", "losses")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_table(tmp_path / "bad.parquet", "losses")
