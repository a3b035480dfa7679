"""Table ``cells``: what each edit did to accuracy, on the same hands as its target, the peak and its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.restoration.plan import END, MAX_OOD, RL
from rlheals.stats import holm, mcnemar_pairs, paired_difference, wilson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlheals.restoration.edit import Scope
    from rlheals.restoration.grid import Finished

CONFIRM = "confirm"
CONDITIONS = ("id", "ood")


@dataclass(frozen=True)
class Outcomes:
    """First tries on the hands of one condition, sorted by hand."""

    hands: list[str]
    solved: list[bool]
    format_errors: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of solved hands."""
        return sum(self.solved) / len(self.solved)


def outcomes(answers: pl.DataFrame, condition: str) -> Outcomes:
    """First tries of a model on one condition.

    Raises:
        UserError: there are none.
    """
    rows = answers.filter((pl.col("attempt") == 1) & (pl.col("condition") == condition)).sort("hand_id")
    if rows.is_empty():
        raise UserError(f"no {condition} hand was asked, so no edit can be judged; check dataset.probe in params.yaml.")
    hands, solved, errors = (rows[name].to_list() for name in ("hand_id", "solved_first_try", "format_error"))
    return Outcomes([str(hand) for hand in hands], solved, errors)


def cells_table(
    finished: Sequence[Finished], unedited: Mapping[str, pl.DataFrame], columns: Mapping[str, Any], split: str
) -> pl.DataFrame:
    """One row a cell, in the order given.

    Args:
        finished: cells that were asked the same hands; the controls of a cell among them.
        unedited: answers on these hands of every target and of SFT_MaxOOD, by name.
        columns: values of profile, model and seed.
        split: of the hands.

    Returns:
        Schema ``cells``. ``best_control`` is the control that goes farthest in the edit's own direction on OOD hands:
        for an edit that raises accuracy the highest, for one that lowers it the lowest. ``p_holm`` is over the cells
        that are no controls, and null on ``select``, which is for choosing only.

    Raises:
        UserError: two of them were not asked the same hands.
    """
    rows = [{**columns, **_row(each, unedited, split)} for each in finished]
    if split == CONFIRM:
        own = [place for place, each in enumerate(finished) if not each.cell.is_control]
        for place, p_value in zip(own, holm([rows[place]["p_value"] for place in own]), strict=True):
            rows[place] |= {"p_holm": p_value, **_against_controls(finished[place], finished, rows[place])}
    return check(pl.DataFrame(rows, schema=SCHEMAS["cells"]), "cells", "the table of cells")


def best_repairs(cells: pl.DataFrame, count: int, id_budget: float) -> list[str]:
    """``cell_id`` of the cells that raise OOD accuracy on SFT_End most, at no more than ``id_budget`` of ID accuracy.

    Cells that bring the RL model's weights in are no repairs.

    Args:
        cells: schema ``cells``, screened on ``select``.
        count: how many; contrasts, which are confirmed anyway, and controls are not counted.
        id_budget: largest loss of ID accuracy.
    """
    rounding = 1e-9  # 0.9 - 0.85 is more than 0.05 in floats
    eligible = cells.filter(
        (pl.col("target") == END)
        & (pl.col("reference") != RL)  # that is not put back, it is brought in
        & ~pl.col("contrast")
        & (pl.col("group") != "control")
        & (pl.col("id_difference") >= -id_budget - rounding)
    )
    ranked = eligible.sort("ood_accuracy", "change_norm", "cell_id", descending=[True, False, False])
    return ranked["cell_id"].head(count).to_list()


def _row(each: Finished, unedited: Mapping[str, pl.DataFrame], split: str) -> dict[str, Any]:
    cell, facts = each.cell, each.facts
    edit = cell.edit
    layers, modules = scope_columns(edit.scope)
    before = {condition: outcomes(unedited[edit.target], condition) for condition in CONDITIONS}
    after = {condition: outcomes(each.answers, condition) for condition in CONDITIONS}
    peak = outcomes(unedited[MAX_OOD], "ood")
    _check_hands(cell.cell_id, after["ood"], peak)
    measured: dict[str, Any] = {}
    for condition in CONDITIONS:
        measured |= _comparison(cell.cell_id, condition, after[condition], before[condition])
    lost = peak.accuracy - before["ood"].accuracy
    return {
        "cell_id": cell.cell_id,
        "split": split,
        "group": cell.group,
        "operator": edit.operator,
        "basis": edit.basis,
        "reference": edit.reference,
        "target": edit.target,
        "layers": layers,
        "modules": modules,
        "rank_from": facts.rank_from,
        "rank_to": facts.rank_to,
        "dose": edit.dose,
        "control_of": edit.control_of,
        "draw": edit.seed,
        "official": edit.official,
        "contrast": cell.contrast,
        "matrices": facts.matrices,
        "orthogonality_defect": facts.orthogonality_defect,
        "change_norm": facts.change_norm,
        "n": len(after["ood"].hands),
        **measured,
        "ood_peak": peak.accuracy,
        "recovery": measured["ood_difference"] / lost if lost > 0 else None,
        "p_value": paired_difference(after["ood"].solved, before["ood"].solved).p_value,
        "p_holm": None,
        "p_control": None,
        "best_control": "",
        "format_error_rate": sum(after["ood"].format_errors) / len(after["ood"].hands),
        "seconds": facts.seconds,
        "bytes": facts.bytes,
    }


def _comparison(cell_id: str, condition: str, after: Outcomes, before: Outcomes) -> dict[str, float]:
    _check_hands(cell_id, after, before)
    low, high = wilson(sum(after.solved), len(after.solved))
    difference = paired_difference(after.solved, before.solved)
    return {
        f"{condition}_accuracy": after.accuracy,
        f"{condition}_low": low,
        f"{condition}_high": high,
        f"{condition}_before": before.accuracy,
        f"{condition}_difference": difference.estimate,
        f"{condition}_difference_low": difference.low,
        f"{condition}_difference_high": difference.high,
    }


def _against_controls(each: Finished, finished: Sequence[Finished], row: Mapping[str, Any]) -> dict[str, Any]:
    """p-value of the edit against the control that goes farthest its way."""
    controls = [other for other in finished if other.cell.edit.control_of == each.cell.cell_id]
    if not controls:
        return {}
    found = {other.cell.cell_id: outcomes(other.answers, "ood") for other in controls}
    sign = 1 if row["ood_difference"] >= 0 else -1
    best = max(found, key=lambda name: sign * found[name].accuracy)
    own = outcomes(each.answers, "ood")
    _check_hands(best, found[best], own)
    return {"best_control": best, "p_control": mcnemar_pairs(own.solved, found[best].solved)}


def _check_hands(cell_id: str, one: Outcomes, other: Outcomes) -> None:
    if one.hands != other.hands:
        raise UserError(f"{cell_id} and what it is compared with were not asked the same hands; run the stage again.")


def scope_columns(scope: Scope) -> tuple[str, str]:
    """Columns ``layers`` and ``modules``: such as ``all`` and ``all``, ``0-9,12`` and ``q_proj,k_proj``.

    An edit of the embedding and head alone has no layers.
    """
    extra = ["embed_tokens"] * scope.embeddings + ["lm_head"] * scope.head
    if scope.layers == ():
        return "", ",".join([*scope.modules, *extra])
    return _layers(scope.layers), ",".join([*(scope.modules or ("all",)), *extra])


def _layers(layers: tuple[int, ...] | None) -> str:
    if layers is None:
        return "all"
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
