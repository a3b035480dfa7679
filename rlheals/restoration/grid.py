"""Evaluate cells on one live engine: edit, apply, probe, revert, and keep what was found, so that nothing is redone.

Every finished cell leaves two files in scratch, its answers and its facts, the facts last and each in one rename: a
grid that was killed goes on at the next cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from rlheals.errors import UserError, disk_errors
from rlheals.inference.live import prove
from rlheals.reporting.schemas import read_table, write_table
from rlheals.restoration.job import MatrixView, Pair, distance
from rlheals.restoration.live import Editable, FileState, LiveModel
from rlheals.restoration.operators import apply_edit
from rlheals.restoration.plan import Subjects, needs_factors
from rlheals.restoration.served import ServedModel
from rlheals.spectra.reader import Weights, check_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import polars as pl
    from torch import Tensor

    from rlheals.inference import Engine
    from rlheals.restoration.edit import Edit
    from rlheals.restoration.live import Holder
    from rlheals.restoration.plan import Cell
    from rlheals.spectra.store import FactorStore, StoredFactors

UNEDITED = "unedited-"
"""Before the name of a model where answers of the model itself are kept under a cell's name."""
_OPEN_FACTORS = 256  # decompositions held open at a time, each a file descriptor
_ANSWERS, _FACTS = ".parquet", ".json"


class ModelSet:
    """The models of a grid, open for reading tensor by tensor, with one decomposition of each of their tensors.

    Attributes:
        weights: the open folder of each model, by name.
        store: where decompositions lie.
        decomposed: digests of the tensors whose decomposition was asked for.
    """

    def __init__(self, folders: Mapping[str, Path], store: FactorStore) -> None:
        """Open the folders; two names of one folder share it.

        Raises:
            UserError: a folder is unreadable, or the models do not have the same tensors.
        """
        self.store = store
        self.decomposed: set[str] = set()
        self._open: dict[str, StoredFactors] = {}
        self._norms: dict[tuple[str, str], float] = {}
        self._first_factorised = store.factorised
        with ExitStack() as files:
            by_path: dict[Path, Weights] = {}
            for folder in folders.values():
                if folder.resolve() not in by_path:
                    by_path[folder.resolve()] = files.enter_context(Weights(folder))
            self.weights = {name: by_path[folder.resolve()] for name, folder in folders.items()}
            first = next(iter(self.weights.values()))
            for weights in by_path.values():
                check_same(first, weights)
            self.topology, self.shapes = first.topology, first.shapes
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for factors in self._open.values():
            factors.close()
        self._open.clear()
        self._files.close()

    def identity(self, name: str) -> str:
        """Digest over all weights of a model."""
        weights = self.weights[name]
        lines = sorted(f"{tensor} {weights.digest(tensor)}" for tensor in weights.shapes)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def subjects(self, starts: Sequence[str] = ()) -> Subjects:
        """What the plan needs to know of these models."""
        identities = {name: self.identity(name) for name in self.weights}
        return Subjects(identities, self.topology, self.shapes, tuple(starts))

    def view(self, model: str, tensor: str) -> MatrixView:
        """One tensor of one model, read and decomposed only where an operator asks for it."""
        return MatrixView(lambda: self.weights[model].tensor(tensor), lambda: self._factors(model, tensor))

    def norm(self, model: str, tensor: str) -> float:
        """``‖W‖_F``, read once."""
        if (model, tensor) not in self._norms:
            values = self.weights[model].tensor(tensor)
            wide = torch.promote_types(values.dtype, torch.float32)
            self._norms[model, tensor] = float(torch.linalg.vector_norm(values, dtype=wide))
        return self._norms[model, tensor]

    def distances(self, edit: Edit) -> dict[str, float]:
        """``‖W_B − W_T‖_F`` of every tensor of an edit."""
        reference, target = self.weights[edit.reference], self.weights[edit.target]
        names = edit.names(self.topology)
        return {name: distance(reference.tensor(name), target.tensor(name)) for name in names}

    def check_room(self, cells: Iterable[Cell]) -> None:
        """Make sure that the store can keep every decomposition of these cells at once, so that none is made twice.

        Raises:
            UserError: it cannot; the sentence says what ``restore.cache_gib`` has to be.
        """
        sizes: dict[str, int] = {}
        for edit in (cell.edit for cell in cells if needs_factors(cell.edit)):
            for name in edit.names(self.topology):
                rows, columns = self.shapes[name]
                size = 8 * min(rows, columns) * (rows + columns + 1)
                for model in (edit.reference, edit.target):
                    sizes[self.weights[model].digest(name)] = size
        needed = sum(sizes.values())
        if needed > self.store.cap_bytes:
            raise UserError(
                f"restore.cache_gib allows {self.store.cap_bytes / 2**30:.3g} GiB of factors, but this grid needs "
                f"{needed / 2**30:.3g}; raise it, or plan fewer references, starts or layers."
            )

    def check_counter(self) -> None:
        """Make sure that no tensor was decomposed twice.

        Raises:
            UserError: one was, because something else filled or emptied the cache.
        """
        made = self.store.factorised - self._first_factorised
        if made > len(self.decomposed):
            raise UserError(
                f"{made} decompositions were made of {len(self.decomposed)} tensors, so entries of "
                f"{self.store.directory} went missing; let nothing else write there and run again."
            )

    def _factors(self, model: str, tensor: str) -> StoredFactors:
        weights = self.weights[model]
        digest = weights.digest(tensor)
        found = self._open.pop(digest, None)
        if found is None:
            self.decomposed.add(digest)
            found = self.store.factors(lambda: weights.tensor(tensor), digest)
        self._open[digest] = found  # at the end: the longest unused is first
        if len(self._open) > _OPEN_FACTORS:
            self._open.pop(next(iter(self._open))).close()
        return found


@dataclass(frozen=True)
class EditedModel:
    """An edit of a whole model.

    Attributes:
        changes: every tensor that became another one.
        facts: what is told about it.
    """

    changes: dict[str, Tensor]
    facts: Facts


@dataclass(frozen=True)
class Facts:
    """What a cell leaves beside its answers.

    Attributes:
        matrices: how many tensors are in the scope.
        orthogonality_defect: largest of them, see `rlheals.restoration.operators.Edited`.
        change_norm: of the edit, relative to the norm of the target's weights in scope.
        bytes: of the weights that changed.
        rank_from: where the window starts, as a share of the rank (of the scope's first matrix for one of counts); a
            window of both ends starts where its trailing ranks do.
        rank_to: where it ends; a window of both ends where its leading ranks do, which is less than ``rank_from``.
        norms: ``‖edited − target‖_F`` of each tensor in scope.
        seconds: edit, probe and revert together.
    """

    matrices: int
    orthogonality_defect: float
    change_norm: float
    bytes: int
    rank_from: float
    rank_to: float
    norms: dict[str, float]
    seconds: float = 0.0


def edit_model(edit: Edit, models: ModelSet) -> EditedModel:
    """Edit every tensor in the scope of ``edit``, one after the other.

    Raises:
        UserError: see `rlheals.restoration.operators.apply_edit`.
    """
    names = edit.names(models.topology)
    changes: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    defect, size = 0.0, 0
    for name in names:
        edited = apply_edit(edit, Pair(models.view(edit.reference, name), models.view(edit.target, name)), name=name)
        norms[name], defect = edited.change_norm, max(defect, edited.orthogonality_defect)
        if edited.change_norm:
            changes[name] = edited.tensor
            size += edited.tensor.numel() * edited.tensor.element_size()
    before = math.hypot(*(models.norm(edit.target, name) for name in names))
    ranks = edit.window.shares(min(models.shapes[names[0]]))
    relative = math.hypot(*norms.values()) / before if before else 0.0
    return EditedModel(changes, Facts(len(names), defect, relative, size, *ranks, norms))


@dataclass(frozen=True)
class Finished:
    """A cell that was probed; the answers have schema ``answers``."""

    cell: Cell
    facts: Facts
    answers: pl.DataFrame


@dataclass
class Grid:
    """One live engine that takes one edit after the other.

    Attributes:
        models: all references and targets.
        engine: started once, with any of them.
        probe: asks hands; called with hands, target, cell name, and a function that counts finished hands.
        scratch: where finished cells lie; the caller names it after everything that decides the numbers.
        load: gives a target as a Hugging Face model, which proves that the engine answers with its weights.
        dtype: of the engine's weights.
    """

    models: ModelSet
    engine: Engine
    probe: Callable[[pl.DataFrame, str, str, Callable[[int], None]], pl.DataFrame]
    scratch: Path
    load: Callable[[str], Any]
    dtype: str = "float32"
    _live: tuple[str, Editable] | None = field(default=None, init=False)

    def run(
        self, cells: Sequence[Cell], hands: pl.DataFrame, split: str, count: Callable[[int, str], None]
    ) -> list[Finished]:
        """Probe every cell on ``hands``; what scratch holds is read.

        Args:
            cells: in the order to take them; those on one target should be neighbours.
            hands: schema ``probes``.
            split: their split.
            count: told how many hands were finished, and of which cell.

        Raises:
            UserError: an edit cannot be made, or the engine does not return to its target.
        """
        finished = [self._cell(cell, hands, split, count) for cell in cells]
        if self._live is not None:
            self._live[1].settle()
        return finished

    def unedited(self, model: str, hands: pl.DataFrame, split: str, count: Callable[[int, str], None]) -> pl.DataFrame:
        """Schema ``answers`` of a model as it is."""
        name = f"{UNEDITED}{model}"
        file = self.scratch / split / f"{name}{_ANSWERS}"
        if file.is_file():
            count(len(hands), name)
        else:
            self._on(model).settle()
            _write_answers(self.probe(hands, model, name, lambda done: count(done, name)), file)
        return read_table(file, "answers")

    def _cell(self, cell: Cell, hands: pl.DataFrame, split: str, count: Callable[[int, str], None]) -> Finished:
        stem = self.scratch / split / cell.cell_id
        recipe = json.dumps(cell.edit.recipe(), sort_keys=True)
        facts = _read_facts(stem, recipe)
        if facts:
            count(len(hands), cell.cell_id)
        else:
            facts, answers = self._evaluate(cell, hands, count)
            _write_answers(answers, _file(stem, _ANSWERS))
            _write_text(json.dumps({"recipe": recipe, "facts": asdict(facts)}), _file(stem, _FACTS))
        return Finished(cell, facts, read_table(_file(stem, _ANSWERS), "answers"))

    def _evaluate(
        self, cell: Cell, hands: pl.DataFrame, count: Callable[[int, str], None]
    ) -> tuple[Facts, pl.DataFrame]:
        live = self._on(cell.edit.target)
        begin = time.perf_counter()
        edited = edit_model(cell.edit, self.models)
        with live.edited(edited.changes):
            answers = self.probe(hands, cell.edit.target, cell.cell_id, lambda done: count(done, cell.cell_id))
        self.models.check_counter()
        seconds = time.perf_counter() - begin
        return Facts(**{**vars(edited.facts), "seconds": seconds}), answers

    def _on(self, target: str) -> Editable:
        """The engine with the weights of ``target``."""
        if self._live is None or self._live[0] != target:
            if self._live is not None:
                self._live[1].settle()
            self._live = (target, self._make_live(target))
        return self._live[1]

    def _make_live(self, target: str) -> Editable:
        state, model = FileState(self.models.weights[target]), self.load(target)
        if isinstance(getattr(self.engine, "model", None), torch.nn.Module):
            live = LiveModel(cast("Holder", self.engine), state)
            prove(self.engine, model, str(self.models.weights[target].path), self.dtype)
            return live
        return ServedModel(self.engine, state, model, self.dtype)


def _file(stem: Path, suffix: str) -> Path:
    """``stem`` with a suffix; names of cells hold points, so that `Path.with_suffix` would cut them."""
    return stem.with_name(f"{stem.name}{suffix}")


def _read_facts(stem: Path, recipe: str) -> Facts | None:
    """Facts of a finished cell; None where it is not finished or was another edit."""
    try:
        content = json.loads(_file(stem, _FACTS).read_text())
        facts = Facts(**content["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if content["recipe"] == recipe and _file(stem, _ANSWERS).is_file() else None


def _write_answers(answers: pl.DataFrame, file: Path) -> None:
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = _file(file, ".partial")
        write_table(answers, "answers", partial)
        partial.rename(file)


def _write_text(text: str, file: Path) -> None:
    with disk_errors(file):
        partial = _file(file, ".partial")
        partial.write_text(text)
        partial.rename(file)
