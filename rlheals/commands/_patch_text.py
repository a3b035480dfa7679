"""Patches and recipes as text for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlheals.restoration.patch import Origin, Patch
    from rlheals.restoration.recipe import Recipe

LARGE = 0.5
"""From this share of the weights that it changes on, a patch is told to be large."""


def size_told(patch_bytes: int, weight_bytes: int) -> str:
    """Size of a patch beside that of the weights it changes, and what is smaller where it is large.

    >>> size_told(1000, 4000)
    '1,000 bytes, 25 % of the 4,000 bytes of weights that it changes'
    """
    share = patch_bytes / weight_bytes if weight_bytes else 0.0
    told = f"{patch_bytes:,} bytes, {100 * share:.3g} % of the {weight_bytes:,} bytes of weights that it changes"
    if share <= LARGE:
        return told
    return f"{told}; for whoever has both models `rlheals restore --recipe FILE` says an edit in about a kilobyte."


def patch_lines(patch: Patch) -> Iterator[str]:
    """What a patch changes, what made it, and which model it is for."""
    yield f"{patch.path}: {len(patch.entries)} tensors, {size_told(patch.bytes, patch.weight_bytes)}"
    yield f"  for the model of weights sha256 {patch.models.before or 'not known'}"
    yield f"  gives the model of weights sha256 {patch.models.after or 'not known'}"
    for number, origin in enumerate(patch.origins):
        yield f"  {_origin(origin, patch.given if number == 0 else 'the model that the change gave')}"
    for name, entry in patch.entries.items():
        kind = ", ".join(f"rank {rank} with what rounding left" if rank else "each number" for rank in entry.ranks)
        yield f"  {name}  {entry.dtype} {list(entry.shape)}  {kind}; for sha256 {entry.before[:12]}…"


def recipe_lines(recipe: Recipe, place: str) -> Iterator[str]:
    """What a recipe does, between which models, and where it was made."""
    made = recipe.machine
    yield f"{place}: the recipe of {recipe.edit.cell_id}"
    yield f"  goes back to {recipe.reference.name}, weights sha256 {recipe.reference.weights_sha256}"
    yield f"  edits {recipe.target.name}, weights sha256 {recipe.target.weights_sha256}"
    yield f"  gives the model of weights sha256 {recipe.result.weights_sha256}"
    yield (
        f"  made by rlheals {made.rlheals}, torch {made.torch}, on {made.device} ({made.cpu}), {made.threads} "
        f"thread{'s' if made.threads > 1 else ''}; elsewhere rounding may differ, which is checked"
    )


def _origin(origin: Origin, given: str) -> str:
    """One change of a patch; ``given`` is the model that it gave, which is what an inverted one is for."""
    from rlheals.restoration.edit import from_recipe

    what = from_recipe(origin.recipe).cell_id if origin.recipe else "the difference of two models"
    if origin.inverted:
        return f"undoes {what}, for {given}"
    return f"{what}, made for {origin.target.get('name', 'an unnamed model')}"
