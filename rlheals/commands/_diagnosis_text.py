"""A diagnosis and a plan as text for the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console
from rich.table import Table

from rlheals.commands._diagnosis_words import closing_lines
from rlheals.reporting.verdict_words import TURNS, WORDS, counted, turns
from rlheals.spectra.turn import leading_angles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.spectra.diagnose import Diagnosis
    from rlheals.spectra.plan import Forecast

WIDTH = 130
"""Columns where there is no terminal to ask."""
CAPTION = (
    "verdict: structured means that noise of the same norm would not have this pattern, not that anything moved far; "
    "turn: less than, as, or more than such noise turns the leading singular vectors; change: ‖ΔW‖/‖W‖; angle: mean "
    "principal angle of those vectors at the smallest k, in brackets the 95 % band under noise; stretch: energy of ΔW "
    "that only scales. By module, numbers are medians."
)
SIDES = ("left", "right")
DEGREES = math.degrees(1)
LEAST = 1e-3
"""The smallest angle in degrees, and share in per cent, that is told to its digits."""
GAUGE = {
    "raw_change": "change as stored (noise)",
    "aligned_change": "undone (noise)",
    "gauge_share": "free (noise)",
}
"""Quantities of schema ``gauge`` in the terminal, with the heads of their columns."""
BUSY = 1.5
"""From this ratio of clock to processor time on the machine is told to be busy."""
LONGEST_NAME = 56
"""Columns that the name of a tensor may take before it is folded."""
FUNCTION = ("kl_base_tuned", "entropy_before", "entropy_after", "margin_before", "margin_after")


def show_diagnosis(found: Diagnosis, counters: str, follows: Sequence[str], every: bool) -> None:
    """One table a pair: a line a module, or a line a matrix; then gauge, function drift, and sentences.

    Args:
        found: the diagnosis.
        counters: what was computed and what came from a cache.
        follows: what the reader is told last.
        every: a line a matrix, and a line a warning.
    """
    console = _console()
    draw = matrix_table if every else module_table
    for (pair,), rows in found.verdicts.group_by("pair", maintain_order=True):
        console.print(draw(str(pair), rows, found.spectra))
    for (pair,), rows in found.gauge.group_by("pair", maintain_order=True):
        console.print(gauge_table(str(pair), rows))
    if not found.function_drift.is_empty():
        console.print(function_table(found.function_drift))
    for line in [*closing_lines(found, every=every), counters, *follows]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_plan(found: Forecast) -> None:
    """One line a model and device, then what other numbers of null draws would cost and what is left out."""
    first = found.estimates[0]
    title = (
        f"Expected cost of rlheals diagnose for {first.checkpoints} tuned model{'s' if first.checkpoints > 1 else ''}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold", min_width=max(len(each.model[:30]) for each in found.estimates))
    table.add_column("device", no_wrap=True)
    names = (
        "matrices",
        "factorise",
        "measure",
        f"{first.draws} nulls",
        "gauge, function",
        "first run",
        "second",
        "disk",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.estimates:
        times = [each.factorise, each.measure, each.nulls(), each.others(), each.first_run(), each.second_run]
        cells = [duration(seconds) for seconds in times]
        table.add_row(each.model, each.device, str(each.matrices), *cells, f"{each.disk_gib:.3g} GiB")
    console = _console()
    console.print(table)
    for line in plan_lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_lines(found: Forecast) -> list[str]:
    """What the numbers of a plan mean."""
    from rlheals.spectra.plan import FEW_NULLS

    own = found.estimates[0]
    others = [draws for draws in dict.fromkeys((own.draws, FEW_NULLS, 0)) if draws <= own.draws]
    told = "; ".join(f"--nulls {draws}: {duration(own.first_run(draws))}" for draws in others)
    lines = [f"{own.model}, first run: {told}. Fewer draws make wider bands, none makes none."]
    lines += [f"{each.device}: {each.source}." for each in {each.device: each for each in found.estimates}.values()]
    if found.busy > BUSY:
        lines.append(f"The machine is busy: by the clock the same work took {found.busy:.2g} times as long just now.")
    left_out = [found.left_out] if found.left_out else []
    left_out += ["function drift on the GPU"] if any(each.function is None for each in found.estimates[1:]) else []
    left_out += ["loading the models, writing the page"]
    lines.append(f"Left out: {'; '.join(left_out)}. A second run reads and hashes only.")
    return lines


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    >>> duration(0.3), duration(42), duration(600), duration(20000), duration(400000)
    ('0.3 s', '42 s', '10 min', '5.6 h', '4.6 d')
    """
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds / 86400:.2g} d"


def module_table(pair: str, verdicts: pl.DataFrame, spectra: pl.DataFrame) -> Table:
    """Verdicts and turns counted by module, with medians over its matrices and their bands."""
    table = Table(title=pair, title_justify="left", caption=CAPTION, caption_justify="left")
    table.add_column("module", no_wrap=True, min_width=len("embed_tokens"))
    for name in ("matrices", "verdict", "turn"):
        table.add_column(name, justify="right")
    for name in ("change", *(f"angle {side} (noise)" for side in SIDES), "stretch"):
        table.add_column(name, justify="right")
    angles = leading_angles(spectra.filter(pl.col("pair") == pair))
    for (module,), rows in verdicts.group_by("module", maintain_order=True):
        mine = angles.filter(pl.col("module") == module)
        told = [_lines(counted(rows)), _lines(turns(rows))]
        numbers = [_share(rows["relative_change"].median()), *_angles(mine), _share(rows["stretch_share"].median())]
        table.add_row(str(module), str(len(rows)), *told, *numbers)
    return table


def matrix_table(pair: str, verdicts: pl.DataFrame, spectra: pl.DataFrame) -> Table:
    """One row a matrix: below its name the test that decided, and the angles of its two sides below each other."""
    table = Table(title=pair, title_justify="left", caption=CAPTION, caption_justify="left")
    longest = max(map(len, verdicts["tensor"]), default=0)
    table.add_column("tensor, test", overflow="fold", min_width=min(longest, LONGEST_NAME))
    for name in ("verdict", "turn"):
        table.add_column(name, no_wrap=True)
    for name in ("p (Holm)", "change", "angles left, right (noise)", "stretch"):
        table.add_column(name, justify="right", no_wrap=True)
    angles = leading_angles(spectra.filter(pl.col("pair") == pair))
    for row in verdicts.to_dicts():
        told = [WORDS.get(row["verdict"], row["verdict"]), TURNS.get(row["turn"], "")]
        turned = _lines(_angles(angles.filter(pl.col("tensor") == row["tensor"])))
        numbers = [_number(row["p_holm"]), _share(row["relative_change"]), turned, _share(row["stretch_share"])]
        table.add_row(_lines([row["tensor"], row["test"]]), *told, *numbers)
    return table


def gauge_table(pair: str, rows: pl.DataFrame) -> Table:
    """How much of the change of each kind of block does nothing: medians over layers and heads, with their bands."""
    table = Table(title=f"{pair}: change that does nothing (gauge)", title_justify="left", caption_justify="left")
    table.add_column("block", no_wrap=True)
    for name in ("layers × heads", *GAUGE.values()):
        table.add_column(name, justify="right")
    # A band is that of a normal sample, and may leave what a share can be.
    ends = [pl.col(name).clip(0) for name in ("noise_low", "noise_high")]
    for (block,), mine in rows.with_columns(ends).group_by("block", maintain_order=True):
        medians = [mine.filter(pl.col("quantity") == name) for name in GAUGE]
        cells = [_banded(part, 100, " %") for part in medians]
        table.add_row(str(block).replace("_", " and "), str(len(medians[0])), *cells)
    table.caption = (
        "Medians, in brackets the 95 % band under noise. Undone: after turning factors whose product alone matters. "
        "Free: the share of the change that this removes; 100 % means other weights for the same function."
    )
    return table


def function_table(rows: pl.DataFrame) -> Table:
    """What the models compute: next-token distributions."""
    table = Table(title="what the models compute, next-token distributions", title_justify="left")
    for name in ("pair", "texts", "quantity"):
        table.add_column(name)
    for name in ("value", "same-norm noise"):
        table.add_column(name, justify="right")
    for row in rows.filter((pl.col("layer") == -1) & pl.col("quantity").is_in(FUNCTION)).to_dicts():
        band = "" if row["noise_low"] is None else f"{row['noise_low']:.3g} … {row['noise_high']:.3g}"
        table.add_row(row["pair"], row["condition"], row["quantity"], f"{row['value']:.3g}", band)
    return table


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(width=shutil.get_terminal_size().columns if terminal else WIDTH)


def _lines(counts: list[str]) -> str:
    return "\n".join(counts)


def _angles(rows: pl.DataFrame) -> list[str]:
    return [_banded(rows.filter(pl.col("side") == side), DEGREES, "°") for side in SIDES]


def _banded(rows: pl.DataFrame, scale: float, unit: str) -> str:
    """The median value in a unit, with the medians of the ends of its band in brackets."""
    value, low, high = (_scaled(rows[name].median(), scale) for name in ("value", "noise_low", "noise_high"))
    return f"{value}{unit} ({low}–{high})" if low and high else f"{value}{unit}" if value else ""


def _scaled(value: Any, scale: float) -> str:
    if value is None or not math.isfinite(value):
        return ""
    scaled = value * scale
    return f"{scaled:.3g}" if scaled >= LEAST or scaled <= 0 else f"<{LEAST:g}"


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2g}"
