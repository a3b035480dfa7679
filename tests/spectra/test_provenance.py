"""Caches are named by all that their numbers come from: an edit anywhere among it finds nothing old."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlheals.spectra import provenance
from rlheals.spectra.provenance import PACKAGE, code_digest, machine, sources
from rlheals.spectra.results import ResultCache
from rlheals.spectra.store import FactorStore

SPECTRA = sorted((PACKAGE / "spectra").glob("*.py"))
ANSWERS = ("matrix_question", "head_question", "gauge_question", "function_question")


def loaded(script: str) -> set[Path]:
    """Files of the package that Python itself has loaded after the script."""
    files = "[m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'rlheals' and m.__file__]"
    listed = f"{script}\nimport sys\nprint(*{files})"
    done = subprocess.run(
        [sys.executable, "-c", listed], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return {Path(name) for name in done.stdout.split()}


def test_the_code_behind_the_answers_is_all_that_python_loads_for_them() -> None:
    """Besides the modules, the imports that functions make only when they are called."""
    modules = loaded(
        "; ".join(f"import rlheals.spectra.{name}" for name in ANSWERS) + "; import rlheals.models.checkpoint"
    )
    assert {PACKAGE / "models" / "checkpoint.py", PACKAGE / "models" / "topology.py"} < modules
    assert modules <= set(sources(SPECTRA))
    assert loaded("import rlheals.spectra.factorise") <= set(sources([PACKAGE / "spectra" / "factorise.py"]))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("code") / "rlheals"
    return Path(shutil.copytree(PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__")))


def test_an_edit_of_any_module_that_the_answers_import_is_another_key(copy: Path) -> None:
    roots = sorted((copy / "spectra").glob("*.py"))
    before = code_digest(roots, copy)
    files = sources(roots, copy)
    assert [file.relative_to(copy) for file in files] == [file.relative_to(PACKAGE) for file in sources(SPECTRA)]
    for file in files:
        content = file.read_text()
        file.write_text(f"{content}\nEDITED = 1\n")
        assert code_digest(roots, copy) != before, file
        file.write_text(content)
    assert code_digest(roots, copy) == before


def test_code_that_no_answer_uses_is_no_part_of_the_key(copy: Path) -> None:
    roots = sorted((copy / "spectra").glob("*.py"))
    before = code_digest(roots, copy)
    with (copy / "commands" / "play.py").open("a") as file:
        file.write("EDITED = 1\n")
    assert code_digest(roots, copy) == before


def test_a_new_import_brings_its_file_along(copy: Path) -> None:
    roots = sorted((copy / "spectra").glob("*.py"))
    before = sources(roots, copy)
    module = copy / "spectra" / "noise.py"
    content = module.read_text()
    module.write_text(f"{content}\ndef lazily() -> None:\n    from rlheals.training import schedules\n")
    assert set(sources(roots, copy)) - set(before) == {copy / "training" / "schedules.py"}
    module.write_text(content)


@pytest.mark.parametrize("what", ["library", "threads", "processor", "accelerator", "switch"])
def test_caches_of_another_machine_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    results, factors = ResultCache(tmp_path), FactorStore(tmp_path / "factors", 2**20)

    def keys() -> tuple[Path, str]:
        return results.path("digest"), factors.key("digest")

    before, known = keys(), machine()
    if what == "library":
        monkeypatch.setattr(provenance, "_version", lambda _: "0.1")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    elif what in ("processor", "accelerator"):
        monkeypatch.setattr(provenance, what, lambda: "another")
    else:
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert machine() != known
    assert not set(keys()) & set(before)
    assert set(known) >= {"torch", "numpy", "scipy", "cpu", "threads"}
    assert torch.__version__ == known["torch"]
