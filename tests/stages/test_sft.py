from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from rlheals.errors import UserError, disk_errors
from rlheals.stages.sft import _link_tree

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "weights").write_bytes(b"w")
    (tmp_path / "from" / "deep" / "config").write_bytes(b"c")
    return tmp_path / "from"


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number), target)

    monkeypatch.setattr(os, "link", link)


def test_rungs_are_linked(ladder: Path, tmp_path: Path) -> None:
    _link_tree(ladder, tmp_path / "to")
    assert (tmp_path / "to" / "weights").samefile(ladder / "weights")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_rungs_are_copied_where_links_are_impossible(
    ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, number)
    _link_tree(ladder, tmp_path / "to")
    assert (tmp_path / "to" / "weights").read_bytes() == b"w"
    assert (tmp_path / "to" / "deep" / "config").read_bytes() == b"c"
    assert not (tmp_path / "to" / "weights").samefile(ladder / "weights")


def test_a_full_disk_is_one_sentence(ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC)
    with pytest.raises(UserError, match="because the disk is full"), disk_errors(tmp_path):
        _link_tree(ladder, tmp_path / "to")
