"""The files of a model folder besides its weights: which go along with an edited model, and which must not.

What goes along is what loading and running need: configs, tokenizer, templates, the Python files that ``auto_map`` of
a config names (they are copied, never run here), and the licence. What stays behind would change what the new folder
means or lie about it: an adapter's config, which loaders attach to the weights; indexes of weight files that are not
there; the state and results of a training that had other weights at its end.

A link is followed where it stays inside the folder or leads into the content-addressed cache that the folder is a view
of, as in the Hugging Face hub's cache and DVC's. Others could lead anywhere, in a folder from elsewhere to private
files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.models.checkpoint import CONFIG
from rlheals.publish import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COPIED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.model.v*",
    "*.tokenizer",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.vocab",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "use_policy*",
)
_LEFT = (
    "*.index.json",
    "adapter_*",
    MANIFEST,
    "trainer_state.json",
    "*_results.json",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "training_args*",
    "quantize_config.json",
    "quantization_config.json",
    "selection.json",
    "leakage.json",
    "params.json",
)
"""Patterns of names in lower case. ``params.json`` belongs to weights in the format of Mistral and of Meta."""
_TEMPLATES = ("additional_chat_templates", "chat_templates")
_AUTO_MAP = "auto_map"
_LARGEST_CONFIG = 10_000_000  # bytes of a config that may name code; tokenizers are larger, and name none
_DVC_CACHE = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


@dataclass(frozen=True)
class SideFiles:
    """What goes along.

    Attributes:
        names: paths relative to the folder.
        strangers: links that lead out of the folder, with where they lead; they stay behind.
    """

    names: tuple[str, ...]
    strangers: tuple[tuple[str, str], ...]


def side_files(source: Path) -> SideFiles:
    """What goes along with the weights of the model in folder ``source``.

    Raises:
        UserError: the config is a link that leads out of the folder, so nothing that loads could be written.
    """
    wanted = [path for path in sorted(source.iterdir()) if goes_along(path.name)]
    wanted += [path for name in _TEMPLATES for path in _templates(source / name)]
    inside = [path for path in wanted if stays(path, source)]
    if any(_names_code(path) for path in inside if path.suffix == ".json"):
        code = sorted(source.glob("*.py"))
        wanted, inside = [*wanted, *code], [*inside, *(path for path in code if stays(path, source))]
    strangers = tuple((str(path.relative_to(source)), str(path.readlink())) for path in wanted if path not in inside)
    for name, place in strangers:
        if name == CONFIG:
            raise UserError(
                f"{source / CONFIG} is a link to {place}, outside of the folder, which is not followed; put a copy of "
                "the file into the folder."
            )
    return SideFiles(tuple(str(path.relative_to(source)) for path in inside if path.is_file()), strangers)


def copy_side_files(source: Path, files: SideFiles, folder: Path) -> None:
    """Copy them into ``folder``, links as the files they lead to; what stays behind for its link is told."""
    for name in files.names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    for name, place in files.strangers:
        print(
            f"{source / name} was not copied, because it is a link to {place}, outside of the folder; put a copy there "
            "if the model needs it.",
            file=sys.stderr,
        )


def stays(path: Path, source: Path) -> bool:
    """Whether a file of the folder ``source`` is no link, or one that stays inside or leads into the folder's cache."""
    try:
        found, root = path.resolve(strict=True), source.resolve()
    except (OSError, RuntimeError):  # a link to nowhere, or in a circle
        return False
    if found.is_relative_to(root):
        return True
    caches = [parent / "blobs" for parent in root.parents if (parent / "snapshots") in (root, *root.parents)]
    return any(found.is_relative_to(cache) for cache in caches) or bool(_DVC_CACHE.search(str(found)))


def goes_along(name: str) -> bool:
    """Whether a file of this name, other than Python code, goes along with the weights."""
    lower = name.lower()
    return any(fnmatchcase(lower, each) for each in _COPIED) and not any(fnmatchcase(lower, each) for each in _LEFT)


def _templates(folder: Path) -> Iterator[Path]:
    """The templates of a folder of them; the folder itself where it is a link that leads elsewhere."""
    if folder.is_symlink() and not stays(folder, folder.parent):
        yield folder
    elif folder.is_dir():
        yield from sorted(folder.glob("*.jinja"))


def _names_code(config: Path) -> bool:
    """Whether a JSON file says that classes come from Python files beside it."""
    try:
        if config.stat().st_size > _LARGEST_CONFIG:
            return False
        content = json.loads(config.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and _AUTO_MAP in content
