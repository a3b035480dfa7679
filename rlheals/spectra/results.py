"""Content-addressed cache of finished measures: what was measured once on the same bytes is never measured again.

An entry is one table and one JSON object, named by the sha256 of all that decides them: the digests of the tensors, the
settings, and what numbers come from besides (`rlheals.spectra.provenance`): the code of this folder and all it imports,
the libraries, the processor and its threads. It is one file, written beside its place and renamed, with a digest of its
own content in the first line: a damaged entry is a miss, not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

import rlheals
from rlheals.errors import UserError, disk_errors
from rlheals.spectra.provenance import code_of, machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLDER = "results"


@dataclass(frozen=True)
class Finding:
    """What one question gave: a table, and facts that are no rows of it (JSON)."""

    table: pl.DataFrame
    facts: dict[str, Any]


class ResultCache:
    """Finished measures below ``directory / "results"``, by content.

    Attributes:
        computed: questions answered by computing, since this object was made.
        hits: questions answered from disk.
    """

    def __init__(self, directory: Path) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made or written to.
        """
        self.directory = directory / FOLDER
        self.computed = self.hits = 0
        make_writable(self.directory)

    def finding(self, decides: Any, compute: Callable[[], Finding]) -> Finding:
        """The finding that ``decides`` (anything JSON can hold) names, computed and kept if it is not there."""
        path = self.path(decides)
        found = _read(path)
        if found is not None:
            self.hits += 1
            return found
        found = compute()
        self.computed += 1
        _write(path, found)
        return found

    def has(self, decides: Any) -> bool:
        """Whether an entry exists; it may still turn out damaged."""
        return self.path(decides).is_file()

    def path(self, decides: Any) -> Path:
        """File of the entry that ``decides`` names."""
        text = json.dumps([decides, rlheals.__version__, code_of("spectra"), machine()], sort_keys=True)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()}.finding"


def make_writable(directory: Path) -> None:
    """Make ``directory`` and prove that files can be written there.

    Raises:
        UserError: they cannot.
    """
    probe = directory / f".probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the cache {directory} cannot be written to ({error.strerror or error}); change its permissions or name "
            "another folder with --cache."
        ) from error


def _read(path: Path) -> Finding | None:
    """The entry, or None where there is none that is as it was written."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    facts, _, table = content.partition(b"\n")
    return Finding(pl.read_parquet(io.BytesIO(table)), json.loads(facts))


def _write(path: Path, finding: Finding) -> None:
    """Write an entry in one rename; a full disk is told, and leaves nothing."""
    table = io.BytesIO()
    finding.table.write_parquet(table, compression="zstd", statistics=False)
    content = json.dumps(finding.facts).encode() + b"\n" + table.getvalue()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        try:
            partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            partial.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
