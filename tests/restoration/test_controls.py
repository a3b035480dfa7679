"""Controls of each edit, and that a cell with its controls touches nothing outside its scope."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.models.topology import read_topology
from rlheals.restoration.controls import controls_of
from rlheals.restoration.edit import BASES, FULL, Edit, Scope, Window, head, tail
from rlheals.restoration.operators import Edited, Pair, apply_edit, distance
from tests.restoration.pairs import drifted, fitting, tensors

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
STEMS = [f"model.layers.{layer}" for layer in range(2)]
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"{stem}.self_attn.{name}_proj.weight": (8, 8) for stem in STEMS for name in "qk"},
    **{f"{stem}.mlp.up_proj.weight": (12, 8) for stem in STEMS},
    "lm_head.weight": (16, 8),
}
TOPOLOGY = read_topology(CONFIG, SHAPES)
MODEL = {
    name: drifted(*shape, seed=30 + place, dtype=torch.float32) for place, (name, shape) in enumerate(SHAPES.items())
}


def applied(edit: Edit) -> dict[str, Edited]:
    return {name: apply_edit(edit, MODEL[name], name=name) for name in edit.names(TOPOLOGY)}


def controls(edit: Edit, draws: int = 1) -> list[Edit]:
    norms = {name: edited.change_norm for name, edited in applied(edit).items()}
    return controls_of(edit, norms, {name: distance(*tensors(MODEL[name])) for name in norms}, draws=draws)


def cell(operator: str, basis: str, window: Window = FULL, **more: object) -> Edit:
    return Edit(operator, basis, "base", "sft_end", Scope(layers=(0,)), window, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (cell("directions", "uv", head(0.25)), ["noise", "random_rotation", "interpolate", "round_trip"]),
        (cell("directions", "u"), ["noise", "random_rotation", "interpolate", "round_trip"]),
        (cell("values", "sigma"), ["noise", "interpolate", "round_trip"]),
        (cell("swap", "all"), ["noise", "random_rotation", "round_trip"]),
        (cell("interpolate", "all", dose=0.5), ["noise", "random_rotation", "round_trip"]),
        (cell("remove_inside", "uv", head(2)), ["noise", "random_rotation", "interpolate", "round_trip"]),
        (cell("noise", "all"), []),
    ],
    ids=lambda value: value.operator if isinstance(value, Edit) else "",
)
def test_each_edit_has_its_controls(edit: Edit, expected: list[str]) -> None:
    found = controls(edit)
    assert [control.operator for control in found] == expected
    assert {control.control_of for control in found} <= {edit.cell_id}
    assert all(controls_of(control, {}, {}) == [] for control in found)


@pytest.mark.parametrize(
    "edit", [cell("directions", "uv", head(0.25)), cell("directions", "uv"), cell("directions", "v")]
)
def test_controls_are_as_large_as_the_edit(edit: Edit) -> None:
    norms = {name: edited.change_norm for name, edited in applied(edit).items()}
    for control in controls(edit):
        for name, edited in applied(control).items():
            size = distance(*tensors(MODEL[name])) if control.operator == "interpolate" else math.inf
            by_angle = control.operator == "random_rotation" and not edit.window.is_full
            if control.operator != "round_trip" and not by_angle:
                assert edited.change_norm == pytest.approx(min(norms[name], size), rel=2e-3)
            if control.operator == "round_trip":
                assert edited.change_norm < 1e-5 * norms[name]
            if control.operator == "random_rotation":
                now = torch.linalg.svdvals(edited.tensor.double())
                torch.testing.assert_close(now, MODEL[name].target.factors().values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [head(64), head(0.99), head(8)], ids=lambda window: window.text)
def test_a_window_that_covers_the_rank_of_a_matrix_has_a_control_of_its_norm(window: Window) -> None:
    """On a square matrix such a span has no angles, so that a rotation by them would change nothing."""
    edit = cell("directions", "uv", window)
    norms = {name: edited.change_norm for name, edited in applied(edit).items()}
    turn = next(c for c in controls(edit) if c.operator == "random_rotation")
    for name, edited in applied(turn).items():
        assert edited.change_norm == pytest.approx(norms[name], rel=2e-3)


def test_each_matrix_has_the_rotation_that_its_rank_allows() -> None:
    pairs = {"narrow": drifted(8, 8, seed=1, dtype=torch.float32), "wide": drifted(24, 24, seed=2, dtype=torch.float32)}
    edit = cell("directions", "uv", head(8))
    norms = {name: apply_edit(edit, pair, name=name).change_norm for name, pair in pairs.items()}
    turn = next(c for c in controls_of(edit, norms, norms) if c.operator == "random_rotation")
    alone = Edit("random_rotation", "uv", "base", "sft_end", edit.scope, edit.window)
    found = {name: apply_edit(turn, pair, name=name) for name, pair in pairs.items()}
    assert found["narrow"].change_norm == pytest.approx(norms["narrow"], rel=2e-3)
    assert torch.equal(found["wide"].tensor, apply_edit(alone, pairs["wide"], name="wide").tensor)


def test_a_step_longer_than_the_way_ends_at_the_reference() -> None:
    edit = cell("directions", "uv", tail(2))
    names = edit.names(TOPOLOGY)
    step = next(
        c
        for c in controls_of(edit, dict.fromkeys(names, 9.0), dict.fromkeys(names, 3.0))
        if c.operator == "interpolate"
    )
    assert {step.amount(name) for name in names} == {1.0}
    none = next(
        c
        for c in controls_of(edit, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0))
        if c.operator == "interpolate"
    )
    assert all(edited.change_norm == 0.0 for edited in applied(none).values())


def test_draws_differ_and_sizes_are_no_part_of_a_name() -> None:
    edit = cell("directions", "uv", head(0.25))
    found = controls(edit, draws=3)
    assert len({control.cell_id for control in found}) == len(found) == 8
    other = controls_of(edit, dict.fromkeys(SHAPES, 1.0), dict.fromkeys(SHAPES, 2.0), draws=3)
    assert [control.cell_id for control in other] == [control.cell_id for control in found]


def test_controls_of_an_official_edit_touch_what_it_touches() -> None:
    edit = cell("directions", "uv", head(0.25), official=True)
    assert "lm_head.weight" in edit.names(TOPOLOGY)
    assert all(control.names(TOPOLOGY) == edit.names(TOPOLOGY) for control in controls(edit))


KINDS = [(name, basis) for name, known in BASES.items() for basis in known]


@given(
    st.sampled_from(KINDS),
    st.sets(st.sampled_from(["q_proj", "k_proj", "up_proj"])),
    st.one_of(st.none(), st.sets(st.integers(0, 1), min_size=1)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([head(0.3), tail(3), FULL]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_outside_the_scope_is_touched(
    kind: tuple[str, str], modules: set[str], layers: set[int] | None, embeddings: bool, head_: bool, window: Window
) -> None:
    scope = Scope(tuple(sorted(modules)), None if layers is None else tuple(sorted(layers)), embeddings, head_)
    edit = Edit(*kind, "base", "sft_end", scope, fitting(kind[0], window))  # type: ignore[misc]
    before = {name: tensors(pair)[1].clone() for name, pair in MODEL.items()}
    state = {name: tensors(pair)[1] for name, pair in MODEL.items()}
    for each in (edit, *controls(edit)):
        assert set(each.names(TOPOLOGY)) == set(edit.names(TOPOLOGY))
        state |= {name: edited.tensor for name, edited in applied(each).items()}
    for name in SHAPES:
        module = name.split(".")[-2]
        layer = int(name.split(".")[2]) if "layers" in name else -1
        inside = {"embed_tokens": embeddings, "lm_head": head_}.get(module)
        if inside is None:
            inside = (not modules or module in modules) and (layers is None or layer in layers)
        assert torch.equal(tensors(MODEL[name])[1], before[name]), "the target itself stays"
        if not inside:
            assert torch.equal(state[name], before[name])


def test_the_pairs_of_this_file_differ() -> None:
    assert all(isinstance(pair, Pair) and distance(*tensors(pair)) > 0 for pair in MODEL.values())
