from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.restoration.edit import Edit, Scope, head
from rlheals.restoration.plan import (
    GROUPS,
    contrasts,
    controls_for,
    needs_factors,
    plan,
    result_key,
    round_trip,
    work,
)
from tests.common import make_params
from tests.restoration.studies import subjects

if TYPE_CHECKING:
    from rlheals.params import Restore

STARTS = ("sft_10", "sft_12", "sft_480")


def settings(*changes: str) -> Restore:
    return make_params(*changes).restore


def test_the_default_study_has_its_cells() -> None:
    study = subjects(starts=STARTS)
    cells = plan(settings(), study)
    assert len(cells) >= 60
    assert len({cell.cell_id for cell in cells}) == len(cells)
    assert len({result_key(cell.edit, study) for cell in cells}) == len(cells)
    assert {cell.group for cell in cells} == set(GROUPS) - {"control"}
    assert not any(cell.is_control for cell in cells)


def test_plain_steps_go_on_finely_to_where_the_trained_task_falls_off() -> None:
    doses = sorted({cell.edit.dose for cell in plan(settings(), subjects()) if cell.group == "interpolate"})
    late = [dose for dose in doses if dose >= 0.75]
    assert (late[0], late[-1]) == (0.75, 0.95)
    assert all(later - dose == pytest.approx(0.05) for dose, later in pairwise(late))
    assert min(doses) <= 0.25


def test_contrasts_are_those_that_were_registered() -> None:
    cells = [cell.edit for cell in contrasts(settings(), subjects(8).topology)]
    told = [(e.operator, e.reference, e.target, e.window.text, e.scope.text) for e in cells]
    assert told == [
        ("directions", "base", "sft_end", "head:0.2", "all"),
        ("directions", "base", "sft_end", "full", "all"),
        ("values", "base", "sft_end", "full", "all"),
        ("directions", "base", "sft_end", "full", "L0-1"),
        ("directions", "base", "sft_end", "full", "L6-7"),
        ("swap", "base", "sft_end", "full", "all"),
        ("directions", "sft_end", "rl", "full", "all"),
    ]


@pytest.mark.parametrize(
    "change", ["restore.heads=[0.4]", "restore.references=[sft_max_ood]", "restore.layer_blocks=1"]
)
def test_contrasts_are_planned_whatever_the_params_leave_out(change: str) -> None:
    study = subjects()
    planned = {cell.cell_id for cell in plan(settings(change), study) if cell.contrast}
    assert planned == {cell.cell_id for cell in contrasts(settings(), study.topology)}


def test_every_matrix_but_embedding_and_head_is_edited_by_default() -> None:
    study = subjects()
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    for cell in plan(settings(), study):
        names = set(cell.edit.names(study.topology))
        assert (names == outside) if cell.group == "embeddings" else not names & outside
        assert all(len(study.shapes[name]) == 2 for name in names)


def test_layer_blocks_cover_all_layers_once_and_add_up() -> None:
    cells = [c for c in plan(settings("restore.layer_blocks=3"), subjects(7)) if c.edit.reference == "sft_max_ood"]
    blocks = [c.edit.scope.layers for c in cells if c.group == "blocks"]
    assert sorted(layer for block in blocks for layer in block or ()) == list(range(7))
    assert [c.edit.scope.layers for c in cells if c.group == "cumulative"] == [tuple(range(4))]


def test_two_names_of_one_model_give_one_cell() -> None:
    """A start that is SFT_End, and a peak that is the base: their edits are planned already."""
    different = plan(settings(), subjects(starts=STARTS))
    same = plan(settings(), subjects(starts=STARTS, sft_480="sft_end", sft_max_ood="base"))
    assert not [c for c in same if "sft_480" in (c.edit.reference, c.edit.target)]
    assert not [c for c in same if c.edit.reference == "sft_max_ood"]
    assert len(same) < len(different)
    assert len([c for c in same if c.contrast]) == 7


def test_a_model_is_not_repaired_with_itself() -> None:
    cells = plan(settings(), subjects(starts=["sft_12"], sft_12="base", rl="sft_end"))
    assert not [c for c in cells if c.edit.target == "sft_12"]
    assert not [c for c in cells if c.group == "impose"]


def test_cells_of_one_target_are_neighbours_and_cheap_ones_first() -> None:
    study = subjects(starts=STARTS)
    cells = plan(settings(), study)
    targets = [cell.edit.target for cell in cells]
    assert targets == sorted(targets, key=targets.index)
    for target in set(targets):
        costs = [work(cell.edit, study) for cell in cells if cell.edit.target == target]
        assert costs == sorted(costs)


def test_a_start_that_nobody_knows_is_refused_with_the_nearest() -> None:
    study = subjects(starts=["sft_10"])
    wrong = type(study)(study.identities, study.topology, study.shapes, ("sft_11",))
    with pytest.raises(UserError, match=r"no model 'sft_11' .*did you mean 'sft_10'\?"):
        plan(settings(), wrong)


def test_more_blocks_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="layer_blocks is 5, but the model has only 4 layers"):
        plan(settings("restore.layer_blocks=5"), subjects())


def test_official_edits_are_those_that_were_released() -> None:
    cells = plan(settings("restore.official=true"), subjects())
    for cell in cells:
        released = cell.edit.operator in ("directions", "values", "swap") and cell.edit.basis not in ("u", "v")
        assert cell.edit.official == released
    swapped = [c for c in cells if c.edit.operator == "swap" and c.group == "swap"]
    assert [c.edit.reference for c in swapped] == [], "all official directions are a swap already"


def test_starts_are_left_out_where_params_say_so() -> None:
    assert not [c for c in plan(settings("restore.starts=false"), subjects(starts=STARTS)) if c.group == "starts"]


@examples(max_examples=15)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 9]))
def test_any_params_give_each_result_once(heads: list[float], blocks: int, layers: int) -> None:
    study = subjects(layers, starts=STARTS)
    own = settings().model_copy(update={"heads": heads, "layer_blocks": min(blocks, layers)})
    cells = plan(own, study)
    assert len({result_key(cell.edit, study) for cell in cells}) == len(cells) == len({cell.cell_id for cell in cells})
    assert cells == plan(own, study)
    for share in heads:
        window = head(share)
        key = result_key(Edit("directions", "uv", "base", "sft_end", Scope(), window), study)
        assert key in {result_key(cell.edit, study) for cell in cells}


def test_controls_name_their_cell_and_the_round_trip_is_apart() -> None:
    study = subjects()
    for cell in contrasts(settings(), study.topology):
        names = cell.edit.names(study.topology)
        controls = controls_for(cell, dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0), draws=2)
        assert controls
        assert {control.edit.control_of for control in controls} == {cell.cell_id}
        assert all(control.is_control and control.group == "control" for control in controls)
        assert {control.edit.target for control in controls} == {cell.edit.target}
        assert "round_trip" not in {control.edit.operator for control in controls}
        assert len([c for c in controls if c.edit.operator == "noise"]) == 2
    assert round_trip("rl").is_control


def test_only_edits_of_spectra_need_factors() -> None:
    told = {c.edit.operator: needs_factors(c.edit) for c in plan(settings(), subjects())}
    assert {name for name, needed in told.items() if not needed} == {"swap", "interpolate"}
