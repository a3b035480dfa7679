"""The table of the ``restore`` stage, its cells in words, and their answers on the confirm hands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rlheals.reporting.tables import Choice, Study

STAGE = "restore"
FILES = {"cells": "cells.parquet", "answers": "answers.parquet"}
END, PEAK, RL, BASE = "sft_end", "sft_max_ood", "rl", "base"
CONTROL = "control"
"""The ``group`` of controls and of round trips."""
NAMES = {BASE: "the base", PEAK: "SFT_MaxOOD", END: "SFT_End", RL: "RL"}
CONTROLS = {
    "random_rotation": "random rotation",
    "noise": "noise of the same norm",
    "interpolate": "step back in weights",
    "round_trip": "round trip",
}
"""Controls and their names, in the order of figures; ``interpolate`` is one where it names the cell it controls."""
_WHAT = {
    ("directions", "uv"): "directions",
    ("directions", "u"): "left vectors",
    ("directions", "v"): "right vectors",
    ("directions", "all"): "directions and values",
    ("values", "sigma"): "singular values",
    ("swap", "all"): "weights",
    ("reset", "all"): "whole layers",
    ("rotate", "uv"): "directions",
    ("rotate", "u"): "left vectors",
    ("rotate", "v"): "right vectors",
    ("interpolate", "all"): "weights",
    ("remove_outside", "uv"): "no drift outside the block",
    ("remove_inside", "uv"): "no drift inside the block",
}
OUTSIDE = {"embed_tokens": "embedding", "lm_head": "head"}
"""Matrices that belong to no layer."""
_STARTED = re.compile(r"sft_(\d+)$")


@dataclass(frozen=True)
class Repairs:
    """What ``restore`` wrote for all runs.

    Attributes:
        cells: schema ``cells``.
        answers: schema ``answers`` of the confirm hands, one set a cell; the unedited models are among them under
            the ids that `unedited_cell` gives.
    """

    cells: pl.DataFrame
    answers: pl.DataFrame

    @property
    def edits(self) -> pl.DataFrame:
        """Cells that are no controls."""
        return self.cells.filter(pl.col("group") != CONTROL)

    @property
    def screened(self) -> pl.DataFrame:
        """Edits on the select hands."""
        return self.edits.filter(pl.col("split") == "select")

    @property
    def confirmed(self) -> pl.DataFrame:
        """Edits on the confirm hands."""
        return self.edits.filter(pl.col("split") == "confirm")

    @property
    def controls(self) -> pl.DataFrame:
        """Controls of an edit, on the confirm hands."""
        return self.cells.filter((pl.col("control_of") != "") & (pl.col("split") == "confirm"))

    @cached_property
    def starts(self) -> list[int]:
        """Rungs other than SFT_End that were repaired, ascending."""
        return sorted({int(found[1]) for name in set(self.cells["target"]) if (found := _STARTED.match(name))})


def load_repairs(study: Study) -> Repairs | None:
    """Read the tables of ``restore``; None when the stage has not run for this profile.

    Raises:
        UserError: a run is missing or undeclared, or a file is corrupted or of another schema.
    """
    found = study.tables(STAGE, FILES)
    if found is None:
        return None
    return Repairs(found["cells"], found["answers"])


def of_run(rows: pl.DataFrame, model: str, seed: int) -> pl.DataFrame:
    """Rows of one run."""
    return rows.filter((pl.col("model") == model) & (pl.col("seed") == seed))


def model_name(name: str) -> str:
    """A reference or target in the words of the paper.

    >>> model_name("sft_max_ood"), model_name("sft_40")
    ('SFT_MaxOOD', 'SFT step 40')
    """
    started = _STARTED.match(name)
    return f"SFT step {started[1]}" if started else NAMES.get(name, name)


def layers_of(text: str) -> tuple[int, ...]:
    """The layers that a cell's column ``layers`` names; empty for "all".

    >>> layers_of("0-2,7"), layers_of("all")
    ((0, 1, 2, 7), ())
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def window_name(rank_from: float, rank_to: float) -> str:
    """A window of ranks in words; empty for the whole spectrum.

    >>> window_name(0.0, 0.2), window_name(0.8, 1.0), window_name(0.0, 1.0), window_name(0.8, 0.1)
    ('top 20 %', 'last 20 %', '', 'top 10 % and last 20 %')
    """
    if rank_from > rank_to:
        return f"{window_name(0.0, rank_to)} and {window_name(rank_from, 1.0)}"
    if rank_from <= 0 and rank_to >= 1:
        return ""
    if rank_from <= 0:
        return f"top {100 * rank_to:.3g} %"
    if rank_to >= 1:
        return f"last {100 * (1 - rank_from):.3g} %"
    return f"ranks {100 * rank_from:.3g} to {100 * rank_to:.3g} %"


def edit_name(row: dict[str, Any], *, target: bool = False, reference: bool = True) -> str:
    """A cell in words: what goes back to which model, how far, which ranks, where."""
    window = window_name(row["rank_from"], row["rank_to"])
    parts = [part for part in (_what(row, reference), window, _where(row["layers"], row["modules"])) if part]
    text = ", ".join(parts) + (" (as released)" if row["official"] else "")
    return f"{text} → {model_name(row['target'])}" if target else text


def _where(layers: str, modules: str) -> str:
    """The scope of a cell in words; empty for all matrices of all layers."""
    found = [name.removesuffix("_proj") for name in modules.split(",") if name != "all"]
    text = ", ".join(name for name in found if name not in OUTSIDE)
    outside = [words for name, words in OUTSIDE.items() if name in found]
    blocks = "" if layers in ("all", "") else f"layer{'s' * (len(layers_of(layers)) > 1)} {layers}"
    plus = [" and ".join(outside)] if layers == "" else [f"with {name}" for name in outside]
    return ", ".join(part for part in (text, blocks, *plus) if part)


def _what(row: dict[str, Any], reference: bool) -> str:
    operator = str(row["operator"])
    if row["control_of"]:
        return CONTROLS.get(operator, operator)
    text = _WHAT.get((operator, row["basis"]), operator)
    if operator in ("rotate", "interpolate"):
        text += f", {100 * row['dose']:.3g} % of the way"
    return f"{text} of {model_name(row['reference'])}" if reference else text


def outcomes(repairs: Repairs, choice: Choice, cell_id: str, condition: str = "ood") -> NDArray[np.bool_]:
    """First-try outcomes of one cell on the confirm hands, sorted by hand.

    Raises:
        UserError: the cell has no answers, or not to the hands of the other cells.
    """
    asked = of_run(repairs.answers, choice.model, choice.seed).filter(
        (pl.col("condition") == condition) & (pl.col("split") == "confirm") & (pl.col("attempt") == 1)
    )
    rows = asked.filter(pl.col("cell_id") == cell_id).sort("hand_id")
    if rows["hand_id"].to_list() != asked["hand_id"].unique().sort().to_list() or rows.is_empty():
        raise UserError(
            f"answers.parquet of restore ({choice.model}, seed {choice.seed}) does not have cell {cell_id} on the "
            f"{condition} hands of the others, so they cannot be paired; run `dvc repro`."
        )
    return rows["solved"].to_numpy()


def unedited(repairs: Repairs, choice: Choice, name: str) -> NDArray[np.bool_]:
    """`outcomes` of a model as it was, by its name in the columns ``reference`` and ``target``, on the OOD hands."""
    return outcomes(repairs, choice, unedited_cell(name))


def unedited_cell(name: str) -> str:
    """The ``cell_id`` under which ``restore`` keeps the answers of an unedited model."""
    return f"unedited-{name}"
