"""What a diagnosis amounts to, in sentences: how large, how free, and what to do next."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import polars as pl

from rlheals.reporting.verdict_words import warning_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rlheals.spectra.diagnose import Diagnosis

FREE_SHARE = 0.999
"""Share of a block's change that alignment must remove for the change to be called free."""
ROUNDING = 1e-6
"""Relative change that is left of function-equal blocks when float32 has rounded their weights."""
OPERATOR, DOSE = "interpolate", 0.75
DOSES = (0.5, 0.95)
NOTHING = (
    "Nothing changed: every weight is as it was in BASE, up to rounding, so there is nothing to repair (exit code 0)."
)


def closing_lines(found: Diagnosis, *, every: bool = False) -> list[str]:
    """What the verdicts cover, then notes, warnings, and what was left out."""
    lines = [*found.covered, *found.notes]
    lines += [f"warning: {line}" for line in warning_lines(found.verdicts, every=every)]
    reasons: dict[str, int] = {}
    for reason in found.left_out.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        lines.append("left out: " + "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) + ".")
    return lines


def follow_up(found: Diagnosis, base: Path, tuned: Sequence[Path]) -> list[str]:
    """What follows from a diagnosis: how large the change is, what it allows to conclude, and the next command.

    Args:
        found: the diagnosis of ``tuned`` against ``base``.
        base: the folder as the user named it.
        tuned: the folders after, in the diagnosis' order; the command is for the last.
    """
    pairs = _pairs(found)
    changed = {pair: folder for pair, folder in zip(pairs, tuned, strict=True) if differs(found, pair)}
    if not changed:
        return [NOTHING]
    lines = [*sizes(found), *free_lines(found)]
    free = [pair for pair in changed if same_function(found, pair)]
    if free:
        named = f"{', '.join(free)}: " if len(pairs) > 1 else ""
        lines.append(
            f"{named}the models compute the same up to rounding, so there is nothing to repair; the verdicts are about "
            "the weights as they are stored."
        )
    rest = [pair for pair in changed if pair not in free]
    if rest:
        lines += [
            "Verdicts and bands say what noise of the same size would not do to the weights; by themselves they say "
            "nothing about what was lost or which repair helps. Only a test of the repaired model does.",
            f"Next: {next_command(found, rest[-1], base, changed[rest[-1]])}",
            f"Then evaluate it on your own task and on what was lost. Doses from {DOSES[0]:g} to {DOSES[1]:g} are "
            "worth a try: a larger one gives back more of BASE and keeps less of the tuning.",
        ]
    return [*lines, exit_line(found)]


def differs(found: Diagnosis, pair: str) -> bool:
    """Whether anything of a pair differs by more than rounding, compared or not."""
    return bool(len(_changed(found, pair))) or _rest_differs(found, pair)


def sizes(found: Diagnosis) -> list[str]:
    """One sentence a pair: how many matrices changed, and by how much."""
    lines = []
    for pair in _pairs(found):
        moved = _changed(found, pair).filter(pl.col("relative_change").is_finite())
        said = f"{len(moved)} of {int((found.verdicts['pair'] == pair).sum())} matrices compared changed"
        if len(moved):
            most = moved.sort("relative_change", descending=True).row(0, named=True)
            said += f", the median one by {_share(moved['relative_change'].median())} of its norm"
            said += f" (at most {_share(most['relative_change'])}, {most['tensor']})" if len(moved) > 1 else ""
        lines.append(f"Size: {_named(found, pair)}{said}.")
    return lines


def free_lines(found: Diagnosis) -> list[str]:
    """One sentence a pair with blocks whose change is free: other weights that compute the same."""
    lines = []
    for pair in _pairs(found):
        changed, free = _changed(found, pair), _free_matrices(found, pair)
        count = len(changed.join(free, on=["layer", "module"], how="semi"))
        if count:
            lines.append(
                f"Gauge: {_named(found, pair)}the change of {count} of the {len(changed)} changed matrices is free: "
                "other weights for the same function. What is left of it once the freedom is undone is "
                f"{_share(free['left'].max())} of the weights at most."
            )
    return lines


def same_function(found: Diagnosis, pair: str) -> bool:
    """Whether all that differs in a pair is gauge freedom, up to rounding."""
    free = _free_matrices(found, pair).filter(pl.col("left") <= ROUNDING)
    bound = _changed(found, pair).join(free, on=["layer", "module"], how="anti")
    return bound.is_empty() and bool(len(_changed(found, pair))) and not _rest_differs(found, pair)


def next_command(found: Diagnosis, pair: str, base: Path, tuned: Path) -> str:
    """The edit to try first, for a shell; of every tensor where no matrix changed, as editing these does nothing."""
    words = ["rlheals", "restore", str(base), str(tuned), "--operator", OPERATOR, "--dose", f"{DOSE:g}"]
    everything = [] if len(_changed(found, pair)) else ["--everything"]
    return shlex.join([*words, *everything, "--out", "repaired"])


def exit_line(found: Diagnosis) -> str:
    """What the exit code means."""
    if not found.changed:
        return "Exit code 0: the change is what noise of its size would be, and what was not compared is equal."
    return (
        "Exit code 1: a matrix changed in a way that noise of its size would not, or something that was not compared "
        "differs. It is a finding, not an error."
    )


def _pairs(found: Diagnosis) -> list[str]:
    return list(found.coverage)


def _named(found: Diagnosis, pair: str) -> str:
    """What a sentence on one of several pairs begins with."""
    return f"{pair}: " if len(_pairs(found)) > 1 else ""


def _changed(found: Diagnosis, pair: str) -> pl.DataFrame:
    return found.verdicts.filter((pl.col("pair") == pair) & (pl.col("verdict") != "unchanged"))


def _rest_differs(found: Diagnosis, pair: str) -> bool:
    return pair in found.coverage and bool(found.coverage[pair].differing)


def _free_matrices(found: Diagnosis, pair: str) -> pl.DataFrame:
    """Layer and module of every matrix in a block whose change is free, with what is ``left`` of that change."""
    from rlheals.spectra.block_factors import BLOCKS

    keys = ["layer", "block"]
    # All heads of a block together: one that did not change has no share of its own.
    raw, aligned = (
        found.gauge.filter((pl.col("pair") == pair) & (pl.col("quantity") == name))
        .group_by(keys)
        .agg(pl.col("value").pow(2).sum().alias(f"{name}_energy"), pl.col("value").max().alias(name))
        for name in ("raw_change", "aligned_change")
    )
    bound = pl.col("aligned_change_energy") / pl.col("raw_change_energy")
    free = raw.join(aligned, on=keys).filter(bound <= 1 - FREE_SHARE).select(*keys, left="aligned_change")
    parts = [(block, part) for block, modules in BLOCKS.items() for part in modules]
    return free.join(pl.DataFrame(parts, ["block", "module"], orient="row"), on="block")


def _share(value: object) -> str:
    if not isinstance(value, float) or not math.isfinite(value):
        return "–"
    return f"{100 * value:.3g} %" if value >= 1e-5 or not value else "<0.001 %"
