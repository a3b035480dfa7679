"""One edit of a model as data: which vectors or values of which weights go back to the reference, and how far.

An `Edit` is a cell of the restoration grid, a line of a recipe and the content of a patch's metadata; what it does to a
matrix is in `rlheals.restoration.operators`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.models.topology import BUFFER, NOT_A_MATRIX, TIED, select, split_name
from rlheals.restoration.windows import FULL, Window, band, ends, head, parse_window, tail

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlheals.models.topology import Topology

__all__ = [
    "BASES", "CONTROLS", "DOSED", "EVERYWHERE", "FULL", "Edit", "Scope", "Window", "band", "ends", "head", "tail",
]  # fmt: skip

BASES: dict[str, tuple[str, ...]] = {
    "directions": ("uv", "u", "v", "all"),
    "values": ("sigma",),
    "swap": ("all",),
    "rotate": ("uv", "u", "v"),
    "interpolate": ("all",),
    "reset": ("all",),
    "remove_outside": ("uv",),
    "remove_inside": ("uv",),
    "random_rotation": ("uv", "u", "v"),
    "noise": ("all",),
    "round_trip": ("all",),
}
"""The operators, and what each may take from the reference: u = left, v = right vectors, sigma = values, all = both.

``directions`` with basis ``all`` takes the values of the window along with its vectors.
"""
CONTROLS = ("random_rotation", "noise", "round_trip")
"""Operators that take nothing from the reference but a size: an angle, a norm, or none."""
DOSED = ("rotate", "interpolate", "remove_outside", "remove_inside", "random_rotation", "noise")
"""Operators that have a dose; elsewhere it is 1."""
BY_ANGLES = ("directions", "rotate")
"""Operators that turn the vectors of a window by angles, as long as the window is not the whole rank of a matrix."""
WINDOWLESS = ("swap", "interpolate", "reset", "noise", "round_trip")
"""Operators that take a tensor whole, and so have no window; elsewhere the window says which ranks are edited."""
_ANY_SHAPE = ("swap", "interpolate", "reset", "noise")
TURNING = ("rotate", "random_rotation")
"""Operators that turn a span by angles, which the span of all vectors does not have."""
_SHARES = ("rotate", "interpolate", "remove_outside", "remove_inside")
OFFICIAL = ("directions", "values", "swap")
"""Operators that the paper's released scripts have."""
_LLAMA = ("llama", "mllama")


@dataclass(frozen=True)
class Scope:
    """Which weights of a model an edit may touch; everything else stays as it is, bit for bit.

    Attributes:
        modules: names such as ``q_proj``; empty for every module of the layers.
        layers: decoder layers; None for all, empty for none.
        embeddings: the embedding too.
        head: the head too; where it is tied to the embedding either of the two flags takes the one matrix they share.
        everything: every tensor of the files but buffers: matrices, tables, norm scales, biases, and what is not
            understood. For edits that take tensors of any shape.
    """

    modules: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    embeddings: bool = False
    head: bool = False
    everything: bool = False

    def names(self, topology: Topology, *, vectors: bool = False) -> tuple[str, ...]:
        """Names of the tensors in the scope, in the topology's order.

        Args:
            topology: of the model.
            vectors: also the norm scales, biases and gates of the layers when no module is named, and the norm after
                the last layer when all layers and the head are in the scope.

        Raises:
            UserError: a module or layer that the model does not have, or nothing is selected.
        """
        if self.everything:
            return _all_tensors(topology)
        tables = self.embeddings or (self.head and topology.tied)
        outside = {"embedding": tables, "positions": self.embeddings, "head": self.head}
        taken = select(topology, self.modules or None, self.layers, embeddings=any(outside.values()))
        names = [m.name for m in taken if outside.get(m.kind, True) or m.module in self.modules]
        if vectors and not self.modules:
            names += [name for name, reason in topology.left_out.items() if self._takes_vector(topology, name, reason)]
        return tuple(names)

    def _takes_vector(self, topology: Topology, name: str, reason: str) -> bool:
        """Whether a tensor that is no matrix belongs to a whole layer of the scope, or is the last norm."""
        if not reason.endswith(NOT_A_MATRIX):
            return False
        layer = topology.layer_of(name)
        if layer is not None:
            return self.layers is None or layer in self.layers
        return self.layers is None and self.head

    @property
    def text(self) -> str:
        """Short, file-name safe: ``all``, ``L0-1``, ``q+v.L0+emb``, ``everything``."""
        if self.everything:
            return "everything"
        modules = "+".join(module.removesuffix("_proj") for module in self.modules)
        layers = "" if self.layers is None else f"L{_ranges(self.layers)}" if self.layers else ""
        matrices = ".".join(part for part in (modules, layers) if part) or ("all" if self.layers is None else "")
        extra = ["emb"] * self.embeddings + ["head"] * self.head
        return "+".join(part for part in (matrices, *extra) if part) or "none"


EVERYWHERE = Scope(embeddings=True, head=True)


@dataclass(frozen=True)
class Edit:
    """One edit, which is one cell of the grid.

    Attributes:
        operator: a key of `BASES`.
        basis: what it takes from the reference, one of the operator's `BASES`.
        reference: name of the model that is gone back to: ``base``, ``sft_max_ood``, ``sft_end``, ``rl``,
            ``sft_<step>``.
        target: name of the model that is edited.
        scope: which weights.
        window: which ranks of each; `FULL` for operators that do not read the spectrum.
        dose: how far: the fraction t of ``rotate`` and ``interpolate``, the part of the drift that ``remove_*`` takes
            away, a factor on angle or norm of the controls.
        control_of: ``cell_id`` of the cell that this one controls.
        seed: of random controls.
        official: as the paper's released scripts do: bases are put side by side without making them orthonormal, the
            whole matrix is swapped when the window is the whole rank, and embedding and head are edited too, with a
            whole model of any family and, on Llama models, with some layers. Its controls are official too and touch
            the same tensors.
        amounts: (tensor, amount) pairs where the amount differs from tensor to tensor: t of ``interpolate``, the
            absolute Frobenius norm of ``noise`` and ``random_rotation``. Follows from the controlled cell, so it is no
            part of the name.

    Raises:
        UserError: an unknown operator, a basis, dose or window it does not have, or ``official`` where nothing was
            released.
    """

    operator: str
    basis: str
    reference: str
    target: str
    scope: Scope
    window: Window = FULL
    dose: float = 1.0
    control_of: str = ""
    seed: int = 0
    official: bool = False
    amounts: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.scope.everything and self.operator not in _ANY_SHAPE:
            raise UserError(
                f"{self.operator} edits matrices, but everything includes vectors and stacks of matrices; use one of "
                f"{', '.join(_ANY_SHAPE)}, or name the parts to edit."
            )
        if self.operator not in BASES:
            near = difflib.get_close_matches(self.operator, BASES, n=1, cutoff=0)[0]
            raise UserError(f"there is no edit {self.operator!r}, did you mean {near!r}? There are {', '.join(BASES)}.")
        if self.basis not in BASES[self.operator]:
            raise UserError(
                f"{self.operator} has no basis {self.basis!r}; choose among {', '.join(BASES[self.operator])}."
            )
        self._check_dose()
        self._check_window()
        released = self.operator in OFFICIAL and self.basis not in ("u", "v")
        if self.official and not released and not self.control_of:
            raise UserError(
                f"the released scripts have no {self.operator} with basis {self.basis!r}; leave out official."
            )

    def _check_dose(self) -> None:
        if self.operator not in DOSED and self.dose != 1.0:
            raise UserError(f"{self.operator} has no dose; leave dose at 1 or use one of {', '.join(DOSED)}.")
        if self.operator in _SHARES and not 0 <= self.dose <= 1:
            raise UserError(f"the dose of {self.operator} is a share within 0 and 1, not {self.dose:g}.")
        for amount in (self.dose, *(amount for _, amount in self.amounts)):
            if not (math.isfinite(amount) and amount >= 0):
                raise UserError(f"the dose of {self.operator} is a number from 0 up, not {amount:g}.")

    def _check_window(self) -> None:
        """Refuse a window that would be told, but not used; a control has that of its cell, which names it."""
        if self.control_of:
            return
        if self.operator in WINDOWLESS and not self.window.is_full:
            raise UserError(
                f"{self.operator} takes every tensor whole and has no window {self.window.text}; leave out the window."
            )
        if self.operator in TURNING and self.window.is_full and not self.amounts:
            raise UserError(
                f"{self.operator} turns a part of the singular vectors; all of them span the whole space, which has no "
                "angles, so give a window such as head:0.2."
            )

    @property
    def cell_id(self) -> str:
        """Readable name that is the same in every run and differs between any two edits; safe as a file name."""
        recipe = self.recipe()
        recipe.pop("amounts")
        if not self.scope.everything:
            del recipe["scope"]["everything"]  # cells had their names before there was such a scope
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
        parts = [self.operator, self.basis, f"{self.reference}-to-{self.target}", self.scope.text]
        parts += [] if self.window.is_full else [self.window.text.replace(":", "")]
        parts += [] if self.dose == 1.0 else [f"dose{self.dose:g}"]
        parts += ["official"] * self.official + [f"draw{self.seed}"] * bool(self.control_of)
        return re.sub(r"[^A-Za-z0-9_.+-]", "-", "_".join([*parts, digest]))

    @property
    def controlled(self) -> str:
        """Operator of the cell that this one controls, which its id begins with; empty for other edits."""
        return next((name for name in BASES if self.control_of.startswith(f"{name}_")), "")

    def amount(self, name: str) -> float:
        """The amount for this tensor; the dose where none is given for it."""
        return dict(self.amounts).get(name, self.dose)

    def names(self, topology: Topology) -> tuple[str, ...]:
        """Names of the tensors that this edit may touch.

        Raises:
            UserError: see `Scope.names`.
        """
        scope = self.scope
        everything = scope.layers is None and not scope.modules
        if self.official and (everything or (scope.layers is not None and topology.family.startswith(_LLAMA))):
            scope = Scope(scope.modules, scope.layers, embeddings=True, head=True)
        return scope.names(topology, vectors=self.operator == "reset")

    def recipe(self) -> dict[str, Any]:
        """Everything that defines the edit, as JSON takes it; `from_recipe` reads it back."""
        return asdict(self) | {"window": self.window.text}


def from_recipe(recipe: Mapping[str, Any]) -> Edit:
    """The edit that `Edit.recipe` wrote.

    Raises:
        UserError: the recipe lacks an entry, has one too many, or is refused by `Edit`.
    """
    try:
        scope = dict(recipe["scope"])
        layers = scope.get("layers")
        known = Scope(
            **scope | {"modules": tuple(scope["modules"]), "layers": None if layers is None else tuple(layers)}
        )
        amounts = tuple((str(name), float(amount)) for name, amount in recipe["amounts"])
        return Edit(**dict(recipe) | {"scope": known, "window": parse_window(recipe["window"]), "amounts": amounts})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the recipe of an edit is incomplete or has an unknown entry ({error}); write it anew."
        ) from error


def _all_tensors(topology: Topology) -> tuple[str, ...]:
    """Every tensor of the files that is a weight, each once."""
    matrices = [split_name(matrix.name)[0] for matrix in topology.matrices]
    rest = [name for name, reason in topology.left_out.items() if reason not in (BUFFER, TIED)]
    return tuple(dict.fromkeys([*matrices, *rest]))


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers as text: ``0-2.7`` for 0, 1, 2 and 7."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ".".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
