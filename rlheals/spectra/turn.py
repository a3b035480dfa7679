"""Did the leading directions of a matrix turn less than, as, or more than noise of the same norm turns them?

A verdict says whether a change has structure. Any change that training makes has, and it may turn the leading singular
vectors less than noise of its size would: structure and size are two answers, and this is the second.

The rule reads the mean principal angle between the spans of the first k singular vectors before and after, at the
smallest k that was measured, on the left and on the right, against the 95 % band of base + noise:

- above the band on either side: more than noise. A turn of one side alone is a turn;
- below it on every side that has a band: less than noise;
- otherwise: as noise.

A side has a band where there are two null draws at least and k is smaller than its space. Under noise each side is
above by chance in 2.5 % of matrices and below in 2.5 %, so that at most 5 % are called "more" and 2.5 % "less"; there
is no correction over matrices, as their counts are what is read.
"""

from __future__ import annotations

import polars as pl

LESS, AS, MORE = "less than noise", "as noise", "more than noise"
TURNS = (LESS, AS, MORE)
UNDEFINED = ""
_KEYS = ["pair", "tensor"]


def leading_angles(spectra: pl.DataFrame) -> pl.DataFrame:
    """Mean principal angles of the leading vectors at the smallest measured k of each matrix (rows of ``spectra``)."""
    rows = spectra.filter((pl.col("quantity") == "angle_mean") & (pl.col("part") == "top"))
    return rows.filter(pl.col("k") == pl.col("k").min().over(_KEYS))


def with_turn(verdicts: pl.DataFrame, spectra: pl.DataFrame) -> pl.DataFrame:
    """The verdicts with their column ``turn`` filled: one of `TURNS`, or `UNDEFINED`.

    Args:
        verdicts: schema ``spectra_verdicts``; what stands in ``turn`` is replaced.
        spectra: schema ``spectra``, of the same matrices.
    """
    # A matrix without a p-value was not tested: it is unchanged, or nothing can be said of it.
    tested = verdicts.filter(pl.col("p_value").is_not_null()).select(*_KEYS, "rows", "columns")
    space = pl.when(pl.col("side") == "left").then("rows").otherwise("columns")
    numbers = [pl.col(name).is_finite() for name in ("value", "noise_low", "noise_high")]
    sides = leading_angles(spectra).join(tested, on=_KEYS).filter(pl.all_horizontal(pl.col("k") < space, *numbers))
    above, below = pl.col("value") > pl.col("noise_high"), pl.col("value") < pl.col("noise_low")
    said = pl.when(above.any()).then(pl.lit(MORE)).when(below.all()).then(pl.lit(LESS)).otherwise(pl.lit(AS))
    found = sides.group_by(_KEYS).agg(said.alias("turn"))
    joined = verdicts.drop("turn").join(found, on=_KEYS, how="left", maintain_order="left")
    return joined.with_columns(pl.col("turn").fill_null(UNDEFINED)).select(verdicts.columns)
