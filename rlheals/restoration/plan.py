"""The grid of edits that a study tries: params and a topology in, cells out, each edit once and in order of cost."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.restoration.controls import controls_of
from rlheals.restoration.edit import CONTROLS, FULL, OFFICIAL, Edit, Scope, Window, head, tail

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rlheals.models.topology import Topology
    from rlheals.params import Restore

BASE, MAX_OOD, END, RL = "base", "sft_max_ood", "sft_end", "rl"
GROUPS = (
    "heads",
    "tails",
    "sides",
    "values",
    "swap",
    "interpolate",
    "rotate",
    "blocks",
    "cumulative",
    "modules",
    "embeddings",
    "drift",
    "impose",
    "starts",
    "control",
)
"""The parts of the grid, and what the column ``group`` of table ``cells`` holds.

``heads``: directions of the leading ranks, all of them included; ``tails``: of the trailing ones; ``sides``: of left or
right vectors only; ``values``: singular values only; ``swap``, ``interpolate``, ``rotate``: the operators of that name;
``blocks`` and ``cumulative``: directions in one block of layers, and in all up to one; ``modules``: in attention or MLP
only; ``embeddings``: embedding and head swapped; ``drift``: drift inside or outside the reference's leading subspaces
removed; ``impose``: directions of SFT_End put on the RL model, and the reverse; ``starts``: repairs of the rungs that
RL starts from; ``control``: controls of any of these.
"""
LEADING = 0.2
"""The share of the rank that the study asks about."""
QUARTER = 4
_ATTENTION = ("self_attention", "cross_attention")
_COPIES = ("swap", "reset")
_PLAIN = ("swap", "reset", "interpolate", "noise")
"""Operators that read no singular vectors."""


@dataclass(frozen=True)
class Cell:
    """One edit of the grid.

    Attributes:
        edit: what is done.
        group: one of `GROUPS`.
        contrast: it is one of the pre-registered comparisons.
    """

    edit: Edit
    group: str
    contrast: bool = False

    @property
    def cell_id(self) -> str:
        """Name of the cell in tables and files."""
        return self.edit.cell_id

    @property
    def is_control(self) -> bool:
        """Whether it is there only to be compared with."""
        return bool(self.edit.control_of) or self.edit.operator in CONTROLS


@dataclass(frozen=True)
class Subjects:
    """The models of a study, as the plan sees them.

    Attributes:
        identities: digest of each model's weights, by name; two names of equal digest are one model.
        topology: what the tensors of all of them are.
        shapes: shape of every tensor.
        starts: names of the rungs that RL starts from, among ``identities``.
    """

    identities: Mapping[str, str]
    topology: Topology
    shapes: Mapping[str, tuple[int, ...]]
    starts: Sequence[str] = ()


def plan(settings: Restore, subjects: Subjects) -> list[Cell]:
    """Every cell of the study, those on one model together and the cheap ones of each first.

    An edit that would give the same weights as an earlier one is left out, and so is one whose reference is its target.

    Raises:
        UserError: a model that is not among the subjects, or more blocks of layers than layers.
    """
    wanted = [*contrasts(settings, subjects.topology), *grid(settings, subjects)]
    kept: dict[tuple[Any, ...], Cell] = {}
    for cell in wanted:
        _check_models(cell.edit, subjects.identities)
        if subjects.identities[cell.edit.reference] != subjects.identities[cell.edit.target]:
            kept.setdefault(result_key(cell.edit, subjects), cell)
    return in_order(kept.values(), subjects)


def in_order(cells: Iterable[Cell], subjects: Subjects) -> list[Cell]:
    """Cells by target, because another target means that all weights are read, and by the work of the edit within."""
    listed = list(cells)
    targets = list(dict.fromkeys(cell.edit.target for cell in listed))
    return sorted(listed, key=lambda cell: (targets.index(cell.edit.target), work(cell.edit, subjects)))


def contrasts(settings: Restore, topology: Topology) -> list[Cell]:
    """The pre-registered comparisons, which go to the ``confirm`` hands whatever screening says.

    From the base on SFT_End: the leading fifth of the directions, all directions, all values, directions of the first
    and of the last quarter of layers, all block matrices swapped. And all directions of SFT_End on the RL model.
    """
    layers = max(1, round(topology.layers / QUARTER))
    first = tuple(range(layers))
    last = tuple(range(topology.layers - layers, topology.layers))
    make = _Maker(settings.official)
    cells = [
        make("heads", "directions", "uv", BASE, END, window=head(LEADING)),
        make("heads", "directions", "uv", BASE, END),
        make("values", "values", "sigma", BASE, END),
        make("blocks", "directions", "uv", BASE, END, Scope(layers=first)),
        make("blocks", "directions", "uv", BASE, END, Scope(layers=last)),
        make("swap", "swap", "all", BASE, END),
        make("impose", "directions", "uv", END, RL),
    ]
    return [replace(cell, contrast=True) for cell in cells]


def grid(settings: Restore, subjects: Subjects) -> Iterator[Cell]:
    """Every cell that the params ask for, in the order of `GROUPS`, repetitions included.

    Raises:
        UserError: more blocks of layers than layers.
    """
    make = _Maker(settings.official)
    parts = [_repairs(make, settings, subjects.topology, reference, END) for reference in settings.references]
    yield from chain.from_iterable(parts)
    for window in (head(LEADING), FULL):
        yield make("impose", "directions", "uv", END, RL, window=window)
        yield make("impose", "directions", "uv", RL, END, window=window)
    yield make("impose", "values", "sigma", END, RL)
    if settings.starts:
        for start in subjects.starts:
            for window in (head(LEADING), FULL):
                yield make("starts", "directions", "uv", BASE, start, window=window)


@dataclass(frozen=True)
class _Maker:
    """Makes cells; where ``official`` is asked for, what the released scripts have is done as they do it."""

    official: bool

    def __call__(
        self,
        group: str,
        operator: str,
        basis: str,
        reference: str,
        target: str,
        scope: Scope = Scope(),  # noqa: B008  frozen
        window: Window = FULL,
        dose: float = 1.0,
    ) -> Cell:
        released = operator in OFFICIAL and basis not in ("u", "v")
        official = self.official and released
        return Cell(Edit(operator, basis, reference, target, scope, window, dose, official=official), group)


def _repairs(make: _Maker, settings: Restore, topology: Topology, reference: str, target: str) -> Iterator[Cell]:
    """All that is put back from one reference."""
    for share in settings.heads:
        yield make("heads", "directions", "uv", reference, target, window=head(share))
    for share in settings.tails:
        yield make("tails", "directions", "uv", reference, target, window=tail(share))
    for basis in ("u", "v"):
        for window in (head(LEADING), FULL):
            yield make("sides", "directions", basis, reference, target, window=window)
    yield make("values", "values", "sigma", reference, target)
    yield make("swap", "swap", "all", reference, target)
    for dose in settings.doses:
        yield make("interpolate", "interpolate", "all", reference, target, dose=dose)
        # The span of all vectors is the whole space, which has no angles: only a part of them can be turned.
        yield make("rotate", "rotate", "uv", reference, target, window=head(LEADING), dose=dose)
    for group, scope in _layer_scopes(settings.layer_blocks, topology.layers):
        yield make(group, "directions", "uv", reference, target, scope)
    for kinds in (_ATTENTION, ("mlp",)):
        modules = tuple(dict.fromkeys(matrix.module for matrix in topology.matrices if matrix.kind in kinds))
        yield make("modules", "directions", "uv", reference, target, Scope(modules))
    yield make("embeddings", "swap", "all", reference, target, Scope(layers=(), embeddings=True, head=True))
    for operator in ("remove_inside", "remove_outside"):
        yield make("drift", operator, "uv", reference, target, window=head(LEADING))


def _layer_scopes(blocks: int, layers: int) -> Iterator[tuple[str, Scope]]:
    """Blocks of layers one by one, then the first two, the first three, … of them."""
    if blocks > layers:
        raise UserError(
            f"restore.layer_blocks is {blocks}, but the model has only {layers} layers; lower it to {layers} or less."
        )
    ends = [layers * block // blocks for block in range(blocks + 1)]
    for start, end in pairwise(ends):
        yield "blocks", Scope(layers=tuple(range(start, end)))
    for end in ends[2:]:
        yield "cumulative", Scope(layers=tuple(range(end)))


def controls_for(cell: Cell, norms: Mapping[str, float], distances: Mapping[str, float], draws: int) -> list[Cell]:
    """The controls of one cell but its round trip, which is the same for all cells of a target (`round_trip`).

    Args:
        cell: what is controlled.
        norms: change of each tensor by it.
        distances: of each tensor to the reference's.
        draws: of each random control.
    """
    edits = controls_of(cell.edit, norms, distances, draws=draws)
    return [Cell(edit, "control") for edit in edits if edit.operator != "round_trip"]


def round_trip(target: str) -> Cell:
    """All block matrices of a target through their own factors and back."""
    return Cell(Edit("round_trip", "all", target, target, Scope()), "control")


def result_key(edit: Edit, subjects: Subjects) -> tuple[Any, ...]:
    """What decides the weights that an edit gives; equal for two edits that are two descriptions of one."""
    names = edit.names(subjects.topology)
    copies = edit.operator in _COPIES or (edit.operator == "interpolate" and edit.dose == 1.0)
    copies |= edit.operator == "directions" and edit.window.is_full and (edit.official or edit.basis == "all")
    models = (subjects.identities[edit.reference], subjects.identities[edit.target])
    if copies:
        return ("copy", *models, names)
    windows = None if edit.operator in _PLAIN else tuple(_window(edit, shape) for shape in _shapes(edit, subjects))
    what = (edit.operator, edit.basis, edit.dose, edit.official, edit.seed, edit.control_of, edit.amounts)
    return (*what, *models, names, windows)


def work(edit: Edit, subjects: Subjects) -> int:
    """About how many multiplications an edit takes, for putting edits in order."""
    return sum(_work(edit, shape) for shape in _shapes(edit, subjects))


def needs_factors(edit: Edit) -> bool:
    """Whether any tensor has to be decomposed for it."""
    return edit.operator not in _PLAIN


def _work(edit: Edit, shape: tuple[int, ...]) -> int:
    entries = 1
    for length in shape:
        entries *= length
    if not needs_factors(edit):
        return entries * (1 if edit.operator in _COPIES else 2)
    turning = 2 if edit.operator in ("directions", "rotate", "random_rotation") else 1
    return entries * (2 + 2 * turning * sum(stop - start for start, stop in _window(edit, shape)))


def _window(edit: Edit, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((span.start, span.stop) for span in edit.window.spans(min(shape)))


def _shapes(edit: Edit, subjects: Subjects) -> list[tuple[int, ...]]:
    return [subjects.shapes[name] for name in edit.names(subjects.topology)]


def _check_models(edit: Edit, known: Mapping[str, str]) -> None:
    """Refuse a model that nobody named."""
    for name in (edit.reference, edit.target):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise UserError(f"there is no model {name!r} to edit or to go back to{hint} There are {', '.join(known)}.")
