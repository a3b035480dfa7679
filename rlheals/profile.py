"""Write ``params.yaml`` from a preset: ``python -m rlheals.profile mini [key=value ...]``.

``presets/mini.yaml`` is the one complete, documented file. Every other preset is a JSON merge patch (RFC 7396: mappings
merge, ``null`` removes a key, everything else replaces) laid over it, so a comment is written once.
"""

from __future__ import annotations

import difflib
import io
import re
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from rlheals.errors import UserError, disk_errors
from rlheals.params import PARAMS_FILE, parse_params

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMPLETE = "mini"
OPEN_BLOCKS = ("model", "base.mixture", "task.training_rule", "task.ood_rule", "ppo.change")
"""Blocks whose keys the user names, so a new key there is not a typing error."""
BACKUP = "scratch/params.before-{}.yaml"
"""Copies of files edited by hand, numbered from 1; `make clean` keeps them."""


def preset_names() -> list[str]:
    """Names of the presets, from the smallest run to the largest."""
    known = {path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml")}
    order = ["smoke", "mini", "mini-confirm", "paper"]
    return sorted(known, key=lambda name: (order.index(name) if name in order else len(order), name))


def preset_summary(name: str) -> str:
    """What a preset is for: the first sentence of its header after the name."""
    header = " ".join(re.findall(r"^# ?(.*)$", _preset_text(name).split("\n\n")[0], flags=re.MULTILINE))
    return header.split(": ", 1)[1].split(". ")[0].rstrip(".")


class Rendered(NamedTuple):
    """The text of a params file, and what a reader should know about how it came about."""

    text: str
    notes: list[str]


def render(name: str, overrides: Sequence[str] = ()) -> Rendered:
    """The params file of preset ``name`` with ``key=value`` overrides: comments kept, ``auto`` resolved, validated.

    Raises:
        UserError: unknown preset, malformed override, unknown key (the nearest key is named), or a wrong value.
    """
    document = _load(_preset_text(COMPLETE))
    if name != COMPLETE:
        patch = _load(_preset_text(name))
        _merge(document, patch)
        document.ca.comment = patch.ca.comment
    for override in overrides:
        _set(document, override)
    return _finish(document, Path(f"preset {name}" + (" with overrides" if overrides else "")))


def with_overrides(path: Path, overrides: Sequence[str]) -> Rendered:
    """An existing params file with ``key=value`` overrides, its comments and other values kept.

    Raises:
        UserError: the file cannot be read, an override is malformed, or the result is not valid.
    """
    try:
        document = _load(path.read_text())
    except (OSError, YAMLError) as error:
        raise UserError(f"{path} cannot be read; write one with `python -m rlheals.profile mini`.") from error
    for override in overrides:
        _set(document, override)
    return _finish(document, path)


def _finish(document: CommentedMap, where: Path) -> Rendered:
    """The text of a document, validated, with ``inference.engine: auto`` resolved.

    The choice is made here, once, and written into params.yaml: stages never see ``auto``.
    """
    auto = document["inference"]["engine"] == "auto"
    if auto:
        document["inference"]["engine"] = "transformers"
    text = _dump(document)
    params = parse_params(YAML(typ="safe").load(text), where)
    if not auto:
        return Rendered(text, [])
    from rlheals.inference.choice import resolve

    engine, reason = resolve(params)
    document["inference"]["engine"] = engine
    return Rendered(_dump(document), [f"inference.engine: auto became {engine}, because {reason}."])


def current_profile(path: Path = PARAMS_FILE) -> str | None:
    """The profile a params file is of; None when there is no file or it cannot be read."""
    try:
        document = YAML(typ="safe").load(path.read_text())
    except (OSError, YAMLError, UnicodeDecodeError):
        return None
    profile = document.get("profile") if isinstance(document, dict) else None
    return profile if isinstance(profile, str) else None


def write_profile(text: str, path: Path = PARAMS_FILE) -> Path | None:
    """Write ``text`` to ``path`` in one rename; a file edited by hand is first copied (see `BACKUP`).

    Returns:
        The copy's path when one was made.

    Raises:
        UserError: the file could not be written.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written because the folder {path.parent} does not exist; create it first.")
    previous = path.read_text() if path.is_file() else ""
    edited = bool(previous) and previous != text and previous not in {render(name).text for name in preset_names()}
    with disk_errors(path):
        if edited:
            backup = _free_backup(path.parent)
            backup.parent.mkdir(parents=True, exist_ok=True)
            backup.write_text(previous)
    replace_text(text, path)
    return backup if edited else None


def replace_text(text: str, path: Path) -> None:
    """Write ``text`` to ``path`` in one rename.

    Raises:
        UserError: the file could not be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        temporary.write_text(text)
        temporary.replace(path)


def _free_backup(folder: Path) -> Path:
    """The first path of the pattern `BACKUP` in ``folder`` that is not taken."""
    return next(path for number in count(1) if not (path := folder / BACKUP.format(number)).exists())


def _folder() -> Any:
    return files("rlheals") / "presets"


def _preset_text(name: str) -> str:
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(preset_names())}."
        raise UserError(f"there is no preset {name!r}; {hint}")
    text: str = (_folder() / f"{name}.yaml").read_text()
    return text


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _load(text: str) -> CommentedMap:
    document: CommentedMap = _yaml().load(text)
    return document


def _dump(document: CommentedMap) -> str:
    """YAML text laid out as the complete preset is: comments aligned, one blank line before every block."""
    stream = io.StringIO()
    _yaml().dump(document, stream)
    as_written = set(_preset_text(COMPLETE).splitlines())
    lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
    lines = [line if line in as_written else _align_comment(line) for line in lines]
    text: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        opens_block = line[0] not in " #" and following.startswith(" ")
        after_header = line[0] not in " #" and bool(text) and text[-1].startswith("#")
        text += [""] if opens_block or after_header else []
        text.append(line)
    return "\n".join(text) + "\n"


def _align_comment(line: str) -> str:
    """Put the comment behind a value at the file's comment column, or two spaces behind a long value."""
    match = re.fullmatch(r"([^#'\"]*[^#'\"\s])\s+(# .*)", line)
    return f"{match[1]:<23}  {match[2]}" if match else line


def _merge(document: CommentedMap, patch: CommentedMap) -> None:
    """Lay a merge patch over ``document``; a comment of the patch replaces the document's, otherwise that stays."""
    for key, value in patch.items():
        if value is None:
            document.pop(key, None)
        elif isinstance(value, CommentedMap) and isinstance(document.get(key), CommentedMap):
            _merge(document[key], value)
        else:
            document[key] = value
        if key in patch.ca.items and value is not None:
            document.ca.items[key] = patch.ca.items[key]


def _set(document: CommentedMap, override: str) -> None:
    """Apply one ``dotted.key=value``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is not of the form key=value, for example sft.learning_rate=5e-4.")
    known = set(_paths(document))
    if key not in known and not key.startswith(tuple(f"{block}." for block in OPEN_BLOCKS)):
        raise UserError(f"{key} is not a known key; {_nearest(key, known)}")
    try:
        value = _plain_floats(_yaml().load(text))
    except YAMLError as error:
        raise UserError(f"the value of {key} is not valid YAML: {text!r}.") from error
    *parents, last = key.split(".")
    block = document
    for parent in parents:
        block = block.setdefault(parent, CommentedMap())
        if not isinstance(block, CommentedMap):
            raise UserError(f"{key} cannot be set because {parent} is a value, not a block.")
    block[last] = value


def _plain_floats(value: Any) -> Any:
    """The same YAML value with built-in floats: writing ruamel's own loses the last digit of some."""
    if isinstance(value, float):
        return float(value)
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        value[key] = _plain_floats(value[key])
    return value


def _paths(block: CommentedMap, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a document, blocks included."""
    for key, value in block.items():
        yield f"{prefix}{key}"
        if isinstance(value, CommentedMap):
            yield from _paths(value, f"{prefix}{key}.")


def _nearest(key: str, known: set[str]) -> str:
    """A hint that names the key most likely meant: the same last part elsewhere, its initials, or similar spelling."""
    last = key.rsplit(".", 1)[-1]
    parent = key.rpartition(".")[0]
    initials = {path: "".join(word[0] for word in path.rsplit(".", 1)[-1].split("_")) for path in sorted(known)}
    same_last = [path for path in sorted(known) if path.rsplit(".", 1)[-1] == last]
    by_initials = [path for path, letters in initials.items() if letters == last and path.startswith(parent)]
    near = by_initials or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.75) or same_last
    near = near or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "see params.yaml for the keys there are."


if __name__ == "__main__":
    import sys

    from rlheals.cli import main

    main(["profile", *sys.argv[1:]])
