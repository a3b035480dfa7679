"""Wall time of every stage of a profile, and of `dvc repro` with nothing to do.

Run: python -m bench.bench_pipeline [--profile mini] [--keep DIR]

The tracked files are copied into an empty folder, so no earlier result helps. Seconds of a stage include starting
Python and its imports. Needs a quiet machine: two threads that share a busy core wait for each other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("dataset", "base", "sft", "probe_sft", "report")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--keep", type=Path, help="run in this new folder and leave it there")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    copy_tracked_files(folder)
    run(folder, sys.executable, "-m", "rlheals.profile", arguments.profile)
    names = run(folder, "dvc", "stage", "list", "--name-only").split()
    print(f"| `{arguments.profile}` | seconds |\n|---|---|")
    total = 0.0
    for stage in STAGES:
        seconds = timed(folder, "dvc", "repro", *[name for name in names if name.startswith(f"{stage}@")])
        total += seconds
        print(f"| {stage} | {seconds:.1f} |", flush=True)
    print(f"| all stages | {total:.1f} |")
    idle = min(timed(folder, "dvc", "repro") for _ in range(3))
    print(f"| `dvc repro` with nothing to do, best of 3 | {idle:.1f} |")
    if not arguments.keep:
        shutil.rmtree(folder)


def copy_tracked_files(folder: Path) -> None:
    """Every file git tracks, except results, into a new git repository at ``folder``."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        if name != "dvc.lock" and not name.startswith("reports/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)


def run(folder: Path, *command: str) -> str:
    """Output of a command in ``folder``, run with this interpreter's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(folder: Path, *command: str) -> float:
    """Wall-clock seconds of `run`."""
    begin = time.perf_counter()
    run(folder, *command)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
