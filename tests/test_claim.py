from __future__ import annotations

import errno
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from rlheals.claim import claim, claimed
from rlheals.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("folder", [False, True])
def test_one_at_a_time_and_the_next_after_it(tmp_path: Path, folder: bool) -> None:
    path, place = tmp_path / "deep" / "x", tmp_path / "place"
    path.parent.mkdir()
    with claimed(path, place, folder=folder):
        assert path.is_dir() == folder
        with pytest.raises(UserError, match=f"another run is writing {place}; wait for it to end or choose another"):
            claim(path, place, folder=folder)
    with claimed(path, place, folder=folder):
        pass


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("half")
    with claimed(tmp_path / "x", tmp_path):
        assert (tmp_path / "x").read_text() == "half"


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("gone", ["renamed", "removed"])
def test_a_path_that_another_run_took_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, gone: str
) -> None:
    """The run before ends between the opening and the locking here."""
    path, real = tmp_path / "x", fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        if gone == "renamed":
            path.rename(tmp_path / "done")
        elif folder:
            shutil.rmtree(path)
        else:
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = claim(path, tmp_path, folder=folder)
    assert os.path.samestat(path.stat(), os.fstat(descriptor))
    os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EBADF, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, "raw")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "x", tmp_path), claimed(tmp_path / "y", tmp_path, folder=True):
        assert (tmp_path / "x").is_file()


def test_a_forked_process_that_lives_on_does_not_keep_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    with claimed(tmp_path / "x", tmp_path, folder=True):
        child = os.fork()
        if not child:  # pragma: no cover  another process
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with claimed(tmp_path / "x", tmp_path, folder=True):
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    (tmp_path / "x").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        claim(tmp_path / "x", tmp_path)
