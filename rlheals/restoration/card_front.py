"""The front matter of a model card: which models it was made of and under which licence, as the hub reads it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from huggingface_hub.repocard import metadata_load

from rlheals.restoration.side_files import stays

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CARD = "README.md"
_LARGEST_CARD = 1_000_000  # bytes
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
_NO_ID, _LONGEST_ID = re.compile(r"[^A-Za-z0-9_.-]+"), 96
_LICENCE_ID = re.compile(r"^[a-z0-9][a-z0-9.+-]{0,63}$")
_LICENCE_FILES = re.compile(r"^(licen[cs]e|copying)", re.IGNORECASE)
UNKNOWN = "unknown"
"""The hub's name for a licence that nobody told."""


def front_matter(title: str, models: Sequence[tuple[str, Path]], merged: bool) -> list[str]:
    """Lines of a model card up to its title.

    Args:
        title: of the card.
        models: name and folder of each model that it was made of, the one that it continues first.
        merged: it is a merge of all of them; else it is what became of the first.
    """
    sources = dict.fromkeys(hub_name(name, folder) for name, folder in models)
    terms = licence([folder for _, folder in models])
    return [
        "---",
        "base_model:",
        *(f"- {_quoted(source)}" for source in sources),
        *(["base_model_relation: merge"] if merged else []),
        "library_name: transformers",
        *(f"{key}: {_quoted(value)}" for key, value in terms.items()),
        "tags:",
        "- rlheals",
        "---",
        "",
        f"# {plain(title)}",
        "",
    ]


def hub_name(name: str, folder: Path) -> str:
    """The model's id on the hub, where its place in the hub's cache tells; else ``name`` as the hub lets ids look.

    A config's ``_name_or_path`` is not asked: in a fine-tuned model it is the base, or a path.
    """
    cached = _SNAPSHOT.search(str(folder.resolve()))
    if cached and _HUB_ID.match(found := cached[1].replace("--", "/", 1)):
        return found
    return _NO_ID.sub("-", name)[:_LONGEST_ID].strip("-.") or "unnamed"


def licence(folders: Sequence[Path]) -> dict[str, str]:
    """The licence entries of the first folder whose card has one; else those of one with a licence file; else unknown.

    Where the licence is not one of the hub's own, the hub asks for its name and a link as well.
    """
    for folder in folders:
        if found := _licence_of_card(folder):
            return found
    for folder in folders[:1]:
        for file in sorted(folder.iterdir()):
            if _LICENCE_FILES.match(file.name) and stays(file, folder) and file.is_file():
                return {"license": "other", "license_name": "see-license-file", "license_link": file.name}
    return {"license": UNKNOWN}


def plain(text: str) -> str:
    """A name on one line of a Markdown table, whatever it holds."""
    return _one_line(text).replace("|", "\\|").replace("`", "'")


def _one_line(text: str) -> str:
    """Without control characters, line breaks, and the halves of characters that file names may have."""
    known = text.encode(errors="replace").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]+", " ", known).strip()


def _quoted(text: str) -> str:
    """A string of YAML, quoted so that no version of YAML takes it for anything else."""
    return json.dumps(_one_line(text), ensure_ascii=False)


def _licence_of_card(folder: Path) -> dict[str, str]:
    card = folder / CARD
    try:
        if not card.is_file() or not stays(card, folder) or card.stat().st_size > _LARGEST_CARD:
            return {}
        content = metadata_load(card)
    except Exception:  # the YAML of a card from elsewhere may be anything
        return {}
    entries = content if isinstance(content, dict) else {}
    identifier = entries.get("license")
    if not isinstance(identifier, str) or not _LICENCE_ID.match(identifier):
        return {}
    named = {key: entries[key] for key in ("license_name", "license_link") if isinstance(entries.get(key), str)}
    return {"license": identifier, **(named if identifier == "other" else {})}
