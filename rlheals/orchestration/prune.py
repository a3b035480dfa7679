"""Find and remove what stages wrote for matrix items that params.yaml no longer declares.

Only the current profile is looked at, and only what a record calls the output of a stage: an entry of ``dvc.lock``, or
the manifest that `rlheals.publish` writes, that in a folder of a known stage (data/<profile>/<stage>/<model>/<seed>),
because other commands publish too. DVC's cache is left alone, so an item that is declared again is restored.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError, disk_errors
from rlheals.orchestration.driver_lock import driver_lock, mend_marks
from rlheals.orchestration.pipeline import check_version
from rlheals.params import PARAMS_FILE
from rlheals.profile import current_profile
from rlheals.publish import FORMER, MANIFEST, PARTIAL, read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@dataclass(frozen=True)
class Leftover:
    """Outputs of one stage, or one folder, that nothing declares any more.

    Attributes:
        stage: its entry in ``dvc.lock``, for example ``sft@mini-tiny-1``; empty when it has none.
        paths: what is on disk, relative to the project; empty when only the entry is left.
        size: bytes on disk.
        cached: whether DVC's cache holds all of it.
        keep: why it is not removed; empty when it is.
    """

    stage: str
    paths: tuple[str, ...]
    size: int
    cached: bool
    keep: str = ""


def find_leftovers(root: Path) -> list[Leftover]:
    """What `remove_leftovers` would remove, entries of ``dvc.lock`` first; nothing is changed.

    Raises:
        UserError: ``root`` is no DVC project, DVC's version is not a tested one, or dvc.yaml, dvc.lock or params.yaml
            cannot be read.
    """
    with _workspace(root) as workspace:
        return workspace.leftovers()


def remove_leftovers(root: Path, expected: list[Leftover], say: Callable[[str], None] = print) -> None:
    """Remove ``expected``, as `find_leftovers` gave it, but for what is to be kept.

    Raises:
        UserError: a driver or a DVC command is at work, or there is something else to remove by now.
    """
    with driver_lock(root, say=say, hand_back=True), _workspace(root) as workspace, workspace.reserved():
        if workspace.leftovers() != expected:
            raise UserError("what there is to prune has changed meanwhile; run `rlheals prune` again to see it.")
        for leftover in expected:
            if not leftover.keep:
                workspace.remove(leftover)


def profile_of(root: Path) -> str:
    """The profile of params.yaml, safe as the name of a folder.

    Raises:
        UserError: params.yaml is missing, unreadable, or its profile is no plain name.
    """
    path = root / PARAMS_FILE
    profile = current_profile(path)
    if not profile or profile in (".", "..") or Path(profile).name != profile:
        raise UserError(f"{path} does not name a profile; write one with `rlheals profile`, for example mini.")
    return profile


@contextmanager
def _workspace(root: Path) -> Iterator[_Workspace]:
    check_version()
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    root = root.resolve()
    profile = profile_of(root)
    if not (root / ".dvc").is_dir() or not (root / "dvc.yaml").is_file():
        raise UserError(f"{root} holds no dvc.yaml of a DVC project; run `rlheals prune` in the project's folder.")
    try:
        with Repo(str(root)) as repo:
            yield _Workspace(repo, root, profile)
    except LockError as error:
        raise UserError(f"DVC is at work in {root}, so nothing is pruned; run it again later. ({error})") from error
    except DvcException as error:
        raise UserError(f"prune: DVC says: {error}") from error


class _Workspace:
    """One look at a DVC workspace; every DVC call of this module is in here."""

    def __init__(self, repo: Any, root: Path, profile: str) -> None:
        self._repo, self._root = repo, root
        self._data, self._reports = root / "data" / profile, root / "reports" / profile

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold DVC's locks for the whole project: neither a command of DVC nor a stage it started is running."""
        from dvc.repo import lock_repo
        from dvc.rwlock import rwlock

        repo = self._repo
        hardlink = repo.config["core"].get("hardlink_lock", False)
        with lock_repo(repo):
            mend_marks(Path(repo.tmp_dir))
            with (
                rwlock(repo.tmp_dir, repo.fs, "rlheals prune", [], [repo.root_dir], hardlink),
                repo.scm_context(quiet=True),
            ):
                yield

    def leftovers(self) -> list[Leftover]:
        stages = self._repo.index.stages
        names = {stage.name for stage in stages if Path(stage.path) == self._root / "dvc.yaml"}
        declared = [Path(out.fs_path) for stage in stages for out in stage.outs]
        entries = self._lockfile().load().get("stages", {})
        found = [
            self._entry(name, outs, declared)
            for name, entry in entries.items()
            if name not in names and self._is_ours(outs := entry.get("outs", []))
        ]
        listed = [self._root / path for leftover in found for path in leftover.paths]
        groups = {name.split("@")[0] for name in (*names, *entries)}
        orphans = [self._orphan(path) for path in _orphans(self._data, groups, [*declared, *listed])]
        return [*found, *orphans]

    def remove(self, leftover: Leftover) -> None:
        """Remove the files, then the entry: a kill in between leaves an entry that the next run finds."""
        for name in leftover.paths:
            path = self._root / name
            with disk_errors(path):
                _delete(path)
            self._repo.scm_context.ignore_remove(str(path))
            for parent in path.parents:
                if parent in (self._data, self._reports, self._root) or any(parent.iterdir()):
                    break
                parent.rmdir()
        if leftover.stage:
            self._lockfile().remove_stage(SimpleNamespace(name=leftover.stage))

    def _lockfile(self) -> Any:
        from dvc.dvcfile import LOCK_FILE, Lockfile

        return Lockfile(self._repo, str(self._root / LOCK_FILE))

    def _is_ours(self, outs: list[dict[str, Any]]) -> bool:
        """Whether an entry's outputs all belong to the profile."""
        paths = [self._root / out["path"] for out in outs]
        return bool(paths) and all(
            self._data in path.parents or self._reports in (path, *path.parents) for path in paths
        )

    def _entry(self, name: str, outs: list[dict[str, Any]], declared: list[Path]) -> Leftover:
        """The leftover of an entry; an output that a declared stage writes too stays on disk."""
        mine = [out for out in outs if not _overlaps(self._root / out["path"], declared)]
        present = [out for out in mine if os.path.lexists(self._root / out["path"])]
        reasons = [self._reason(self._root / out["path"], self._cached_files(out)[0]) for out in present]
        return Leftover(
            stage=name,
            paths=tuple(out["path"] for out in present),
            size=sum(_size(self._root / out["path"]) for out in present),
            cached=all(self._cached_files(out)[1] for out in mine),
            keep=next(filter(None, reasons), ""),
        )

    def _orphan(self, path: Path) -> Leftover:
        keep = "" if path.name.endswith(PARTIAL) else self._reason(path, None)
        return Leftover("", (str(path.relative_to(self._root)),), _size(path), cached=False, keep=keep)

    def _cached_files(self, out: dict[str, Any]) -> tuple[set[str] | None, bool]:
        """Relative paths of an output's files as DVC recorded them, if it still knows; and whether it has them all."""
        cache, digest = self._repo.cache.local, out.get("md5", "")
        if not digest or not cache.exists(digest):
            return None, False
        if not digest.endswith(".dir"):
            return set(), True
        files = json.loads(Path(cache.oid_to_path(digest)).read_text())
        return {file["relpath"] for file in files}, all(cache.exists(file["md5"]) for file in files)

    def _reason(self, path: Path, cached: set[str] | None) -> str:
        """Why an output has to stay: it holds a file that no stage wrote, or nothing says which ones it wrote."""
        if path.is_symlink() or not path.is_dir():
            return ""
        known = (cached or set()) | _manifest_files(path)
        foreign = sorted(set(_files(path)) - known)
        if not foreign:
            return ""
        if not known:
            return "neither a manifest nor DVC's cache says which of its files a stage wrote; delete it by hand"
        return f"no stage wrote {foreign[0]} in it; move that file away and prune again"


def _orphans(data: Path, groups: set[str], known: list[Path]) -> Iterator[Path]:
    """Published or half-published folders <stage>/<model>/<seed> of ``data`` that are none of ``known``.

    Only those of the stages ``groups``; links are not followed.
    """
    for path in sorted(data.glob("*/*/*")):
        group, model = path.parents[1], path.parents[0]
        if group.name not in groups or not path.is_dir() or any(part.is_symlink() for part in (group, model, path)):
            continue
        hidden = path.name.startswith(".")
        target = path.with_name(path.name[1:].removesuffix(PARTIAL).removesuffix(FORMER)) if hidden else path
        published = path.name.endswith((PARTIAL, FORMER)) if hidden else bool(_manifest_files(path))
        if published and not _overlaps(target, known):
            yield path


def _overlaps(path: Path, others: Iterable[Path]) -> bool:
    return any(path == other or path in other.parents or other in path.parents for other in others)


def _manifest_files(folder: Path) -> set[str]:
    """Files of a folder that `rlheals.publish` wrote, its manifest among them; empty when it did not."""
    found = read_manifest(folder)
    return {MANIFEST, *found} if found else set()


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of files and links below ``folder``."""
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        for path in (
            *(here / name for name in names),
            *(here / name for name in folders if (here / name).is_symlink()),
        ):
            yield str(path.relative_to(folder))


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum((path / name).stat().st_size for name in _files(path) if (path / name).exists())


def _delete(path: Path) -> None:
    """Delete a file, link or folder; a folder disappears at once, before its files do."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if path.name.endswith(PARTIAL) else path.with_name(f".{path.name}{PARTIAL}")
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    shutil.rmtree(hidden)
