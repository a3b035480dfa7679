"""What each edit is held against, so that "these directions matter" can be told from "any move back helps".

- ``random_rotation``: the window turned by the very angles, or, where the edit takes a matrix's whole rank or is no
  matter of angles, everything turned by as much as changes the tensor by the same norm; always in a random direction,
  and the singular values stay. The same angles in a random direction change the weights more than the edit does.
- ``noise``: a Gaussian change of the same norm in every tensor.
- ``interpolate``: a plain step back towards the reference's weights, of the same norm in every tensor.
- ``round_trip``: the target through its own factors and back, which shows what the arithmetic alone does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlheals.restoration.edit import BY_ANGLES, CONTROLS, Edit

if TYPE_CHECKING:
    from collections.abc import Mapping

_OF_WEIGHTS = ("swap", "reset", "interpolate")


def controls_of(
    edit: Edit, norms: Mapping[str, float], distances: Mapping[str, float], *, draws: int = 1
) -> list[Edit]:
    """The controls of an edit that has been applied.

    An edit of weights alone (``swap``, ``reset``, ``interpolate``) is its own interpolation, and one of values alone
    has no rotation, so these have fewer controls; a control has none.

    Args:
        edit: what was applied.
        norms: for each tensor ``‖edited − target‖_F``, the ``change_norm`` of `apply_edit`.
        distances: for each tensor ``‖reference − target‖_F``; needed for the interpolation only.
        draws: how many of each random control.
    """
    if edit.control_of or edit.operator in CONTROLS:
        return []
    common = Edit(
        "round_trip", "all", edit.reference, edit.target, edit.scope, edit.window,
        control_of=edit.cell_id, official=edit.official,
    )  # fmt: skip
    by_norm = replace(common, operator="noise", amounts=tuple(sorted(norms.items())))
    controls = [replace(by_norm, seed=edit.seed + draw) for draw in range(draws)]
    if edit.operator != "values":
        turn = _rotation(edit, by_norm)
        controls += [replace(turn, seed=edit.seed + draw) for draw in range(draws)]
    if edit.operator not in _OF_WEIGHTS:
        shares = tuple((name, _share(norm, distances[name])) for name, norm in sorted(norms.items()))
        controls.append(replace(common, operator="interpolate", amounts=shares))
    return [*controls, common]


def _rotation(edit: Edit, by_norm: Edit) -> Edit:
    """A random rotation of the edit's angles where a matrix has some, else one of its norm; each matrix for itself."""
    basis = edit.basis if edit.basis in ("u", "v") else "uv"
    dose = edit.dose if edit.operator in BY_ANGLES and not edit.window.is_full else 1.0
    return replace(by_norm, operator="random_rotation", basis=basis, dose=dose)


def _share(norm: float, distance: float) -> float:
    """How much of the way to the reference a step of this norm is, at most all of it."""
    return min(1.0, norm / distance) if distance else 0.0
