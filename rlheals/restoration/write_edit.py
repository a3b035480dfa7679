"""Carry an edit out: as a folder, a patch, a recipe or several of them at once, every tensor being edited once."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlheals.errors import UserError
from rlheals.progress import Progress
from rlheals.restoration.folder_edit import FolderEdit, edit_card, model_names
from rlheals.restoration.grid import ModelSet
from rlheals.restoration.patch import PatchWriter, digest_of, hash_weights, model_digest, tensor_digest
from rlheals.restoration.recipe import Recipe, check_input, check_result, read_recipe, with_names, write_recipe
from rlheals.restoration.write_model import SHARD_BYTES, check_out, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from rlheals.restoration.patch_content import Origin
    from rlheals.restoration.recipe import Role
    from rlheals.spectra.store import FactorStore


@dataclass(frozen=True)
class Outputs:
    """Where an edit is written to; None for what is not wanted.

    Attributes:
        folder: the edited model.
        patch: the change alone.
        recipe: the edit and the digests alone.
        shard_bytes: largest weight file of the folder.
    """

    folder: Path | None = None
    patch: Path | None = None
    recipe: Path | None = None
    shard_bytes: int = SHARD_BYTES

    @property
    def paths(self) -> list[Path]:
        """All that is written."""
        return [path for path in (self.folder, self.patch, self.recipe) if path is not None]

    @property
    def change_alone(self) -> bool:
        """Whether a patch or a recipe is wanted, which need a change."""
        return self.patch is not None or self.recipe is not None


def write_edit(planned: FolderEdit, outputs: Outputs, device: str = "cpu") -> str:
    """Edit every tensor once, into all outputs; returns the `model_digest` of the edited weights.

    Args:
        planned: the edit.
        outputs: where to.
        device: where decompositions are made.

    Raises:
        UserError: a patch or a recipe is asked for and nothing changes; see also `FolderEdit.edited`, `write_model`,
            `PatchWriter` and `write_recipe`.
    """
    for weights in (planned.reference, planned.target):
        hash_weights(weights)
    if outputs.change_alone and model_digest(planned.reference) == model_digest(planned.target):
        raise UserError("both models hold the same weights, so there is nothing to patch; check which are named.")
    origin = planned.origin()

    def checked(digest: str) -> None:
        if outputs.change_alone and digest == origin.target["weights_sha256"]:
            raise UserError("the edit changes nothing, so there is nothing to patch; check that the models differ.")

    with ExitStack() as stack:
        writer = stack.enter_context(PatchWriter(outputs.patch)) if outputs.patch else None
        digest = _carry_out(planned, origin, outputs, writer, checked)
        if writer is not None:
            writer.finish([origin], writer.ends(planned.target))
        if outputs.recipe is not None:
            sides = {"reference": origin.reference, "target": origin.target}
            write_recipe(Recipe.made(planned.edit, sides, digest, device), outputs.recipe)
    return digest


def apply_recipe(
    file: Path, reference: Path, target: Path, out: Path, store: Callable[[str], FactorStore], shard_bytes: int
) -> tuple[FolderEdit, str]:
    """Make the edit of a recipe between two models given here; the folder appears when the bits are those promised.

    Args:
        file: the recipe.
        reference: folder of the model to go back to.
        target: folder of the model to edit.
        out: a new folder, or one that rlheals wrote before.
        store: decompositions for a device, told ``cpu`` or ``cuda``.
        shard_bytes: largest weight file.

    Returns:
        The edit that was made, and the `model_digest` of what came of it.

    Raises:
        UserError: a model is not the recipe's, the bits differ, or see `read_recipe` and `write_edit`.
    """
    recipe = read_recipe(file)
    check_out(out, reference, target, file)
    edit = with_names(recipe, model_names(reference, target))
    folders = {edit.reference: reference, edit.target: target}
    with _threads(recipe.machine.threads), ModelSet(folders, store(recipe.machine.device)) as models:
        sides: list[tuple[Role, str]] = [("target", edit.target), ("reference", edit.reference)]
        for role, name in sides:
            hash_weights(models.weights[name])
            check_input(recipe, role, model_digest(models.weights[name]), folders[name], file)
        planned = FolderEdit(edit, models, partial=True)  # whoever made the recipe accepted what stays
        outputs = Outputs(out, shard_bytes=shard_bytes)
        digest = _carry_out(planned, planned.origin(), outputs, None, lambda found: check_result(recipe, found, file))
    return planned, digest


def _carry_out(
    planned: FolderEdit,
    origin: Origin,
    outputs: Outputs,
    writer: PatchWriter | None,
    checked: Callable[[str], None],
) -> str:
    """Edit into a folder and a patch; ``checked`` is told the digest before anything appears."""
    if outputs.folder is None:
        digest = _edit_all(planned, writer)
        checked(digest)
        return digest
    title = outputs.folder.resolve().name

    def card(digest: str) -> str:
        checked(digest)
        return edit_card(planned, origin, title, digest)

    return write_model(
        planned.target, lambda name: _edited(planned, name, writer), card, outputs.folder, outputs.shard_bytes
    )


def _edit_all(planned: FolderEdit, writer: PatchWriter | None) -> str:
    """Edit every tensor without a folder; the digest of what comes of it."""
    progress = Progress(f"editing {planned.target.path.name}", len(planned.names), "tensor")
    digests = {name: planned.target.digest(name) for name in planned.target.shapes}
    for name in planned.names:
        edited = _edited(planned, name, writer)
        if edited is not None:
            digests[name] = tensor_digest(edited)
        progress.update(note=name)
    return digest_of(digests)


def _edited(planned: FolderEdit, name: str, writer: PatchWriter | None) -> Tensor | None:
    edited = planned.edited(name)
    if edited is None:
        return None
    if writer is not None:
        writer.add(name, planned.target.tensor(name), edited.tensor)
    return edited.tensor


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the recipe was made with, because sums are split among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
