"""Publish a stage's output directory with one atomic rename, and check it before it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlheals.errors import UserError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it gets a manifest and becomes ``target`` by one rename.

    Nothing appears at ``target`` when the body raises, is killed, or the disk fills up.

    Raises:
        UserError: the files could not be written.
    """
    temporary = target.with_name(f".{target.name}.partial")
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            write_manifest(temporary)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_manifest(directory: Path) -> None:
    """Write ``manifest.json``: sha256 of every file below ``directory``, keys sorted, flushed to disk."""
    digests = {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    # HF writes weights with mode 600, which a shared DVC cache cannot serve to other users.
    for name in digests:
        (directory / name).chmod(0o644)
    with (directory / MANIFEST).open("w") as file:
        json.dump(digests, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


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
    return manifest
