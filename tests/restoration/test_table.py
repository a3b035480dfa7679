from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rlheals.errors import UserError
from rlheals.restoration.edit import Edit, Scope, head
from rlheals.restoration.grid import Facts, Finished
from rlheals.restoration.plan import Cell
from rlheals.restoration.table import best_repairs, cells_table, scope_columns
from rlheals.stats import holm, mcnemar_exact
from tests.restoration.studies import RUN, answers, hands

if TYPE_CHECKING:
    import polars as pl

N = 40
HANDS = hands(N)
FACTS = Facts(28, 0.1, 0.2, 1000, 0.0, 0.2, {})


def solving(cell_id: str, id_solved: int, ood_solved: int) -> pl.DataFrame:
    """Answers that solve the first so many hands of each condition."""
    limits = {"id": id_solved, "ood": N + ood_solved}
    return answers(HANDS, cell_id, lambda condition, place: place < limits[condition])


def finished(
    share: float,
    id_solved: int,
    ood_solved: int,
    *,
    control_of: str = "",
    contrast: bool = False,
    target: str = "sft_end",
    reference: str = "base",
) -> Finished:
    if control_of:
        edit = Edit("noise", "all", "base", target, Scope(), control_of=control_of, seed=ood_solved)
        cell = Cell(edit, "control")
    else:
        cell = Cell(Edit("directions", "uv", reference, target, Scope(), head(share)), "heads", contrast)
    return Finished(cell, FACTS, solving(cell.cell_id, id_solved, ood_solved))


UNEDITED = {
    "sft_end": solving("unedited-sft_end", 38, 10),
    "sft_max_ood": solving("unedited-sft_max_ood", 36, 30),
    "rl": solving("unedited-rl", 38, 20),
}


def test_a_row_compares_with_the_target_and_the_peak() -> None:
    row = cells_table([finished(0.2, 37, 25)], UNEDITED, RUN, "select").row(0, named=True)
    assert (row["n"], row["split"], row["seed"], row["group"]) == (N, "select", 0, "heads")
    assert (row["ood_accuracy"], row["ood_before"], row["ood_peak"]) == (25 / N, 10 / N, 30 / N)
    assert row["ood_difference"] == pytest.approx(15 / N)
    assert row["recovery"] == pytest.approx(15 / 20)
    assert row["p_value"] == mcnemar_exact(15, 0)
    assert row["id_difference"] == pytest.approx(-1 / N)
    assert row["ood_difference_low"] < 15 / N < row["ood_difference_high"]
    assert row["ood_low"] < 25 / N < row["ood_high"]
    assert row["format_error_rate"] == pytest.approx(15 / N)
    assert (row["rank_from"], row["rank_to"], row["matrices"], row["bytes"]) == (0.0, 0.2, 28, 1000)
    assert row["p_holm"] is None
    assert row["p_control"] is None


def test_nothing_lost_is_nothing_to_recover() -> None:
    flat = {**UNEDITED, "sft_max_ood": UNEDITED["sft_end"]}
    assert cells_table([finished(0.2, 37, 25)], flat, RUN, "select")["recovery"].to_list() == [None]


def test_only_confirmed_edits_are_corrected_and_held_against_controls() -> None:
    own = finished(0.2, 37, 25, contrast=True)
    other = finished(0.4, 37, 14)
    weak, strong = (finished(0, 37, ood, control_of=own.cell.cell_id) for ood in (12, 22))
    rows = cells_table([own, weak, other, strong], UNEDITED, RUN, "confirm").to_dicts()
    assert [row["p_holm"] for row in rows] == [
        *holm([mcnemar_exact(15, 0), mcnemar_exact(4, 0)])[:1],
        None,
        *holm([mcnemar_exact(15, 0), mcnemar_exact(4, 0)])[1:],
        None,
    ]
    assert rows[0]["best_control"] == strong.cell.cell_id
    assert rows[0]["p_control"] == mcnemar_exact(3, 0)
    assert [row["best_control"] for row in rows[1:]] == ["", "", ""]
    assert [row["contrast"] for row in rows] == [True, False, False, False]
    assert rows[1]["control_of"] == own.cell.cell_id
    assert rows[1]["draw"] == 12


def test_an_edit_that_does_harm_is_held_against_the_control_that_does_most() -> None:
    own = finished(1.0, 37, 2, target="rl")
    controls = [finished(0, 37, ood, control_of=own.cell.cell_id, target="rl") for ood in (19, 9)]
    rows = cells_table([own, *controls], UNEDITED, RUN, "confirm").to_dicts()
    assert rows[0]["best_control"] == controls[1].cell.cell_id


def test_other_hands_are_refused() -> None:
    odd = finished(0.2, 37, 25)
    fewer = Finished(odd.cell, odd.facts, odd.answers.head(2 * N - 1))
    with pytest.raises(UserError, match="not asked the same hands"):
        cells_table([fewer], UNEDITED, RUN, "select")


def test_a_condition_that_nobody_asked_is_told() -> None:
    odd = finished(0.2, 37, 25)
    with pytest.raises(UserError, match="no ood hand was asked"):
        cells_table([Finished(odd.cell, odd.facts, odd.answers.head(N))], UNEDITED, RUN, "select")


def test_the_best_repairs_keep_the_budget_and_are_new() -> None:
    """38 of 40 ID hands before; a budget of 0.05 allows the loss of two of them."""
    best, costly, known, second, elsewhere = (
        finished(0.1, 36, 28),
        finished(0.2, 35, 30),
        finished(0.3, 38, 29, contrast=True),
        finished(0.4, 38, 20),
        finished(0.5, 38, 30, target="rl"),
    )
    brought_in = finished(0.6, 38, 35, reference="rl")
    control = finished(0, 38, 30, control_of=best.cell.cell_id)
    table = cells_table([second, best, costly, known, elsewhere, control, brought_in], UNEDITED, RUN, "select")
    assert best_repairs(table, 5, 0.05) == [best.cell.cell_id, second.cell.cell_id]
    assert best_repairs(table, 1, 0.05) == [best.cell.cell_id]
    assert best_repairs(table, 1, 0.10) == [costly.cell.cell_id]
    assert best_repairs(table, 0, 0.05) == []


@pytest.mark.parametrize(
    ("scope", "told"),
    [
        (Scope(), ("all", "all")),
        (Scope(layers=(0, 1, 2, 7)), ("0-2,7", "all")),
        (Scope(("q_proj", "k_proj")), ("all", "q_proj,k_proj")),
        (Scope(layers=(), embeddings=True, head=True), ("", "embed_tokens,lm_head")),
        (Scope(embeddings=True), ("all", "all,embed_tokens")),
    ],
)
def test_scopes_are_told_in_two_columns(scope: Scope, told: tuple[str, str]) -> None:
    assert scope_columns(scope) == told
