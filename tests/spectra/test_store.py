"""The store: decomposed once, read by columns, safe against damage, eviction and a second process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlheals.errors import UserError
from rlheals.spectra.factorise import factorise
from rlheals.spectra.store import FactorStore, StoredFactors

MATRIX = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
SIZE = 8 * (20 * 12 + 12 * 12 + 12)


def never() -> torch.Tensor:
    raise AssertionError("the tensor was asked for")


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def store(tmp_path: Path) -> FactorStore:
    return FactorStore(tmp_path / "cache", 1 << 30)


@pytest.mark.parametrize("matrix", [MATRIX, MATRIX.mT])
def test_columns_are_those_of_the_factors(store: FactorStore, matrix: torch.Tensor) -> None:
    expected = factorise(matrix)
    with store.factors(lambda: matrix, "a") as found:
        assert found.shape == tuple(matrix.shape)
        assert found.rank == 12
        assert torch.equal(found.values, expected.values)
        for columns in (slice(0, 12), slice(3, 7), slice(None), slice(-2, None), slice(5, 5)):
            assert torch.equal(found.left(columns), expected.left[:, columns])
            assert torch.equal(found.right(columns), expected.right[:, columns])
        assert found.driver == expected.driver
        assert found.reconstruction_error == expected.reconstruction_error
        assert found.orthonormality_error == expected.orthonormality_error
        with pytest.raises(ValueError, match="contiguous"):
            found.left(slice(0, 6, 2))
    with pytest.raises(ValueError, match="closed"):
        found.left(slice(0, 1))


def test_second_run_factorises_nothing(store: FactorStore) -> None:
    store.factors(lambda: MATRIX, "a").close()
    store.factors(never, "a").close()
    assert (store.factorised, store.hits) == (1, 1)
    later = FactorStore(store.directory, 1 << 30)
    later.factors(never, "a").close()
    assert (later.factorised, later.hits) == (0, 1)


def test_key_depends_on_digest_driver_and_version(store: FactorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FactorStore(store.directory, 1 << 30, driver="gesdd")
    keys = {store.key("a"), store.key("b"), other.key("a")}
    monkeypatch.setattr("rlheals.spectra.store.VERSION", -1)
    assert len(keys | {store.key("a")}) == 4
    assert FactorStore(store.directory, 1).key("a") == store.key("a")


def damage_cut(folder: Path) -> None:
    os.truncate(folder / "left.f64", 100)


def damage_flip(folder: Path) -> None:
    content = bytearray((folder / "right.f64").read_bytes())
    content[500] ^= 1
    (folder / "right.f64").write_bytes(content)


def damage_lost(folder: Path) -> None:
    (folder / "values.f64").unlink()


def damage_text(folder: Path) -> None:
    (folder / "entry.json").write_text("{")


def damage_keys(folder: Path) -> None:
    (folder / "entry.json").write_text(json.dumps({"shape": [20, 12], "sha256": []}))


def damage_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_lost, damage_text, damage_keys, damage_all])
def test_damaged_entry_is_a_miss_and_made_anew(store: FactorStore, damage: object) -> None:
    store.factors(lambda: MATRIX, "a").close()
    (folder,) = entries(store.directory)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)  # type: ignore[operator]
    later = FactorStore(store.directory, 1 << 30)
    with later.factors(lambda: MATRIX, "a") as found:
        assert found.left(slice(0, 12)).shape == (20, 12)
    assert (later.factorised, later.hits) == (1, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    later.factors(never, "a").close()
    assert entries(store.directory) == [folder]


def age(store: FactorStore, digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(store.directory / store.key(digest) / "entry.json", (then, then))


def test_longest_unused_goes_first(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, 2 * (SIZE + 1000))
    for place, digest in enumerate("ab"):
        store.factors(lambda: MATRIX, digest).close()
        age(store, digest, 100 - place)
    store.factors(never, "a").close()  # now b is the older one
    store.factors(lambda: MATRIX, "c").close()
    assert {path.name for path in entries(tmp_path)} == {store.key("a"), store.key("c")}


def test_open_entries_stay(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, 1)
    first = store.factors(lambda: MATRIX, "a")
    second = store.factors(lambda: MATRIX + 1, "b")
    assert len(entries(tmp_path)) == 2
    assert first.left(slice(0, 2)).shape == (20, 2)
    first.close()
    third = store.factors(lambda: MATRIX + 2, "c")
    assert {path.name for path in entries(tmp_path)} == {store.key("b"), store.key("c")}
    del second, third
    store.factors(lambda: MATRIX, "d").close()
    assert [path.name for path in entries(tmp_path)] == [store.key("d")]


def test_failure_leaves_nothing(store: FactorStore) -> None:
    with pytest.raises(UserError, match="NaN"):
        store.factors(lambda: MATRIX * float("nan"), "a")
    assert list(store.directory.iterdir()) == []
    assert store.factorised == 0


def test_leftovers_of_killed_processes_go(store: FactorStore) -> None:
    old, young = store.directory / ".partial-old", store.directory / ".partial-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "left.f64").write_bytes(b"x")
    for path in (old / "left.f64", old):
        os.utime(path, (1, 1))
    FactorStore(store.directory, 1)
    assert not old.exists()
    assert young.exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/cache cannot be written"):
        FactorStore(tmp_path / "file" / "cache", 1)


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rlheals.spectra.store.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        FactorStore(tmp_path, 1)


def test_disk_full(store: FactorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlheals.spectra.store._write_files", full)
    with pytest.raises(UserError, match="the disk is full"):
        store.factors(lambda: MATRIX, "a")
    assert list(store.directory.iterdir()) == []


TWO = """
import sys, pathlib, torch
from rlheals.spectra.store import FactorStore
store = FactorStore(pathlib.Path(sys.argv[1]), 3 * 4000)
for turn in range(60):
    seed = turn * int(sys.argv[2]) % 7
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
    with store.factors(lambda: matrix, str(seed)) as found:
        product = (found.left(slice(0, 12)) * found.values) @ found.right(slice(0, 12)).mT
        assert float((product - matrix).abs().max()) < 1e-6
"""


def test_two_processes_share_a_store_that_evicts(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), step], env=environment, stderr=subprocess.PIPE, text=True
        )
        for step in ("1", "3")
    ]
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert not list(tmp_path.glob(".partial-*"))


def test_stored_factors_are_a_view(store: FactorStore) -> None:
    found = store.factors(lambda: MATRIX, "a")
    assert isinstance(found, StoredFactors)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    del found
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1


def test_what_stays_on_disk_is_told(store: FactorStore) -> None:
    for digest in ("a", "b"):
        store.factors(lambda: MATRIX, digest).close()
    stored = sum(file.stat().st_size for file in store.directory.rglob("*") if file.is_file())
    assert store.bytes_on_disk() == stored > 2 * SIZE
    assert (
        f": {stored / 1024:.3g} KiB of decompositions in {store.directory}, at most 1 GiB (--cache-gib)" in store.told()
    )
    limited = FactorStore(store.directory, 5 * 2**20)
    assert "at most 5 MiB" in limited.told()
