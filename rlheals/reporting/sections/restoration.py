"""Which part of the way back gives OOD accuracy back, and whether it is more than any step back gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting.claims_restoration import TOP, repaired_starts
from rlheals.reporting.equal_norm import leading
from rlheals.reporting.figures.repairs import (
    better_in,
    impose,
    impose_rows,
    kind_rows,
    kinds,
    tradeoff,
    tradeoff_rows,
)
from rlheals.reporting.figures.restoration import CONTROL_LOOKS, has_layers, layerwise, rank_rows, rankwise
from rlheals.reporting.repairs import CONTROLS, END, RL, edit_name, load_repairs, model_name, of_run, window_name
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.words import interval, p_value, percent, points

if TYPE_CHECKING:
    from rlheals.reporting.repairs import Repairs
    from rlheals.reporting.tables import Study

MARKS = (
    "Hollow: screened on {screen} select hands a condition, for choosing only. Filled: confirmed on {confirm} other "
    "hands (the pre-registered edits and the {best} best screened). Grey and black: controls, confirmed likewise."
)
_SAME_SIZE = 0.01
"""Relative difference of two norms from which on it is told."""
DROPPED = [
    "profile",
    *("id_low", "id_high", "id_before", "id_difference_low", "id_difference_high"),
    *("ood_low", "ood_high", "ood_before", "ood_peak", "seconds", "bytes"),
]
"""Columns of ``cells`` that follow from others or are costs, and are not published."""


def build(study: Study) -> Content | None:
    """Figures, the table of confirmed cells, and the best repair; None when the stage has not run for this profile."""
    repairs = load_repairs(study)
    if repairs is None:
        return None
    drawn = figures(study, repairs)
    cells = repairs.cells.drop(DROPPED).with_columns(pl.selectors.float().round_sig_figs(6))
    return Content(
        figures=drawn,
        context={
            "names": list(drawn),
            "runs": _runs(study, repairs),
            "steps": [row for model in study.params.models for row in leading(repairs.cells, model)],
            **_numbers(study, repairs),
        },
        findings=[_finding(study, repairs, model) for model in study.params.models],
        tables={"cells.csv": cells},
        metrics=_metrics(study, repairs),
    )


def figures(study: Study, repairs: Repairs) -> dict[str, Figure]:
    """All figures that these tables have rows for."""
    marks = MARKS.format(**_numbers(study, repairs))
    found = {}
    if len(rank_rows(repairs.edits)):
        found["restoration_ranks"] = Figure(
            rankwise(repairs),
            "Singular directions, left and right, of a reference put into all layers of SFT_End, whose singular values "
            f"stay: those of the largest singular values (top) or of the smallest (last). {marks}",
        )
    if has_layers(repairs):
        found["restoration_layers"] = Figure(
            layerwise(repairs),
            "The same for the directions of all ranks, in one block of layers (left) and in all layers up to one "
            f"(right). {marks}",
        )
    if len(kind_rows(repairs.edits)):
        found["restoration_kinds"] = Figure(
            kinds(repairs),
            "Other ways back to a reference: its singular values alone, one side of its directions, some matrices "
            f"only, part of the way, its weights. {marks} Confirmed edits are shown on confirm hands only.",
        )
    if len(impose_rows(repairs.edits)):
        found["restoration_impose"] = Figure(
            impose(repairs),
            "The reverse test: if directions carry what RL gained, SFT_End's directions on RL should take it away, and "
            f"RL's directions on SFT_End should bring it. {marks}",
        )
    if len(tradeoff_rows(repairs).filter(pl.col("control_of") == "")):
        budget = study.params.restore.id_budget
        found["restoration_tradeoff"] = Figure(
            tradeoff(repairs, budget),
            f"Every cell on SFT_End. {marks} Only edits left of the red line, at most {percent(budget, 0)} of ID "
            "accuracy lost on select, could be chosen. The grey line joins the screened cells that no other screened "
            "cell beats in both; being the best of many, they look better here than they are. 0 % is SFT_End and "
            "100 % SFT_MaxOOD; bars: paired 95 % intervals of the change, the loss taken as known.",
        )
    starts = _starts(study, repairs)
    if len(starts):
        found["restoration_starts"] = Figure(
            better_in(starts),
            f"The base's {window_name(0.0, TOP)} of directions put back into every rung that RL starts from, against "
            "the rung as it was; number: SFT step. "
            f"Measured on the {starts['split'][0]} hands; the accuracy before is that of the other split, so that luck "
            "with hands is not on both axes. On the dotted line the repair changes nothing.",
        )
    return found


def _starts(study: Study, repairs: Repairs) -> pl.DataFrame:
    tables = [
        repaired_starts(study, repairs, choice).with_columns(
            pl.lit(choice.model).alias("model"), pl.lit(choice.seed, pl.Int64).alias("seed")
        )
        for choice in study.choices
    ]
    return pl.concat(tables)


def _numbers(study: Study, repairs: Repairs) -> dict[str, Any]:
    """What captions and the template say about the grid."""
    sizes = {split: repairs.cells.filter(pl.col("split") == split)["n"].max() for split in ("select", "confirm")}
    defect = repairs.confirmed["orthogonality_defect"].max()
    return {
        "screen": sizes["select"] or 0,
        "confirm": sizes["confirm"] or 0,
        "best": study.params.restore.best,
        "budget": study.params.restore.id_budget,
        "screened": repairs.screened["cell_id"].n_unique(),
        "defect": f"{defect:.2g}" if isinstance(defect, float) else "0",
        "official": bool(repairs.cells["official"].any()),
        "heads": [look.label for look in CONTROL_LOOKS.values()],
        "round_trips": repairs.cells.filter((pl.col("operator") == "round_trip") & (pl.col("split") == "confirm"))
        .select("model", "seed", "target", "ood_difference", "change_norm")
        .with_columns(pl.col("target").map_elements(model_name, return_dtype=pl.String))
        .to_dicts(),
    }


def _runs(study: Study, repairs: Repairs) -> list[dict[str, Any]]:
    """The confirmed edits of every run with their controls beside them."""
    runs = []
    for model, seed in study.runs:
        edits = of_run(repairs.confirmed, model, seed)
        controls = of_run(repairs.controls, model, seed)
        if edits.is_empty():
            continue
        ordered = edits.sort("target", "contrast", "ood_accuracy", descending=[True, True, True]).to_dicts()
        screened = of_run(repairs.screened, model, seed)
        within = set(screened.filter(pl.col("id_difference") >= _limit(study))["cell_id"].to_list())
        lines = [
            _line(row, controls.filter(pl.col("control_of") == row["cell_id"]))
            | {"over_budget": row["cell_id"] in within and breaks_budget(row, study.params.restore.id_budget)}
            for row in ordered
        ]
        one = edits.row(0, named=True)
        runs.append({"model": model, "seed": seed, "lines": lines, "n": one["n"], "peak": one["ood_peak"]})
    return runs


def _line(row: dict[str, Any], controls: pl.DataFrame) -> dict[str, Any]:
    """One row of the table in words, with the OOD accuracy of every draw of its controls."""
    found = {
        operator: [_drawn(draw, row) for draw in controls.filter(pl.col("operator") == operator).to_dicts()]
        for operator in CONTROL_LOOKS
    }
    return row | {
        "name": edit_name(row, target=row["target"] != END),
        "controls": [", ".join(values) or "–" for values in found.values()],
        "against": "–" if row["p_control"] is None else p_value(row["p_control"]),
    }


def _drawn(draw: dict[str, Any], row: dict[str, Any]) -> str:
    """OOD accuracy of one draw of a control and its change of ID accuracy, with its size where that is another."""
    ratio = draw["change_norm"] / row["change_norm"] if row["change_norm"] else 1.0
    size = "" if abs(ratio - 1) < _SAME_SIZE else f", ×{ratio:.2f}"
    return f"{percent(draw['ood_accuracy'])} (ID {points(draw['id_difference'])}{size})"


def breaks_budget(row: dict[str, Any], budget: float) -> bool:
    """Whether an edit costs more ID accuracy on the confirm hands than a repair may."""
    return bool(row["id_difference"] < -budget - 1e-9)


def _strongest(row: dict[str, Any]) -> str:
    """Name of the control that came closest: ids begin with the operator."""
    found = [name for operator, name in CONTROLS.items() if row["best_control"].startswith(operator)]
    return found[0] if found else row["best_control"]


def _best(study: Study, repairs: Repairs, model: str, seed: int) -> dict[str, Any] | None:
    """The repair of SFT_End within the ID budget that was best on select, as measured on confirm."""
    ours = (pl.col("target") == END) & (pl.col("reference") != RL)
    confirmed = of_run(repairs.confirmed, model, seed).filter(ours)
    select = of_run(repairs.screened, model, seed).filter(
        ours & pl.col("cell_id").is_in(confirmed["cell_id"].to_list()) & (pl.col("id_difference") >= _limit(study))
    )
    if select.is_empty():
        return None
    cell = select.sort("ood_accuracy", "change_norm", descending=[True, False])["cell_id"][0]
    return confirmed.filter(pl.col("cell_id") == cell).row(0, named=True)


def _limit(study: Study) -> float:
    """The lowest change of ID accuracy of a repair, with room for rounding."""
    return -study.params.restore.id_budget - 1e-9


def _finding(study: Study, repairs: Repairs, model: str) -> str:
    """The repair that screening puts first, as confirmed, with its price and its strongest control."""
    parts = []
    seeds = study.params.seeds
    for seed in seeds:
        best = _best(study, repairs, model, seed)
        where = f"seed {seed}: " if len(seeds) > 1 else ""
        budget = study.params.restore.id_budget
        parts.append(
            f"{where}{_sentence(repairs, best, budget) if best else 'no edit of SFT_End is within the ID budget'}"
        )
    return f"Weight edits of SFT_End on model {model}, the best on select as confirmed: {'. '.join(parts)}."


def _sentence(repairs: Repairs, best: dict[str, Any], budget: float) -> str:
    recovered = f", {percent(best['recovery'], 0)} of the loss" if best["recovery"] is not None else ""
    change = interval(best["ood_difference_low"], best["ood_difference_high"])
    cost = interval(best["id_difference_low"], best["id_difference_high"])
    text = (
        f"{edit_name(best)}: OOD {points(best['ood_difference'])} points {change}{recovered}, ID "
        f"{points(best['id_difference'])} {cost}"
    )
    if breaks_budget(best, budget):
        text += f", which breaks the ID budget of {100 * budget:g} points, though it kept it on the select hands"
    if best["p_control"] is None:
        return text
    rows = of_run(repairs.controls, best["model"], best["seed"]).filter(pl.col("cell_id") == best["best_control"])
    return (
        f"{text}; its strongest control, {_strongest(best)}, gains {points(rows['ood_difference'][0])} points OOD at "
        f"{points(rows['id_difference'][0])} ID (p of the OOD difference {p_value(best['p_control'])})"
    )


def _metrics(study: Study, repairs: Repairs) -> RunMetrics:
    found: RunMetrics = {}
    for model, seed in study.runs:
        best = _best(study, repairs, model, seed)
        if best is not None:
            found[model, seed] = {
                "repair_best_recovery": best["recovery"],
                "repair_best_ood_gain": best["ood_difference"],
                "repair_best_id_change": best["id_difference"],
                "repair_best_over_budget": int(breaks_budget(best, study.params.restore.id_budget)),
                "repair_best_p_control": best["p_control"],
            }
    return found


SECTION = Section("restoration", "What can be turned back", 39, build)
