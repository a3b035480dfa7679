"""Heads that are tied to the embedding but stored on their own, as some savers leave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection

    from rlheals.spectra.reader import Weights


def twins(weights: Weights, chosen: Collection[str]) -> dict[str, str]:
    """A tied head that is stored on its own, and the embedding it must follow; empty where there is none.

    A loader that finds the two different unties them, so whoever changes the embedding has to change the head.

    Args:
        weights: the model.
        chosen: the tensors that are changed; a head among them follows nothing.

    Raises:
        UserError: the head differs from the embedding, so that loaders untie the two and it may not follow.
    """
    found = {head: embedding for head, embedding in _stored(weights, chosen).items() if head not in chosen}
    for head, embedding in found.items():
        if weights.digest(head) != weights.digest(embedding):
            raise UserError(
                f"{weights.path} stores a head that differs from the embedding it is tied to, so it cannot follow a "
                "change of the embedding; set tie_word_embeddings in its config to what the weights are."
            )
    return found


def _stored(weights: Weights, chosen: Collection[str] | None = None) -> dict[str, str]:
    """Tied heads that are stored on their own, and their embedding, if that is among the ``chosen`` tensors."""
    topology = weights.topology
    if not topology.tied:
        return {}
    known = [m.name for m in topology.matrices if m.kind == "embedding" and (chosen is None or m.name in chosen)]
    heads = [name for name in topology.left_out if name.rpartition(".")[0].endswith("lm_head")]
    return {head: known[0] for head in heads if known and head.endswith(".weight")}


def counterparts(before: Weights, after: Weights) -> dict[str, str]:
    """For every tensor of one model the tensor of another that it becomes, the two being one architecture.

    Raises:
        UserError: the second stores a head of its own that differs from its embedding, and the first has no place.
    """
    for head, embedding in _stored(after).items():
        if head not in before.shapes and after.digest(head) != after.digest(embedding):
            raise UserError(
                f"{after.path} stores a head that differs from the embedding it is tied to, and {before.path} stores "
                "none to change; set tie_word_embeddings in both configs to what the weights are."
            )
    same = {name: name for name in before.shapes if name in after.shapes}
    return {**{head: embedding for head, embedding in _stored(before).items() if embedding in after.shapes}, **same}
