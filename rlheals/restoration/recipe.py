"""Recipe patches: an edit and the digests of the models it leads between, in place of the change itself.

A recipe is a JSON file of a few hundred bytes. Whoever has both models makes the edit again, and the sha256 of all
weights, before and after, tells whether the bits are the same. They are where the processor, the versions of the
libraries and the number of threads are, because rounding depends on these; elsewhere only a full patch gives the bits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from rlheals import __version__
from rlheals.errors import UserError, disk_errors
from rlheals.restoration.edit import Edit, Scope, from_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = "rlheals.recipe"
VERSION = 1
LARGEST = 2**20
"""Bytes of the largest recipe that is read; one of a control with an amount for each of 5,000 tensors has half."""
THREADS = 1024
"""Most threads that a recipe may ask for."""
AGAIN = "write it again with `rlheals restore --recipe`"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
Role = Literal["reference", "target"]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Word = Annotated[str, StringConstraints(max_length=200)]


class Model(BaseModel):
    """A model by the name of its folder and the `model_digest` of its weights."""

    model_config = _STRICT

    name: _Name
    weights_sha256: _Sha256


class Result(BaseModel):
    """What the edit gives: the `model_digest` of all weights."""

    model_config = _STRICT

    weights_sha256: _Sha256


class Machine(BaseModel):
    """Where the edit was made, as far as rounding depends on it."""

    model_config = _STRICT

    rlheals: _Word
    torch: _Word
    cpu: _Word
    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=THREADS)]


class _File(BaseModel):
    """All of the file but the edit, whose entries follow from `Edit`."""

    model_config = _STRICT

    format: Literal["rlheals.recipe"]
    version: int
    edit: Any
    reference: Model
    target: Model
    result: Result
    machine: Machine
    sha256: _Sha256


@dataclass(frozen=True)
class Recipe:
    """An edit, the models that it leads between, and where it was made.

    Attributes:
        edit: what is done.
        reference: the model that is gone back to.
        target: the model that is edited.
        result: what comes of it.
        machine: where it was made.
    """

    edit: Edit
    reference: Model
    target: Model
    result: Result
    machine: Machine

    @classmethod
    def made(cls, edit: Edit, models: Mapping[str, Mapping[str, str]], result: str, device: str) -> Self:
        """The recipe of an edit that was made here.

        Args:
            edit: what was done.
            models: ``reference`` and ``target``, each as `rlheals.restoration.patch.identify` gives it.
            result: `model_digest` of what came of it.
            device: where decompositions were made, ``cpu`` or ``cuda``.
        """
        reference, target = (Model(**models[role]) for role in ("reference", "target"))
        own = here("cuda" if device.startswith("cuda") else "cpu")
        return cls(edit, reference, target, Result(weights_sha256=result), own)


def here(device: Literal["cpu", "cuda"] = "cpu") -> Machine:
    """This machine."""
    import torch

    from rlheals.spectra.provenance import processor

    return Machine(
        rlheals=__version__,
        torch=torch.__version__,
        cpu=processor(),
        device=device,
        threads=min(torch.get_num_threads(), THREADS),
    )


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the file in one rename.

    Raises:
        UserError: something else than a recipe is there, or the disk is full or not writable.
    """
    check_recipe_target(path)
    content = _content(recipe)
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, with every entry, type and size checked.

    Raises:
        UserError: the file cannot be read, is no recipe, is of a later version, was altered, or names an edit that
            does not exist.
    """
    text = _text(path)
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object ({error}); {AGAIN}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is no patch and no recipe of rlheals; name a file that `rlheals restore` or `rlheals patch` wrote."
        )
    version = content.get("version")
    if version != VERSION or type(version) is not int:
        raise UserError(
            f"{path} is a recipe of format {str(version)[:20]}, this rlheals {__version__} reads {VERSION}; "
            "update rlheals."
        )
    try:
        file = _File.model_validate_json(text)
        _edit_model().model_validate_json(json.dumps(content["edit"]))
    except ValidationError as error:
        raise UserError(f"{path}: {_problem(error)}; {AGAIN}.") from error
    if file.sha256 != _digest({name: entry for name, entry in content.items() if name != "sha256"}):
        raise UserError(f"{path} was altered since it was written (its own sha256 does not fit); {AGAIN}.")
    try:
        edit = from_recipe(content["edit"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Recipe(edit, file.reference, file.target, file.result, file.machine)


def is_recipe(path: Path) -> bool:
    """Whether a file is meant as a recipe: JSON begins with a brace, a patch with the length of its header."""
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{" and not _is_tensor_file(path)
    except OSError:
        return False


def check_recipe_target(path: Path, *models: Path) -> None:
    """Make sure that writing a recipe to ``path`` replaces nothing but a recipe and adds nothing to a model's folder.

    Raises:
        UserError: something else is there, or it lies in the folder of a model.
    """
    for model in models:
        if path.resolve().is_relative_to(model.resolve()):
            raise UserError(f"the recipe {path} would lie inside the model folder {model}; name a file outside.")
    with disk_errors(path):
        if not path.exists() and not path.is_symlink():
            return
    if path.is_file() and not path.is_symlink() and is_recipe(path):
        try:
            known = json.loads(_text(path)).get("format") == FORMAT
        except (ValueError, AttributeError, RecursionError, UserError):
            known = False
        if known:
            return
    raise UserError(f"{path} exists and is no recipe, so it is not replaced; name another file.")


def check_input(recipe: Recipe, role: Role, found: str, path: Path, file: Path) -> None:
    """Check that a model is the one that the recipe names.

    Args:
        recipe: the recipe.
        role: which of its models.
        found: `model_digest` of the model given.
        path: its folder.
        file: of the recipe.

    Raises:
        UserError: it is another one; where the two were exchanged, that.
    """
    wanted: Model = getattr(recipe, role)
    if found == wanted.weights_sha256:
        return
    sides = {recipe.reference.weights_sha256: "reference", recipe.target.weights_sha256: "target"}
    if found in sides:
        raise UserError(
            f"{path} is the {sides[found]} of {file}, not its {role}; give the model to edit first and the one to go "
            "back to by --reference."
        )
    raise UserError(
        f"{path} is not the {role} of {file}: the sha256 of its weights is {found[:12]}…, the recipe is for "
        f"{wanted.name} with {wanted.weights_sha256[:12]}…; give that model or one with equal weights."
    )


def check_result(recipe: Recipe, found: str, file: Path) -> None:
    """Check that what came of the edit here is what came of it where the recipe was written.

    Raises:
        UserError: it is not.
    """
    if found == recipe.result.weights_sha256:
        return
    own, theirs = here(recipe.machine.device), recipe.machine
    differ = [
        f"{name} {getattr(theirs, name)} there and {getattr(own, name)} here"
        for name in Machine.model_fields
        if getattr(theirs, name) != getattr(own, name)
    ]
    reason = (
        f"sums are rounded differently ({'; '.join(differ)})"
        if differ
        else "though versions and processor seem the same, sums were rounded differently"
    )
    raise UserError(
        f"the edit of {file} gives other bits here (sha256 {found[:12]}…, not {recipe.result.weights_sha256[:12]}…): "
        f"{reason}; nothing was written: ask for the full patch, which gives the bits on any machine (`rlheals restore "
        "--patch`), or make the edit without the promise by `rlheals restore`."
    )


def with_names(recipe: Recipe, names: tuple[str, str]) -> Edit:
    """The edit between models that lie in folders of other names."""
    return replace(recipe.edit, reference=names[0], target=names[1])


def as_content(recipe: Recipe) -> dict[str, Any]:
    """All that the recipe says, as JSON."""
    return _content(recipe)


def _content(recipe: Recipe) -> dict[str, Any]:
    parts = ("reference", "target", "result", "machine")
    return {
        "format": FORMAT,
        "version": VERSION,
        "edit": json.loads(json.dumps(recipe.edit.recipe())),
        **{part: getattr(recipe, part).model_dump() for part in parts},
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} is larger than any recipe ({LARGEST:,} bytes); {AGAIN}.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text, so no recipe; {AGAIN}.") from error


def _is_tensor_file(path: Path) -> bool:
    """Whether what looks like a brace is the length of a header that the file has room for, as in safetensors."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


@cache
def _edit_model() -> type[BaseModel]:
    """What a recipe's edit must look like: every entry of `Edit` and `Scope`, of its own type."""
    scope = create_model("scope", __config__=_STRICT, **_entries(Scope))
    return create_model("edit", __config__=_STRICT, **_entries(Edit) | {"scope": (scope, ...), "window": (_Word, ...)})


def _entries(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    bounded = {str: _Name | Literal[""], int: Annotated[int, Field(ge=0, lt=2**63)]}
    return {each.name: (bounded.get(hints[each.name], hints[each.name]), ...) for each in fields(kind)}


def _problem(error: ValidationError) -> str:
    """The first problem as a clause."""
    first = error.errors(include_url=False)[0]
    place = ".".join([*(["edit"] if error.title == "edit" else []), *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known entry"
    if first["type"] == "missing":
        return f"{place} is missing"
    said = first["msg"][0].lower() + first["msg"][1:]
    return f"{place}: {said}"
