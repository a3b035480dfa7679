"""What numbers come from besides their input: the code that makes them, the libraries below it, and the processor.

Caches name their entries by it, so that a change of any of these finds nothing old. Which code that is follows from
the imports: every file of the package that a module imports, directly or not, lazily or not, is part of it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import rlheals
from rlheals.publish import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = Path(rlheals.__file__).parent
LIBRARIES = ("torch", "numpy", "scipy", "polars", "transformers")
"""The libraries that numbers pass through; another version of one may round, sample or load otherwise."""
SWITCHES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that choose the instructions of matrix products."""


def sources(roots: Iterable[Path], package: Path = PACKAGE) -> tuple[Path, ...]:
    """The files of the package that these files import, themselves included; sorted.

    Args:
        roots: files below ``package``.
        package: folder of the package.
    """
    found: set[Path] = set()
    queue = list(roots)
    while queue:
        file = queue.pop()
        if file in found:
            continue
        found.add(file)
        for module in _imported(file):
            queue += _files_of(module, package)
    return tuple(sorted(found))


def code_digest(roots: Iterable[Path], package: Path = PACKAGE) -> str:
    """Hex sha256 over names and contents of `sources`."""
    lines = [f"{file.relative_to(package)} {sha256_file(file)}" for file in sources(roots, package)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def code_of(*names: str) -> str:
    """`code_digest` of what lies at these places below the package: files, or folders with all their files."""
    roots = [
        file
        for name in names
        for file in ((PACKAGE / name).glob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / name])
    ]
    return code_digest(roots)


def machine() -> dict[str, str]:
    """Versions of the libraries, the processor, and how many threads share a sum: what rounding depends on."""
    found = {name: _version(name) for name in LIBRARIES}
    found |= {name: value for name in SWITCHES if (value := os.environ.get(name))}
    return found | {"cpu": processor(), "gpu": accelerator(), "threads": str(torch.get_num_threads())}


@cache
def processor() -> str:
    """The processor's name, and the widest vector instructions that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def accelerator() -> str:
    """The first CUDA device's name and the version of CUDA; empty where there is none."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _imported(file: Path) -> list[str]:
    """Dotted names of all that a file imports; of ``from a import b`` both ``a`` and ``a.b``, which may be a module."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _files_of(module: str, package: Path) -> list[Path]:
    """The file of a module of the package, with those of the packages it lies in, which an import runs first."""
    first, *rest = module.split(".")
    if first != package.name:
        return []
    folders = [package.joinpath(*rest[:depth]) for depth in range(len(rest) + 1)]
    candidates = [folder / "__init__.py" for folder in folders]
    candidates += [folders[-1].with_suffix(".py")] if rest else []
    return [file for file in candidates if file.is_file()]
