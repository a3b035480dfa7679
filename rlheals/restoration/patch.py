"""Patch files: the change of a model's weights, without the model, exact to the bit.

A patch is one safetensors file. Its metadata says, in JSON, what made it (`Origin`), and for each tensor its type,
shape and sha256 before and after; the tensors are the steps from one to the other (see `rlheals.restoration.exact`).
Each step can be gone back and steps follow one another, so patches are inverted and composed without any model, and
what is applied gives the edited weights bit for bit on every machine. Nothing holds more than one weight at a time.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch

from rlheals.errors import UserError, disk_errors
from rlheals.progress import Progress
from rlheals.restoration.exact import Counts, Step, make_step, pack, unpack
from rlheals.restoration.patch_content import Content, Ends, Entry, Origin, check_step, decode, encode
from rlheals.restoration.recipe import is_recipe
from rlheals.restoration.tensor_file import DTYPES, NAMES, TensorFile, TensorFileWriter, raw
from rlheals.restoration.tied import counterparts
from rlheals.spectra.reader import Weights, check_same

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["Ends", "Entry", "Origin", "Patch", "PatchWriter"]

_FACTORS = ("left", "right")
_WAYS = ("forward", "backward")
_PARTS = ("dense", "positions", "values")


def tensor_digest(tensor: Tensor) -> str:
    """Hex sha256 over type, shape and bytes: what `Weights.digest` gives for a tensor on disk."""
    sha = hashlib.sha256(f"{NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    sha.update(raw(tensor))
    return sha.hexdigest()


def model_digest(weights: Weights) -> str:
    """Hex sha256 over names and digests of all tensors of a model: the same however it is cut into files."""
    return digest_of({name: weights.digest(name) for name in weights.shapes})


def digest_of(tensors: Mapping[str, str]) -> str:
    """`model_digest` from the digests of a model's tensors."""
    return hashlib.sha256(
        "\n".join(sorted(f"{name} {digest}" for name, digest in tensors.items())).encode()
    ).hexdigest()


def hash_weights(weights: Weights) -> None:
    """Compute all digests of a model, which ``weights`` keeps, where a bar can be shown."""
    progress = Progress(f"hashing {weights.path.name}", len(weights.shapes), "tensor")
    for name in weights.shapes:
        weights.digest(name)
        progress.update(note=name)


def identify(weights: Weights) -> dict[str, str]:
    """Name of a model's folder, without where it lies, and the sha256 of its weights."""
    return {"name": weights.path.resolve().name, "weights_sha256": model_digest(weights)}


class Patch:
    """A patch file open for reading; a context manager.

    Attributes:
        path: the file.
        origins: what its changes are, in order.
        entries: its tensors by name, in the model's order.
        models: digests of the whole model that it is for, and of what it gives.
        bytes: size of the file.

    Raises:
        UserError: the file is missing, damaged, no patch (but a recipe, say), or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if is_recipe(path):
            raise UserError(
                f"{path} is JSON, as recipes are, and a recipe does not hold the change itself; make the model by "
                "`rlheals patch apply`, or ask for the full patch."
            )
        self._file = TensorFile(path)
        try:
            content = decode(self._file.metadata, path)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.close()
            raise UserError(f"{path} is a damaged patch ({error}); make it again.") from error
        except UserError:
            self.close()
            raise
        self.origins, self.entries, self.models = content.origins, dict(content.entries), content.models
        self.bytes = self._file.bytes

    @property
    def weight_bytes(self) -> int:
        """Size of the weights that it changes, as the model stores them."""
        return sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in self.entries.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.__exit__()

    def steps(self, name: str) -> Iterator[Step]:
        """The steps of one tensor, in order, each read when it is asked for.

        Raises:
            UserError: the file lacks a part of one, or it does not fit the tensor.
        """
        entry = self.entries[name]
        for number, rank in enumerate(entry.ranks):
            stored = {
                part: self._file.tensor(f"{name}/{number}/{part}")
                for part in _part_names()
                if f"{name}/{number}/{part}" in self._file.shapes
            }
            forward, backward = (Counts(*(stored.get(f"{way}.{part}") for part in _PARTS)) for way in _WAYS)
            if [part in stored for part in _FACTORS] != [rank > 0] * 2:
                raise UserError(f"{self.path} lacks the factors of {name}; make it again.")
            step = Step(stored.get("left"), stored.get("right"), forward, backward if rank else None)
            try:
                check_step(step, entry, rank)
            except ValueError as error:
                raise UserError(f"{self.path} holds a damaged change of {name} ({error}); make it again.") from error
            yield step

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The changed tensor, bit for bit.

        Raises:
            UserError: the result is not what the patch says, because the file was altered.
        """
        for step in self.steps(name):
            tensor = step.apply(tensor)
        if tensor_digest(tensor) != self.entries[name].after:
            raise UserError(f"{self.path} does not give the {name} that it promises, so it was altered; make it again.")
        return tensor

    def check_base(self, weights: Weights, *, same_tensors_only: bool = False) -> None:
        """Check that this is the model the patch was made for; reads all its tensors.

        Args:
            weights: the model.
            same_tensors_only: any model will do whose tensors are equal where the patch changes them.

        Raises:
            UserError: the patch changes nothing, or naming the first tensor that is absent or differs, or another
                tensor than those differs.
        """
        if not self.entries:
            raise UserError(f"{self.path} changes nothing, so there is nothing to apply.")
        self._check_changed(weights)
        if same_tensors_only:
            return
        hash_weights(weights)
        if model_digest(weights) != self.models.before:
            known = "is for another model than" if self.models.before else "does not tell which whole model it is for:"
            raise UserError(
                f"{self.path} {known} {weights.path}, only the tensors that it changes agree; apply it to {self._for}, "
                "or pass --same-tensors-only."
            )

    def _check_changed(self, weights: Weights) -> None:
        for name, entry in self.entries.items():
            if name not in weights.shapes:
                raise UserError(
                    f"{weights.path} has no tensor {name}, which {self.path} changes; apply it to {self._for}."
                )
            found = weights.digest(name)
            if found == entry.before:
                continue
            if found == entry.after:
                raise UserError(
                    f"{weights.path} already has the {name} that {self.path} gives; there is nothing to apply."
                )
            raise UserError(
                f"{self.path} does not fit {weights.path}: the sha256 of {name} is {found[:12]}…, the patch is for "
                f"{entry.before[:12]}…; apply it to {self._for}."
            )

    @property
    def _for(self) -> str:
        first = self.origins[0] if self.origins else None
        if first and first.inverted:
            return self.given
        return f"{first.target.get('name', 'its own base')} or weights equal to it" if first else "its own base"

    @property
    def given(self) -> str:
        """The model that an inverted patch is for: it has no name, because what a change gave may lie anywhere."""
        known = f" (weights sha256 {self.models.before[:12]}…)" if self.models.before else ""
        return f"the model that the change gave{known}"


class PatchWriter:
    """Writes a patch tensor by tensor; the file appears when `finish` is called, or not at all.

    Raises:
        UserError: the path holds something else than a patch.
    """

    def __init__(self, path: Path) -> None:
        check_patch_target(path)
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._file = TensorFileWriter(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Store the change of one tensor; an unchanged one is left out.

        What was stored is applied once, and the result compared bit for bit.

        Raises:
            UserError: the disk is full or not writable.
        """
        digests = tensor_digest(before), tensor_digest(after)
        if digests[0] == digests[1]:
            return
        step = make_step(before, after)
        if tensor_digest(step.apply(before)) != digests[1]:
            raise RuntimeError(f"the stored change of {name} does not give the edited weights")
        self.add_steps(name, Entry(NAMES[before.dtype], tuple(before.shape), *digests, ranks=()), [step])

    def add_steps(self, name: str, entry: Entry, steps: Iterator[Step] | Sequence[Step]) -> None:
        """Store steps as they are; ``entry`` without its ranks."""
        ranks = []
        for number, step in enumerate(steps):
            for part, tensor in _parts(step):
                self._file.add(f"{name}/{number}/{part}", tensor)
            ranks.append(step.rank)
        self.entries[name] = replace(entry, ranks=tuple(ranks))

    def finish(self, origins: Sequence[Origin], models: Ends) -> None:
        """Write the file; ``models`` are the digests of the whole models between which it leads."""
        self._file.finish(encode(Content(tuple(origins), self.entries, models)))

    def ends(self, weights: Weights) -> Ends:
        """The digests of a model and of what the tensors written so far make of it."""
        before = {name: weights.digest(name) for name in weights.shapes}
        after = before | {name: entry.after for name, entry in self.entries.items()}
        return Ends(digest_of(before), digest_of(after))


def make_patch(before: Path, after: Path, out: Path) -> None:
    """Write the patch from one model to another of the same architecture.

    A tied head that only the first stores on its own becomes the embedding of the second.

    Raises:
        UserError: the models differ in names, shapes or types, do not differ at all, or cannot be read; see also
            `PatchWriter`.
    """
    check_patch_target(out, before, after)
    with Weights(before) as old, Weights(after) as new:
        check_same(old, new)
        for weights in (old, new):
            hash_weights(weights)
        becomes = counterparts(old, new)
        names = [name for name in old.shapes if name in becomes and old.digest(name) != new.digest(becomes[name])]
        if not names:
            raise UserError(f"{after} has the very weights of {before}, so there is nothing to patch.")
        for name in names:
            found = new.dtypes[becomes[name]]
            if old.dtypes[name] != found:
                raise UserError(f"{name} is {old.dtypes[name]} in {before} but {found} in {after}; save both alike.")
        progress = Progress(f"writing {out.name}", len(names), "tensor")
        with PatchWriter(out) as writer:
            for name in names:
                writer.add(name, old.tensor(name), new.tensor(becomes[name]))
                progress.update(note=name)
            writer.finish([Origin({}, {}, identify(old))], writer.ends(old))


def invert_patch(source: Path, out: Path) -> None:
    """Write the patch that leads back; the two applied one after the other give the same bits as before.

    Raises:
        UserError: see `Patch` and `PatchWriter`.
    """
    with Patch(source) as patch, PatchWriter(out) as writer:
        progress = Progress(f"writing {out.name}", len(patch.entries), "tensor")
        for name, entry in patch.entries.items():
            steps = [step.inverted() for step in patch.steps(name)][::-1]
            writer.add_steps(name, replace(entry, before=entry.after, after=entry.before), steps)
            progress.update(note=name)
        origins = [replace(origin, inverted=not origin.inverted) for origin in reversed(patch.origins)]
        writer.finish(origins, Ends(patch.models.after, patch.models.before))


def compose_patches(first: Path, second: Path, out: Path) -> None:
    """Write the patch that does what ``first`` and then ``second`` do.

    A tensor that ends as it began is left out, so a patch composed with its inverse changes nothing, and so is a step
    that the next one undoes. The second may be made for another model than the first gives, as long as the tensors
    that both change agree; which whole model the two lead to is then not known.

    Raises:
        UserError: a tensor that both change is not given by the first as the second needs it; see also `Patch`.
    """
    with Patch(first) as one, Patch(second) as two, PatchWriter(out) as writer:
        progress = Progress(f"writing {out.name}", len(one.entries.keys() | two.entries.keys()), "tensor")
        for name, entry in one.entries.items():
            progress.update(note=name)
            after = two.entries.get(name, entry)
            if name in two.entries and entry.after != after.before:
                raise UserError(
                    f"{second} does not follow {first}: it needs another {name} (sha256 {after.before[:12]}…) than the "
                    f"first gives ({entry.after[:12]}…); make it for the model that the first leads to."
                )
            if entry.before == after.after:
                continue
            steps = list(one.steps(name)) + (list(two.steps(name)) if name in two.entries else [])
            writer.add_steps(name, replace(entry, after=after.after), _merged(steps, entry))
        for name, entry in two.entries.items():
            if name not in one.entries:
                writer.add_steps(name, entry, two.steps(name))
                progress.update(note=name)
        follows = one.models.after == two.models.before
        writer.finish([*one.origins, *two.origins], Ends(one.models.before, two.models.after if follows else ""))


def _merged(steps: Sequence[Step], entry: Entry) -> list[Step]:
    """Neighbouring steps without factors become one, as their counts add up; a step and its inverse become none."""
    merged: list[Step] = []
    numel, dtype = torch.Size(entry.shape).numel(), DTYPES[entry.dtype]
    for step in steps:
        if merged and not merged[-1].rank and not step.rank:
            total = unpack(merged.pop().forward, numel, dtype).add_(unpack(step.forward, numel, dtype))
            if total.any():
                merged.append(Step(None, None, pack(total), None))
        elif merged and _equal(merged[-1].inverted(), step):
            merged.pop()
        else:
            merged.append(step)
    return merged


def _equal(one: Step, other: Step) -> bool:
    """Whether two steps are stored alike, number by number, so that they do the same to every tensor."""
    ours, theirs = dict(_parts(one)), dict(_parts(other))
    return ours.keys() == theirs.keys() and all(
        ours[part].dtype == theirs[part].dtype and torch.equal(ours[part], theirs[part]) for part in ours
    )


def _parts(step: Step) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a step under the names they have in the file."""
    if step.left is not None and step.right is not None:
        yield "left", step.left.contiguous()
        yield "right", step.right.contiguous()
    for way in _WAYS:
        counts: Counts | None = getattr(step, way)
        for part in _PARTS:
            tensor = None if counts is None else getattr(counts, part)
            if tensor is not None:
                yield f"{way}.{part}", tensor


def _part_names() -> list[str]:
    return [*_FACTORS, *(f"{way}.{part}" for way in _WAYS for part in _PARTS)]


def check_patch_target(path: Path, *models: Path) -> None:
    """Make sure that writing a patch to ``path`` replaces nothing but a patch and adds nothing to a model's folder.

    Raises:
        UserError: something else is there, or it lies in the folder of a model.
    """
    for model in models:
        if path.resolve().is_relative_to(model.resolve()):
            raise UserError(f"the patch {path} would lie inside the model folder {model}; name a file outside.")
    with disk_errors(path):
        if not path.exists() and not path.is_symlink():
            return
    try:
        Patch(path).close()
    except UserError as error:
        raise UserError(f"{path} exists and is no patch, so it is not replaced; name another file.") from error
