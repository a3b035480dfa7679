from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError, disk_errors
from rlheals.publish import MANIFEST, newest_intact, publish, sha256_file, verify, write_manifest


def published(target: Path, **contents: str) -> Path:
    with publish(target) as directory:
        for name, text in contents.items():
            (directory / name).write_text(text)
    return target


def test_published_directory_verifies_and_lists_every_file(tmp_path: Path) -> None:
    target = tmp_path / "data" / "out"
    with publish(target) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "table.txt").write_text("x")
        assert not target.exists(), "nothing may appear before the end"
    assert verify(target) == {"deep/table.txt": sha256_file(target / "deep" / "table.txt")}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failing_body_leaves_what_was_there(tmp_path: Path) -> None:
    target = published(tmp_path / "out", a="old")

    def fail() -> None:
        with publish(target) as directory:
            (directory / "a").write_text("new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert (target / "a").read_text() == "old"
    assert verify(target)
    assert list(tmp_path.iterdir()) == [target]


def test_publishing_again_replaces_everything(tmp_path: Path) -> None:
    published(tmp_path / "out", a="1", b="2")
    published(tmp_path / "out", a="3")
    assert set(verify(tmp_path / "out")) == {"a"}


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"name": "a browser extension"}'])
def test_a_folder_of_the_users_is_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("x")
    if manifest:
        (mine / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match="mine exists and is no output of rlheals"):
        published(mine, a="1")
    assert (mine / "thesis").read_text() == "x"
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("name", ["thesis", ".hidden", "deep/thesis", "link"])
def test_files_that_were_added_to_an_output_are_never_deleted(tmp_path: Path, name: str) -> None:
    target = published(tmp_path / "out", a="old")
    (target / "deep").mkdir()
    published(target, a="older")  # an empty folder is no loss
    (target / "deep").mkdir()
    if name == "link":
        (target / name).symlink_to(tmp_path)
    else:
        (target / name).write_text("mine")
    with pytest.raises(UserError, match=f"out holds {name}, which rlheals did not write there"):
        published(target, a="new")
    assert (target / "a").read_text() == "older"
    assert (target / name).exists()
    assert list(tmp_path.iterdir()) == [target]


def test_files_that_were_added_while_it_ran_are_not_deleted_either(tmp_path: Path) -> None:
    target = published(tmp_path / "out", a="old")

    def add_one() -> None:
        with publish(target) as directory:
            (directory / "a").write_text("new")
            (target / "thesis").write_text("mine")

    with pytest.raises(UserError, match="out holds thesis"):
        add_one()
    assert {path.name for path in target.iterdir()} == {"a", "thesis", MANIFEST}


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publish(target) as directory:
        (directory / "a").write_text("first")
        with pytest.raises(UserError, match=f"another run is writing {target}; wait"):
            published(target, a="second")
        assert (directory / "a").read_text() == "first"
    assert verify(target)
    published(target, a="third")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = published(tmp_path / "out", a="old"), Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial") and to == target:
            raise OSError(errno.ENOSPC, "raw")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="disk is full"):
        published(target, a="new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_files_links_and_the_folder_one_is_in_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(published(tmp_path / "out", a="1"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for target in (tmp_path / "file", tmp_path / "link", tmp_path / "dangling", Path(), Path("..")):
        with pytest.raises(UserError, match="is not replaced; name another folder"):
            published(target, a="2")
    assert (tmp_path / "link" / "a").read_text() == "1"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert set(verify(published(tmp_path / "out", a="1"))) == {"a"}


@pytest.mark.parametrize("name", ["stray", ".hidden", "deep/stray", f"deep/{MANIFEST}"])
def test_an_extra_file_is_found(tmp_path: Path, name: str) -> None:
    target = published(tmp_path / "out", a="1")
    (target / "deep").mkdir()
    assert set(verify(target)) == {"a"}
    (target / name).write_text("x")
    with pytest.raises(UserError, match=rf"{name} is not listed in {MANIFEST}"):
        verify(target)


def test_a_manifest_further_down_is_a_file_like_any_other(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / MANIFEST).write_text("{}")
    assert set(verify(tmp_path / "out")) == {f"deep/{MANIFEST}"}


def states(root: Path, *steps: int) -> list[Path]:
    for step in steps:
        (root / f"state-{step}").mkdir()
        (root / f"state-{step}" / "weights").write_text(str(step))
        write_manifest(root / f"state-{step}")
    return list(root.iterdir())


def test_the_newest_state_counts_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_intact([]) is None
    assert newest_intact(states(tmp_path, 9, 10, 8)) == tmp_path / "state-10"
    assert capsys.readouterr().err == ""


def test_an_altered_state_is_told_and_a_cut_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = states(tmp_path, 1, 2, 3)
    (tmp_path / "state-3" / MANIFEST).unlink()
    assert newest_intact(found) == tmp_path / "state-2"
    assert capsys.readouterr().err == ""
    (tmp_path / "state-2" / "weights").write_text("")
    assert newest_intact(list(tmp_path.iterdir())) == tmp_path / "state-1"
    assert (
        capsys.readouterr().err
        == f"{tmp_path / 'state-2'} is damaged and was deleted; an earlier state is used, if any.\n"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "state-1"]


def test_weights_with_narrow_permissions_become_readable(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as directory:
        (directory / "w").write_text("x")
        (directory / "w").chmod(0o600)
    assert (tmp_path / "out" / "w").stat().st_mode & 0o777 == 0o644


def test_same_content_gives_the_same_manifest(tmp_path: Path) -> None:
    one, two = published(tmp_path / "one", b="2", a="1"), published(tmp_path / "two", a="1", b="2")
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_any_changed_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    target = tmp_path_factory.mktemp("p") / "out"
    with publish(target) as directory:
        (directory / "f").write_bytes(content)
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    (target / "f").write_bytes(changed)
    with pytest.raises(UserError, match=r"f is corrupted \(its sha256 differs\)"):
        verify(target)


def test_missing_parts_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; run the stage"):
        verify(tmp_path / "none")
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="never completed"):
        verify(tmp_path / "half")
    target = published(tmp_path / "out", a="1")
    (target / "a").unlink()
    with pytest.raises(UserError, match="is missing though"):
        verify(target)
    (target / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        verify(target)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_disk_errors_become_sentences(number: int, words: str) -> None:
    with pytest.raises(UserError, match=words), disk_errors(Path("data/x")):
        raise OSError(number, "raw")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "[Errno 28] No space")]),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_told_only_in_the_text_is_understood(error: Exception) -> None:
    with (
        pytest.raises(UserError, match=r"data/x could not be written because the disk is full"),
        disk_errors(Path("data/x")),
    ):
        raise error


@pytest.mark.parametrize("failed", ["data/x", "data", "data/.x.partial"])
@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOENT, "can be made"), (errno.ENOTDIR, "is a file"), (errno.ENAMETOOLONG, "too long")]
)
def test_places_that_cannot_be_written_are_told(failed: str, number: int, words: str) -> None:
    with pytest.raises(UserError, match=words), disk_errors(Path("data/x")):
        raise OSError(number, "raw", failed)


@pytest.mark.parametrize("failed", [(), ("base/config.json",), ("data/other",), ("data/x/inside",), (3,)])
def test_other_errors_pass_through(failed: tuple[object, ...]) -> None:
    """What is missing may be something that is read, which is another sentence or an error of ours."""
    with pytest.raises(FileNotFoundError), disk_errors(Path("data/x")):
        raise FileNotFoundError(errno.ENOENT, "raw", *failed)


def test_publishing_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"), publish(tmp_path / "file" / "out"):
        pass
    with pytest.raises(UserError, match="name is too long"), publish(tmp_path / ("x" * 300)):
        pass


KILLED_IN_THE_SWAP = """
import os, signal, sys
from pathlib import Path
from rlheals.publish import publish
def rename(path, to, real=Path.rename):
    if path.name == ".out.partial" and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, to)
    if path.name == ".out.partial":
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
with publish(Path(sys.argv[1])) as directory:
    (directory / "a").write_text("new")
"""


@pytest.mark.fault
@pytest.mark.parametrize(("when", "wanted"), [("before", "old"), ("after", "new")])
def test_a_kill_while_an_output_is_replaced_loses_nothing(tmp_path: Path, when: str, wanted: str) -> None:
    target = published(tmp_path / "out", a="old")
    run = subprocess.run([sys.executable, "-c", KILLED_IN_THE_SWAP, str(target), when], check=False)
    assert run.returncode == -signal.SIGKILL

    def fail() -> None:
        with publish(target):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert verify(target)
    assert (target / "a").read_text() == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import os, signal, sys
from pathlib import Path
from rlheals.publish import publish
with publish(Path(sys.argv[1])) as directory:
    (directory / "big").write_bytes(b"x" * 2_000_000)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.fault
def test_a_write_past_a_limit_publishes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out"), "limit"]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert run.returncode != 0
    assert "the file would exceed the size limit; nothing was published" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_kill_publishes_nothing_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = published(tmp_path / "out", a="old")
    run = subprocess.run([sys.executable, "-c", WRITER, str(target), "kill"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert set(verify(target)) == {"a"}
    published(target, a="new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((target / MANIFEST).read_text()).keys() == {"a"}
