"""Publish a stage's output directory with one atomic rename, and check it before it is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlheals.claim import claimed
from rlheals.errors import UserError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL, FORMER = ".partial", ".former"
"""Endings of the hidden folders beside a target: what becomes it, and the earlier output while it is replaced."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it gets a manifest and becomes ``target`` by one rename.

    Nothing appears at ``target`` when the body raises, is killed, or the disk fills up. An earlier output there is
    moved aside for the rename and deleted after it; the next run puts it back if a kill came in between.

    Raises:
        UserError: ``target`` holds something that was not published (see `check_target`), another run is publishing to
            it, or the files could not be written.
    """
    check_target(target)
    temporary, former = (target.with_name(f".{target.name}{ending}") for ending in (PARTIAL, FORMER))
    with disk_errors(target), claimed(temporary, target, folder=True):
        try:
            _empty(temporary)
            _settle(target, former)
            yield temporary
            write_manifest(temporary)
            check_target(target)  # once more, as the body may take hours
            _replace(target, temporary, former)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _empty(directory: Path) -> None:
    """Delete what a killed run left; the directory itself stays, because it carries the lock."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(target: Path, temporary: Path, former: Path) -> None:
    try:
        if target.exists():
            target.rename(former)
        temporary.rename(target)
    finally:
        _settle(target, former)


def _settle(target: Path, former: Path) -> None:
    """Delete an output that was moved aside, or put it back where nothing took its place."""
    if not target.exists() and former.is_dir():
        former.rename(target)
    shutil.rmtree(former, ignore_errors=True)


def check_target(target: Path) -> None:
    """Make sure that publishing to ``target`` would delete nothing but an earlier output.

    Raises:
        UserError: ``target`` is a file, a link, a folder that `publish` did not write, or one with further files in it.
    """
    with disk_errors(target):
        if _is_free(target):
            return
        manifest = read_manifest(target)
        strangers = sorted(_contents(target) - {MANIFEST, *manifest}) if manifest else []
        if manifest and not strangers:
            return
    if strangers:
        raise UserError(
            f"{target} holds {strangers[0]}, which rlheals did not write there, so it is not replaced; move that file "
            "away or name another folder."
        )
    raise UserError(f"{target} exists and is no output of rlheals, so it is not replaced; name another folder.")


def _is_free(target: Path) -> bool:
    if target.name in ("", ".."):  # the folder one is in cannot be renamed
        return False
    if target.is_dir() and not target.is_symlink():
        return not any(target.iterdir())
    return not target.exists() and not target.is_symlink()


def _contents(directory: Path) -> set[str]:
    """Relative paths of everything below ``directory`` that is no folder, links to folders among them."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(directory)) for path in found}


def read_manifest(directory: Path) -> dict[str, str]:
    """The digests that `write_manifest` wrote, unchecked; empty for a folder without any, or for no folder.

    Other programs use that file name, too.
    """
    if directory.name in ("", "..") or directory.is_symlink():
        return {}
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    known = isinstance(manifest, dict) and all(re.fullmatch(r"[0-9a-f]{64}", str(value)) for value in manifest.values())
    return manifest if known else {}


def write_manifest(directory: Path) -> None:
    """Write ``manifest.json``: sha256 of every file below ``directory``, keys sorted, flushed to disk.

    The manifest appears in one rename, so a directory that has one is complete.
    """
    digests = {name: sha256_file(directory / name) for name in _files(directory)}
    # HF writes weights with mode 600, which a shared DVC cache cannot serve to other users.
    for name in digests:
        (directory / name).chmod(0o644)
    partial = directory / f".{MANIFEST}.partial"
    with partial.open("w") as file:
        json.dump(digests, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / MANIFEST)


def _files(directory: Path) -> list[str]:
    """Relative paths of all files below ``directory`` but its own manifest, sorted."""
    files = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def verify(directory: Path) -> dict[str, str]:
    """Check a published directory against its manifest and return the manifest.

    Raises:
        UserError: the directory is missing, was never completed, or a file is missing, extra or altered.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; run the stage that writes it (`dvc repro`).")
    manifest_file = directory / MANIFEST
    if not manifest_file.is_file():
        raise UserError(f"{directory} has no {MANIFEST}, so it was never completed; delete it and run `dvc repro`.")
    try:
        manifest: dict[str, str] = json.loads(manifest_file.read_text())
    except ValueError as error:
        raise UserError(f"{manifest_file} is not valid JSON; delete {directory} and run `dvc repro`.") from error
    for name, digest in manifest.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing though {MANIFEST} lists it; delete {directory} and run `dvc repro`.")
        if sha256_file(path) != digest:
            raise UserError(f"{path} is corrupted (its sha256 differs); delete {directory} and run `dvc repro`.")
    extra = [name for name in _files(directory) if name not in manifest]
    if extra:
        raise UserError(f"{directory / extra[0]} is not listed in {MANIFEST}; move it out of {directory}.")
    return manifest


def newest_intact(states: Iterable[Path]) -> Path | None:
    """The resumable state with the highest step (``name-<step>``) that is as it was written; None without one.

    Newer ones are deleted: silently when they have no manifest, because a kill or a full disk cut them short, and with
    a line on standard error when their files were altered since.
    """
    for state in sorted(states, key=lambda path: -int(path.name.rpartition("-")[2])):
        if (state / MANIFEST).is_file():
            try:
                verify(state)
            except UserError:
                print(f"{state} is damaged and was deleted; an earlier state is used, if any.", file=sys.stderr)
            else:
                return state
        shutil.rmtree(state)
    return None
