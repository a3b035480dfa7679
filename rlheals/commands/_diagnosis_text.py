"""A diagnosis and a plan as text for the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rlheals.spectra.diagnose import Diagnosis
    from rlheals.spectra.plan import Forecast

WIDTH = 130
"""Columns where there is no terminal to ask."""
VERDICTS = {
    "unchanged": "unchanged",
    "indistinguishable from same-norm noise": "like noise",
    "structured rotation": "rotation",
    "magnitude change": "magnitude",
}
BUSY = 1.5
"""From this ratio of clock to processor time on the machine is told to be busy."""
FUNCTION = ("kl_base_tuned", "entropy_before", "entropy_after", "margin_before", "margin_after")


def show_diagnosis(found: Diagnosis, counters: str, every: bool) -> None:
    """One table a pair: a line a module, or a line a matrix; then function drift, warnings, and the counters."""
    console = _console()
    for (pair,), rows in found.verdicts.group_by("pair", maintain_order=True):
        console.print(matrix_table(str(pair), rows) if every else module_table(str(pair), rows, found.spectra))
    if not found.function_drift.is_empty():
        console.print(function_table(found.function_drift))
    for line in [*closing_lines(found), counters]:
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
    """Verdicts counted by module, with medians over its matrices."""
    table = Table(title=pair, title_justify="left")
    table.add_column("module", no_wrap=True, min_width=len("embed_tokens"))
    angle_names = ("angle left", "angle right", "under noise")
    for name in ("matrices", *VERDICTS.values(), "change", *angle_names, "stretch"):
        table.add_column(name, justify="right")
    angles = top_angles(spectra.filter(pl.col("pair") == pair))
    for (module,), rows in verdicts.group_by("module", maintain_order=True):
        counts = [str(int((rows["verdict"] == verdict).sum())) for verdict in VERDICTS]
        mine = angles.filter(pl.col("module") == module)
        left, right = (_degrees(mine.filter(pl.col("side") == side)["value"].median()) for side in ("left", "right"))
        noise = _degrees(((mine["noise_low"] + mine["noise_high"]) / 2).median())
        change = _share(rows["relative_change"].median())
        stretch = _share(rows["stretch_share"].median())
        table.add_row(str(module), str(len(rows)), *counts, change, left, right, noise, stretch)
    table.caption = (
        "change: median of ‖ΔW‖/‖W‖; angle: mean principal angle of the leading singular vectors at the smallest k; "
        "under noise: what Gaussian noise of the same norm turns; stretch: energy of ΔW that only scales."
    )
    table.caption_justify = "left"
    return table


def top_angles(spectra: pl.DataFrame) -> pl.DataFrame:
    """Mean principal angles of the leading vectors at the smallest measured k of each matrix."""
    rows = spectra.filter((pl.col("quantity") == "angle_mean") & (pl.col("part") == "top"))
    return rows.filter(pl.col("k") == pl.col("k").min().over("tensor"))


def matrix_table(pair: str, verdicts: pl.DataFrame) -> Table:
    """One line a matrix."""
    table = Table(title=pair, title_justify="left")
    for name in ("tensor", "verdict", "test"):
        table.add_column(name)
    for name in ("p", "p (Holm)", "change", "stretch"):
        table.add_column(name, justify="right")
    for row in verdicts.to_dicts():
        numbers = [_number(row["p_value"]), _number(row["p_holm"])]
        shares = [_share(row["relative_change"]), _share(row["stretch_share"])]
        table.add_row(row["tensor"], row["verdict"], row["test"], *numbers, *shares)
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


def closing_lines(found: Diagnosis) -> list[str]:
    """Warnings, notes, and what was left out."""
    warnings = found.verdicts.filter(pl.col("warning") != "").select("tensor", "warning").unique(maintain_order=True)
    lines = [f"warning: {tensor}: {warning}" for tensor, warning in warnings.iter_rows()]
    lines += found.covered
    lines += list(found.notes)
    reasons: dict[str, int] = {}
    for reason in found.left_out.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        lines.append("left out: " + "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) + ".")
    return lines


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(width=shutil.get_terminal_size().columns if terminal else WIDTH)


def _degrees(radians: Any) -> str:
    return "" if radians is None else f"{math.degrees(radians):.3g}°"


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2g}"
