"""The tables of the ``spectra`` stage or of one ``rlheals diagnose``, and the questions every reader asks them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import polars as pl

from rlheals.reporting.schemas import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.tables import Study

STAGE = "spectra"
FILES = {
    "spectra": "spectra.parquet",
    "spectra_verdicts": "verdicts.parquet",
    "gauge": "gauge.parquet",
    "function_drift": "function_drift.parquet",
    "spectra_ladder": "ladder.parquet",
}
SFT, RL = "sft_max_ood → sft_end", "sft_end → rl"
"""The two pairs whose spectra and angles the paper shows."""
BEYOND = "sft_max_ood → rl"
SHARE = 0.2
"""Part of the rank that angle figures and claims look at, where several were measured: the paper's 768 of 4096."""
RUN = ["model", "seed"]
MATRIX = ["model", "seed", "pair", "layer", "module"]
NAMES = {"sft_max_ood": "SFT_MaxOOD", "sft_end": "SFT_End", "rl": "RL"}


@dataclass(frozen=True, slots=True)
class Drift:
    """What turned between pairs of models.

    Attributes:
        spectra: schema ``spectra``.
        verdicts: schema ``spectra_verdicts``.
        gauge: schema ``gauge``; may be empty.
        function: schema ``function_drift``; may be empty.
        ladder: schema ``spectra_ladder``; may be empty.
    """

    spectra: pl.DataFrame
    verdicts: pl.DataFrame
    gauge: pl.DataFrame
    function: pl.DataFrame
    ladder: pl.DataFrame

    @property
    def pairs(self) -> list[str]:
        """All pairs in the order of the tables."""
        return self.verdicts["pair"].unique(maintain_order=True).to_list()

    @property
    def shown(self) -> list[str]:
        """The pairs whose curves are drawn: the paper's two, or the first and the last where they are absent."""
        found = [pair for pair in (SFT, RL) if pair in self.pairs]
        return found or list(dict.fromkeys([*self.pairs[:1], *self.pairs[-1:]]))


def load_drift(study: Study) -> Drift | None:
    """Read the tables of ``spectra``; None when the stage has not run for this profile.

    Raises:
        UserError: a run is missing or undeclared, or a file is corrupted or of another schema.
    """
    found = study.tables(STAGE, FILES)
    if found is None:
        return None
    return Drift(
        spectra=found["spectra"],
        verdicts=found["spectra_verdicts"],
        gauge=found["gauge"],
        function=found["function_drift"],
        ladder=found["spectra_ladder"],
    )


def with_ladder(drift: Drift) -> Drift:
    """Let the pairs of one ``rlheals diagnose`` be a ladder where several models are compared with the same reference.

    Without two of them, or with a ladder of its own, the drift is returned as it is.
    """
    references = {pair.partition(" → ")[0] for pair in drift.pairs}
    if len(drift.pairs) < 2 or len(references) > 1 or len(drift.ladder):
        return drift
    targets = [pair.partition(" → ")[2] for pair in drift.pairs]
    steps = dict(zip(drift.pairs, ladder_steps(targets), strict=True))
    whole = drift.spectra.filter(pl.col("index").is_null()).with_columns(
        pl.col("pair").replace_strict(steps, return_dtype=pl.Int64).alias("checkpoint_step"),
        pl.lit(next(iter(references))).alias("reference"),
    )
    return replace(drift, ladder=whole.select(list(SCHEMAS["spectra_ladder"])))


def ladder_steps(names: Sequence[str]) -> list[int]:
    """The numbers that the names of checkpoints end with where these rise, otherwise their places.

    >>> ladder_steps(["checkpoint-5", "checkpoint-40"]), ladder_steps(["sft", "rl"]), ladder_steps(["v2", "v1"])
    ([5, 40], [1, 2], [1, 2])
    """
    numbers = [int(found[0]) for name in names if (found := re.search(r"\d+$", name))]
    rising = len(numbers) == len(names) and all(low < high for low, high in zip([0, *numbers], numbers, strict=False))
    return numbers if rising else list(range(1, len(names) + 1))


def pair_label(pair: str) -> str:
    """The pair in the words of the paper.

    >>> pair_label("sft_max_ood → sft_end")
    'SFT_MaxOOD → SFT_End'
    """
    return " → ".join(NAMES.get(name, name) for name in pair.split(" → "))


def with_shapes(drift: Drift, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of ``spectra`` with ``rank`` and, for rows with a side, ``dimension`` of the space its vectors live in."""
    shapes = drift.verdicts.select(*MATRIX, "tensor", "rows", "columns")
    return rows.join(shapes, on=[*MATRIX, "tensor"], how="left", maintain_order="left").with_columns(
        pl.min_horizontal("rows", "columns").alias("rank"),
        pl.when(pl.col("side") == "left").then("rows").otherwise("columns").alias("dimension"),
    )


def angles(drift: Drift, quantity: str, pairs: Sequence[str] | None = None) -> pl.DataFrame:
    """Rows of an angle quantity of the top part, at the measured k closest to `SHARE` of each matrix's rank.

    Rows where k spans the whole space are left out: there all angles are zero by definition.
    """
    rows = drift.spectra.filter((pl.col("quantity") == quantity) & (pl.col("part") == "top"))
    if pairs is not None:
        rows = rows.filter(pl.col("pair").is_in(list(pairs)))
    shaped = with_shapes(drift, rows).filter(pl.col("k") < pl.col("dimension"))
    return nearest_k(shaped, [*MATRIX, "side"])


def nearest_k(rows: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Of several k keep the one closest to `SHARE` of the rank, by ``keys``; rows need columns k and rank."""
    distance = (pl.col("k") - SHARE * pl.col("rank")).abs()
    return rows.filter(pl.col("k") == pl.col("k").sort_by(distance, "k").first().over(list(keys)))


def drops_zeros(rows: pl.DataFrame) -> pl.DataFrame:
    """Angle curves without the first 2k - n angles, which are zero because two k-spaces of n must meet."""
    return rows.filter(pl.col("index") >= 2 * pl.col("k") - pl.col("dimension"))


def against_noise(rows: pl.DataFrame) -> pl.DataFrame:
    """Add ``expected``, the middle of the noise band, and ``ratio`` = value / expected; rows without a band go."""
    middle = (pl.col("noise_low") + pl.col("noise_high")) / 2
    return (
        rows.with_columns(middle.alias("expected"))
        .filter(pl.col("expected").is_not_null() & (pl.col("expected") > 0))
        .with_columns((pl.col("value") / pl.col("expected")).alias("ratio"))
    )
