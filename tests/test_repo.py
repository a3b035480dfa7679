"""Rules the whole repository keeps: what is imported, what is never called, what is never written down."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "rlheals").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What every stage uses and what carries numbers without changing them: no stage depends on it.
CARRIERS = {
    "rlheals/__init__.py",
    "rlheals/errors.py",
    "rlheals/models/folders.py",  # says what a folder is that cannot be read
    "rlheals/params.py",
    "rlheals/progress.py",
    "rlheals/publish.py",
    "rlheals/reporting/__init__.py",
    "rlheals/reporting/schemas.py",
    "rlheals/stages/__init__.py",
    "rlheals/stages/common.py",
    "rlheals/tasks/__init__.py",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def tracked_files() -> list[Path]:
    """Files git knows or would add; all files where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        return [
            path for folder in ("rlheals", "tests", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()
        ]
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    """(relative path, content) of every text file."""
    found = []
    for path in tracked_files():
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text()))
        except UnicodeDecodeError:
            continue
    return found


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def test_model_text_and_files_are_never_executed() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                if name in FORBIDDEN_CALLS or name == "torch.load":
                    found.append(f"{path}:{node.lineno} calls {name}")
                found += [
                    f"{path}:{node.lineno} passes trust_remote_code"
                    for keyword in node.keywords
                    if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                ]
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
    assert found == []


def test_modules_stay_short() -> None:
    long = {str(path.relative_to(ROOT)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 500}
    assert long == {}


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XXX|NotImplemented" + r"Error)\b")
    found = [
        f"{path}:{n}"
        for path in MODULES
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_no_addresses_or_machine_paths_are_written_down() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+(post\d+)?", pin) for pin in pins), (
        "names and versions only"
    )
    machine = re.compile(
        r"(?<![\w.])/(home|root|work|opt|mnt|Users)/\w|file:/{2,}\w|index-url\s*=?\s*\S|find-links\s*="
    )
    found = [
        f"{name}: {match[0]}"
        for name, text in texts()
        if name not in {"tests/test_repo.py", "constraints.txt"} and not name.startswith("reports/")
        if (match := machine.search(text))
    ]
    assert found == []


@pytest.mark.parametrize(
    "package",
    ["rlheals.stats", "rlheals.reporting", "rlheals.reporting.schemas", "rlheals.reporting.premises", "rlheals.tasks"],
)
def test_light_packages_import_without_torch(package: str) -> None:
    script = f"import sys, {package}; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_the_package_imports_nothing_but_itself() -> None:
    script = "import sys; before = set(sys.modules); import rlheals; print(sorted(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "['rlheals']"


@pytest.mark.parametrize("name", [".ci/run", "scripts/setup.sh"])
def test_scripts_are_executable_bash(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_make_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()] == phony[1].split()


def test_make_clean_keeps_results_and_copies_of_params(tmp_path: Path) -> None:
    kept = ["data/out", "scratch/params.before-1.yaml", "scratch/params.before-12.yaml"]
    for name in [*kept, "scratch/sft/state-1/weights", ".ruff_cache/x"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for _ in range(2):
        subprocess.run(["make", "-s", "-f", str(ROOT / "Makefile"), "clean"], cwd=tmp_path, check=True)
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == kept
    (tmp_path / kept[1]).unlink()
    (tmp_path / kept[2]).unlink()
    (tmp_path / "scratch").rmdir()
    subprocess.run(["make", "-s", "-f", str(ROOT / "Makefile"), "clean"], cwd=tmp_path, check=True)


def stages() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def imported_files(path: Path) -> set[str]:
    """Every file of the project that ``path`` imports, directly or not, lazy imports included; task folders left out.

    A task is found by its name in params, so its folder is a dependency whatever the imports say.
    """
    found: set[str] = set()
    queue = [path]
    while queue:
        current = queue.pop()
        name = str(current.relative_to(ROOT))
        if name in found or name.startswith("rlheals/tasks/"):
            continue
        found.add(name)
        if name in CARRIERS:
            continue
        for node in ast.walk(tree(current)):
            queue += [file for module in modules_of(node) for file in files_of(module)]
    return found


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def files_of(module: str) -> list[Path]:
    path = ROOT / Path(*module.split("."))
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    return [file for file in candidates if module.startswith("rlheals") and file.is_file()]


@pytest.mark.parametrize("name", list(stages()))
def test_a_stage_depends_on_the_code_that_makes_its_numbers(name: str) -> None:
    stage = stages()[name]
    assert stage["desc"]
    dependencies = [dependency for dependency in stage["deps"] if dependency.startswith("rlheals/")]
    used = imported_files(ROOT / "rlheals" / "stages" / f"{name}.py") - CARRIERS
    uncovered = {file for file in used if not any(file == d or file.startswith(f"{d}/") for d in dependencies)}
    assert uncovered == set(), "the stage imports these, and dvc.yaml does not name them"
    for dependency in dependencies:
        assert (ROOT / dependency.replace("${task.name}", "general_points")).exists(), dependency


@pytest.mark.parametrize("name", list(stages()))
def test_a_stage_depends_on_the_params_it_reads(name: str) -> None:
    stage = stages()[name]
    source = (ROOT / "rlheals" / "stages" / f"{name}.py").read_text()
    read = {match.replace("task_spec", "task") for match in re.findall(r"\bparams\.(\w+)", source)} - {"profile"}
    declared = {parameter.split(".")[0] for parameter in stage["params"]}
    assert read - declared - {"model"} == set()


def test_only_the_reports_are_kept_out_of_the_cache() -> None:
    uncached = [name for name, stage in stages().items() for out in stage["outs"] if isinstance(out, dict)]
    assert uncached == ["report"]


def test_commands_of_the_pipeline_run_in_the_environment() -> None:
    for stage in stages().values():
        assert stage["cmd"].startswith("python -m rlheals.stages.")


def test_no_placeholder_is_left_in_the_texts() -> None:
    mark = "LEAD" + "FILL"
    assert [name for name, text in texts() if mark in text and name.endswith(".md")] == []


def test_documents_link_to_files_that_exist() -> None:
    missing = []
    for name, text in texts():
        if name.endswith(".md"):
            targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
            missing += [f"{name}: {t}" for t in targets if not ((ROOT / name).parent / t).exists()]
    assert missing == []
