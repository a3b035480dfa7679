"""One edit of one model folder, tensor by tensor, and the model card that tells what was done."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from rlheals import __version__
from rlheals.errors import UserError
from rlheals.models.checkpoint import name_some
from rlheals.models.topology import split_name
from rlheals.restoration.card_front import front_matter, plain
from rlheals.restoration.edit import DOSED, TURNING, WINDOWLESS, Edit
from rlheals.restoration.job import length
from rlheals.restoration.operators import Edited, Pair, apply_edit
from rlheals.restoration.patch import Origin, identify
from rlheals.restoration.plan import needs_factors
from rlheals.restoration.tied import twins
from rlheals.spectra.coverage import counterpart, coverage
from rlheals.spectra.reader import common_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rlheals.restoration.grid import ModelSet
    from rlheals.spectra.coverage import Coverage
    from rlheals.spectra.reader import Weights


@dataclass(frozen=True)
class Change:
    """What became of one tensor.

    Attributes:
        name: of the tensor.
        shape: of it.
        ranks: the edited window, as ``0-26 of 128`` or ``0-8, 120-128 of 128``; empty where the edit does not read the
            spectrum.
        relative: ``‖edited − target‖_F / ‖target‖_F``; infinite for a change of a tensor that was all zero.
        defect: orthogonality defect of the mixed bases, see `rlheals.restoration.operators.Edited`.
        note: what the reference lacks of what the edit takes; empty mostly.
    """

    name: str
    shape: tuple[int, ...]
    ranks: str
    relative: float
    defect: float
    note: str = ""


class FolderEdit:
    """An edit of the target's folder; `edited` does one tensor after the other and `changes` keeps the figures.

    Attributes:
        edit: what is done.
        names: tensors that may change, in the model's order; a tied head stored on its own is one of them when the
            embedding is.
        changes: one entry for each tensor done so far; for each expert of a stack.
        left: what stays as it is, and whether it differs from the reference.
    """

    def __init__(self, edit: Edit, models: ModelSet, *, partial: bool = False) -> None:
        """Plan the edit.

        Args:
            edit: what is done.
            models: reference and target.
            partial: go on where weights that differ are not understood, and so stay as they are.

        Raises:
            UserError: the scope names a module or layer that the model does not have, or selects nothing; the window
                holds no rank of any matrix, or all of one whose vectors are to be turned; weights that differ are not
                understood; see also `rlheals.restoration.tied.twins`.
        """
        self.edit, self._models = edit, models
        self.target: Weights = models.weights[edit.target]
        self.reference: Weights = models.weights[edit.reference]
        self._in_reference: dict[str, str] = {}
        self._inputs_first = {matrix.name for matrix in self.target.topology.matrices if matrix.inputs_first}
        self._parts = self._parts_of(edit.names(self.target.topology))
        self._twins = twins(self.target, self._parts)
        self.names = tuple(name for name in self.target.shapes if name in self._parts or name in self._twins)
        self.changes: list[Change] = []
        self._check_window()
        self.left = coverage(self.reference, self.target, self._all_parts())
        if self.left.unknown and not partial:
            raise UserError(_not_understood(self.left))

    def _parts_of(self, chosen: Sequence[str]) -> dict[str, list[str]]:
        """The tensors of the file that change, and what of each: the whole, the rows both models have, or experts."""
        parts: dict[str, list[str]] = {}
        for name in chosen:
            tensor = split_name(name)[0]
            other = counterpart(self.reference, self.target, tensor)
            if other is None:
                continue
            sides = common_rows(self.reference, self.target, other, tensor) if name == tensor else (name, name)
            self._in_reference[sides[1]] = sides[0]
            parts.setdefault(tensor, []).append(sides[1])
        return parts

    def _all_parts(self) -> list[str]:
        return [part for parts in self._parts.values() for part in parts]

    @property
    def notes(self) -> list[str]:
        """What could not be done as the edit says, one sentence for each reason, with the tensors it holds for."""
        reasons: dict[str, list[str]] = {}
        for change in self.changes:
            if change.note:
                reasons.setdefault(change.note, []).append(change.name)
        return [f"{name_some(names)}: {reason}" for reason, names in reasons.items()]

    @property
    def changed(self) -> tuple[str, ...]:
        """The tensors of the file that were edited so far and came out different."""
        return tuple(dict.fromkeys(split_name(change.name)[0] for change in self.changes if change.relative))

    def edited(self, name: str) -> Edited | None:
        """The edited tensor; None outside the scope.

        Raises:
            UserError: the operator cannot take this tensor, a tensor cannot be read, or the result is not finite.
        """
        if name not in self.names:
            return None
        source = self._twins.get(name, name)
        parts = self._parts[source]
        if parts == [source]:
            return self._edited_part(source, name)
        whole = self.target.tensor(source)
        done = [(part, self._edited_part(part, part.replace(source, name, 1))) for part in parts]
        for part, edited in done:
            _, place, rows = split_name(part)
            whole[place if place is not None else slice(rows)] = edited.tensor
        norm = math.hypot(*(edited.change_norm for _, edited in done))
        return Edited(whole, max(edited.orthogonality_defect for _, edited in done), norm)

    def _edited_part(self, part: str, name: str) -> Edited:
        """One matrix, table or vector, told as ``name``."""
        sides = {self.edit.reference: self._in_reference[part], self.edit.target: part}
        views = [self._models.view(*side) for side in sides.items()]
        if needs_factors(self.edit) and len(self.target.shapes[part]) == 2:
            for view in views:  # decomposing takes most of the memory, so it is done while no weight is held
                view.factors()
        done = apply_edit(self.edit, Pair(*views), name=part, inputs_first=part in self._inputs_first)
        if not math.isfinite(done.change_norm):
            raise UserError(
                f"{self.edit.operator} makes numbers of {name} that {self.target.dtypes[part]} cannot hold; edit by a "
                "smaller dose, or leave this tensor out."
            )
        change = self._change(name, self._relative(part, done.change_norm), done.orthogonality_defect)
        self.changes.append(replace(change, note=done.note))
        return done

    def _relative(self, name: str, change_norm: float) -> float:
        if not change_norm:
            return 0.0
        norm = length(self.target.tensor(name))
        return change_norm / norm if norm else math.inf

    def _check_window(self) -> None:
        window, operator = self.edit.window, self.edit.operator
        if operator in WINDOWLESS or window.is_full:
            return
        ranks = {part: min(self.target.shapes[part]) for part in self._all_parts()}
        widths = {part: self._width(part) for part in ranks}
        if not any(widths.values()):
            raise UserError(
                f"the window {window.text} holds no rank of any matrix in the scope, whose ranks go up to "
                f"{max(ranks.values())}; give another window."
            )
        whole = [part for part in ranks if widths[part] == ranks[part]]
        if whole and operator in TURNING:
            raise UserError(
                f"{operator} turns a part of the singular vectors, but {window.text} takes all {ranks[whole[0]]} of "
                f"{whole[0]}, whose span has no angles; give a smaller window, or leave such matrices out by --modules."
            )

    def _width(self, name: str) -> int:
        """How many ranks of a tensor the window holds."""
        return sum(span.stop - span.start for span in self.edit.window.spans(min(self.target.shapes[name])))

    def planned(self) -> list[Change]:
        """What would be done, without an edit being made; the figures are not known yet."""
        takes_whole = self.edit.operator in WINDOWLESS
        named = [(name, part) for name in self.names for part in self._parts[self._twins.get(name, name)]]
        told = [
            part.replace(self._twins.get(name, name), name, 1)
            for name, part in named
            if takes_whole or self._width(part)
        ]
        return [self._change(name, math.nan, math.nan) for name in told]

    def origin(self) -> Origin:
        """What a patch of this edit says of itself."""
        return Origin(self.edit.recipe(), identify(self.reference), identify(self.target))

    def _change(self, name: str, relative: float, defect: float) -> Change:
        shape = self.target.shapes[name]
        ranks = ""
        if len(shape) == 2 and self.edit.operator not in ("swap", "reset", "interpolate", "noise"):
            spans = [f"{span.start}-{span.stop}" for span in self.edit.window.spans(min(shape))]
            ranks = f"{', '.join(spans) or 'none'} of {min(shape)}"
        return Change(name, shape, ranks, relative, defect)


def _not_understood(left: Coverage) -> str:
    share = sum(each.elements for each in left.unknown) / max(1, left.elements)
    return (
        f"{len(left.unknown)} tensors that differ are of kinds that rlheals does not understand, such as "
        f"{left.unknown[0].name} ({100 * share:.2g} % of the weights), so the edit would give back a part of the model "
        "only; say --partial to do so all the same, or take every tensor with --everything (swap, interpolate, reset)."
    )


def model_names(reference: Path, target: Path) -> tuple[str, str]:
    """Names for the two models: of their folders, with the folder above where these are the same."""
    folders = reference.resolve(), target.resolve()
    names = tuple(folder.name for folder in folders)
    if names[0] == names[1]:
        names = tuple(f"{folder.parent.name}-{folder.name}" for folder in folders)
    if names[0] == names[1]:
        names = (f"{names[0]}-reference", f"{names[1]}-target")
    return names[0], names[1]


def command(edit: Edit) -> str:
    """The command line that makes the edit again; folders are BASE, TARGET and DIR, as models are known by digest."""
    scope = edit.scope
    options = {"operator": edit.operator, "basis": edit.basis, "window": edit.window.text}
    if scope.layers is not None:
        options["layers"] = ",".join(map(str, scope.layers))
    if scope.modules:
        options["modules"] = ",".join(scope.modules)
    if edit.operator in DOSED:
        options["dose"] = repr(edit.dose)
    if edit.seed:
        options["seed"] = str(edit.seed)
    flags = {
        "embeddings": scope.embeddings,
        "head": scope.head,
        "everything": scope.everything,
        "official": edit.official,
    }
    words = ["rlheals", "restore", "BASE", "TARGET"]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    return shlex.join([*words, *(f"--{name}" for name, given in flags.items() if given), "--out", "DIR"])


def edit_card(done: FolderEdit, origin: Origin, title: str, digest: str) -> str:
    """The model card of an edited model: recipe, sources, and what changed by how much."""
    edit = done.edit
    changed = [change.relative for change in done.changes if change.relative]
    most = max(filter(math.isfinite, changed), default=0.0)
    rows = [
        f"| {c.name} | {list(c.shape)} | {c.ranks} | {relative_told(c.relative)} | {c.defect:.3g} |"
        for c in done.changes
    ]
    return "\n".join(
        [
            *front_matter(title, [(edit.target, done.target.path), (edit.reference, done.reference.path)], merged=True),
            f"The weights of `{plain(edit.target)}`, edited towards those of `{plain(edit.reference)}` without "
            f"training, by rlheals {__version__} with torch {torch.__version__}. The edit is `{edit.operator}` "
            f"({edit.basis}), ranks `{edit.window.text}`; {len(done.changed)} of {len(done.target.shapes)} tensors "
            "changed"
            + (f", at most by {100 * most:.3g} % (relative Frobenius norm)" if most else "")
            + (", some from all zeros." if math.inf in changed else "."),
            "",
            *_sources({"BASE, the reference": origin.reference, "TARGET": origin.target}, digest),
            "## Recipe",
            "",
            "With folders that hold the weights above for BASE and TARGET:",
            "",
            "```",
            command(edit),
            "```",
            "",
            "```json",
            json.dumps(edit.recipe(), indent=1, sort_keys=True),
            "```",
            "",
            "## What changed",
            "",
            "Ranks count from the largest singular value. The change is relative to the target's tensor; the defect is "
            "how far the vectors of both models, put side by side, are from orthonormal.",
            "",
            *(f"- {note}" for note in done.notes),
            *([""] if done.notes else []),
            "| tensor | shape | ranks | relative change | defect |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *_licence(edit.target, edit.reference),
        ]
    )


def patch_card(
    origins: Iterable[Origin], folder: Path, target: Mapping[str, str], names: Sequence[str], title: str, digest: str
) -> str:
    """The model card of a model in ``folder`` that a patch was applied to."""
    history = [
        {"recipe": dict(o.recipe), "reference": dict(o.reference), "target": dict(o.target), "inverted": o.inverted}
        for o in origins
    ]
    return "\n".join(
        [
            *front_matter(title, [(target["name"], folder)], merged=False),
            f"The weights of `{plain(target['name'])}` with a patch of rlheals applied, which changed {len(names)} "
            f"tensors. Applied by rlheals {__version__}.",
            "",
            *_sources({"target": target}, digest),
            "## Recipe",
            "",
            "The changes in the patch, in order. One without a recipe is the plain difference of two models; an "
            "inverted one was undone.",
            "",
            "```json",
            json.dumps(history, indent=1, sort_keys=True),
            "```",
            "",
            "## What changed",
            "",
            *(f"- {name}" for name in names),
            "",
            *_licence(target["name"]),
        ]
    )


def relative_told(relative: float) -> str:
    """`Change.relative` as people read it."""
    return f"{relative:.3g}" if math.isfinite(relative) else "from all zeros"


def _sources(models: Mapping[str, Mapping[str, str]], digest: str) -> list[str]:
    rows = [f"| {role} | {plain(model['name'])} | `{model['weights_sha256']}` |" for role, model in models.items()]
    return ["| | model | sha256 of the weights |", "|---|---|---|", *rows, f"| this model | | `{digest}` |", ""]


def _licence(*models: str) -> list[str]:
    named = " and ".join(f"`{plain(model)}`" for model in models)
    return [f"The licence and terms of {named} apply to this model too.", ""]
