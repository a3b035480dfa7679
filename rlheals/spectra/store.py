"""Factors on disk, under the content of the tensor they belong to: a matrix is decomposed once, ever.

An entry is a folder named by the sha256 of tensor digest, driver, device, `VERSION`, and the code, libraries, processor
and threads that decompose (`rlheals.spectra.provenance`): factors are exact to rounding, but only factors of equal
rounding give an edit the same bits. It holds ``left.f64`` and ``right.f64``, the bases with one singular vector after
the other in little-endian float64, so that some columns are one contiguous read; ``values.f64``; and ``entry.json``
with shape, driver, errors and the sha256 of the other files. Files are read with seek and read, not mapped, because a
map counts as address space under a memory limit.

Entries appear by one rename. Whoever uses one holds a shared ``flock`` on its folder, and only a folder that can be
locked exclusively is removed, so processes may share a store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlheals.errors import UserError, disk_errors
from rlheals.publish import sha256_file
from rlheals.spectra.factorise import factorise
from rlheals.spectra.provenance import code_of, machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import Tensor

    from rlheals.spectra.factors import Factors

VERSION = 1
"""Part of every key; raise it when the files of an entry change their meaning."""
_ENTRY = "entry.json"
_FILES = ("left.f64", "right.f64", "values.f64")
_PARTIAL = ".partial-"
_STALE_SECONDS = 60.0


class StoredFactors:
    """`FactorView` of one entry: keeps the singular values in memory and reads vectors as they are asked for.

    Holds one file descriptor until `close`, the end of a ``with`` block, or its own end; the entry stays on disk so
    long.
    """

    def __init__(self, folder: Path, descriptor: int, entry: dict[str, Any]) -> None:
        self._folder = folder
        self._paths = {name: os.fspath(folder / name) for name in _FILES}
        self.shape: tuple[int, int] = (int(entry["shape"][0]), int(entry["shape"][1]))
        self.rank = min(self.shape)
        self.driver = str(entry["driver"])
        self.reconstruction_error = float(entry["reconstruction_error"])
        self.orthonormality_error = float(entry["orthonormality_error"])
        self.values = torch.from_numpy(np.fromfile(folder / "values.f64", dtype="<f8"))
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def left(self, columns: slice) -> Tensor:
        """These left singular vectors, (m, columns), float64; a fresh copy."""
        return self._read("left.f64", self.shape[0], columns)

    def right(self, columns: slice) -> Tensor:
        """These right singular vectors, (n, columns), float64; a fresh copy."""
        return self._read("right.f64", self.shape[1], columns)

    def _read(self, name: str, length: int, columns: slice) -> Tensor:
        """Vectors ``columns`` of a basis file, whose vectors have ``length`` entries."""
        if not self._finalizer.alive:
            raise ValueError("these factors are closed")
        start, stop, step = columns.indices(self.rank)
        if step != 1:
            raise ValueError("factors are read by contiguous columns")
        rows = np.empty((max(stop - start, 0), length), dtype="<f8")
        if not _filled(rows, self._paths[name], start * length * 8):
            raise UserError(f"{self._folder / name} was cut short while in use; delete {self._folder} and run again.")
        return torch.from_numpy(rows).mT

    def close(self) -> None:
        """Let go of the entry, which may then be evicted."""
        self._finalizer()

    def __enter__(self) -> StoredFactors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FactorStore:
    """Decompositions by tensor digest, at most ``cap_bytes`` of them on disk, the longest unused evicted first.

    Attributes:
        factorised: how many decompositions this object has computed.
        hits: how many it has found.
    """

    def __init__(self, directory: Path, cap_bytes: int, device: str = "cpu", driver: str = "auto") -> None:
        """Open or make the store.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        self.directory, self.cap_bytes, self.device, self.driver = directory, cap_bytes, device, driver
        self.factorised = self.hits = 0
        self._intact: set[tuple[str, int]] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UserError(
                f"The cache folder {directory} cannot be written to ({error.strerror}); name another with --cache."
            ) from error
        self._sweep()

    def key(self, digest: str) -> str:
        """Name of the entry for a tensor with this digest."""
        device = torch.device(self.device).type
        told = [digest, self.driver, device, VERSION, code_of("spectra/factorise.py"), machine()]
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def factors(self, tensor: Callable[[], Tensor], digest: str) -> StoredFactors:
        """Factors of the tensor with this digest; ``tensor`` is called, and its result decomposed, on a miss only.

        Raises:
            UserError: the tensor cannot be decomposed (see `factorise`) or the entry not written.
        """
        folder = self.directory / self.key(digest)
        found = self._open(folder)
        if found:
            self.hits += 1
            return found
        made = factorise(tensor(), self.driver, self.device)
        self.factorised += 1
        self._write(folder, made)
        del made
        found = self._open(folder)
        if not found:
            raise UserError(f"{folder} was damaged right after it was written; check the disk of {self.directory}.")
        self._evict()
        return found

    def bytes_on_disk(self) -> int:
        """Size of all entries, those of other runs included."""
        return sum(used[1] for used in map(_usage, self._entries()) if used)

    def told(self) -> str:
        """One line about what stays on disk, where, and how to limit it."""
        held, most = _size(self.bytes_on_disk()), _size(self.cap_bytes)
        return (
            f"kept on disk for the next run: {held} of decompositions in {self.directory}, at most {most} "
            "(--cache-gib); the folder may be deleted."
        )

    def _open(self, folder: Path) -> StoredFactors | None:
        """The entry, locked against eviction; None when there is none or it is damaged."""
        descriptor = _locked(folder, fcntl.LOCK_SH)
        if descriptor is None:
            return None
        entry = self._intact_entry(folder)
        if entry is None:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(folder / _ENTRY)
        return StoredFactors(folder, descriptor, entry)

    def _intact_entry(self, folder: Path) -> dict[str, Any] | None:
        """The entry's description when its files are whole; contents are hashed once per object, lengths each time."""
        try:
            entry: dict[str, Any] = json.loads((folder / _ENTRY).read_text())
            rows, columns = entry["shape"]
            rank = min(rows, columns)
            lengths = dict(zip(_FILES, (8 * rows * rank, 8 * columns * rank, 8 * rank), strict=True))
            if any((folder / name).stat().st_size != length for name, length in lengths.items()):
                return None
            known = (folder.name, folder.stat().st_ino)
            if known not in self._intact:
                if any(sha256_file(folder / name) != entry["sha256"][name] for name in _FILES):
                    return None
                self._intact.add(known)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry

    def _write(self, folder: Path, made: Factors) -> None:
        """Publish an entry; when another process was faster, its intact entry stays."""
        with disk_errors(folder):
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory))
            try:
                partial.chmod(0o755)
                _write_files(partial, made)
                self._place(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _place(self, partial: Path, folder: Path) -> None:
        """Rename ``partial`` to ``folder``; a damaged entry in its place goes first, an intact one is kept."""
        for _ in range(3):
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                if self._intact_entry(folder) is not None:
                    return
                print(f"{folder} is damaged and was made anew.", file=sys.stderr)
                _remove(folder)
            else:
                return

    def _evict(self) -> None:
        """Remove the longest unused entries that nobody has open until the rest fits under the cap."""
        entries = sorted((entry for entry in map(_usage, self._entries()) if entry), key=lambda entry: entry[0])
        total = sum(size for _, size, _ in entries)
        for _, size, folder in entries:
            if total <= self.cap_bytes:
                return
            descriptor = _locked(folder, fcntl.LOCK_EX)
            if descriptor is None:
                continue
            _remove(folder)
            os.close(descriptor)
            total -= size

    def _entries(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if len(path.name) == 64 and path.is_dir()]

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            with suppress(OSError):
                newest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
                if time.time() - newest > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _size(count: int) -> str:
    """Bytes as people say them."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"


def _filled(array: NDArray[np.float64], path: str, offset: int) -> bool:
    """Whether the file went on long enough from ``offset`` to fill the array; half the time of a file object."""
    rest = array.reshape(-1).view(np.uint8).data
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while rest and (count := os.preadv(descriptor, [rest], offset)):
            rest, offset = rest[count:], offset + count
    finally:
        os.close(descriptor)
    return not rest


def _write_files(folder: Path, made: Factors) -> None:
    """The files of an entry; the description, which makes it one, comes last."""
    digests = {}
    for name, rows in zip(_FILES, (made.left.mT, made.right.mT, made.values[None]), strict=True):
        array = np.ascontiguousarray(rows.numpy(), dtype="<f8")
        digests[name] = hashlib.sha256(array.data).hexdigest()
        with (folder / name).open("wb") as file:
            file.write(array.data)
    entry = {
        "shape": [made.left.shape[0], made.right.shape[0]],
        "driver": made.driver,
        "reconstruction_error": made.reconstruction_error,
        "orthonormality_error": made.orthonormality_error,
        "sha256": digests,
    }
    (folder / _ENTRY).write_text(json.dumps(entry, indent=1, sort_keys=True))


def _locked(folder: Path, kind: int) -> int | None:
    """Descriptor of the folder with a lock of this kind; None when it is gone, replaced, or locked by someone else."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, kind if kind == fcntl.LOCK_SH else kind | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == folder.stat().st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _usage(folder: Path) -> tuple[float, int, Path] | None:
    """(time of last use, bytes, folder) of an entry; None when it has just gone."""
    try:
        last = (folder / _ENTRY).stat().st_mtime if (folder / _ENTRY).exists() else 0.0
        return last, sum(path.stat().st_size for path in folder.iterdir()), folder
    except OSError:
        return None


def _remove(folder: Path) -> None:
    """Take an entry out by one rename, then delete it, so that nobody finds half of it."""
    with suppress(OSError):
        aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
