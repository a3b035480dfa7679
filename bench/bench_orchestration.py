"""Serial `dvc repro` against `python -m flows.reproduce`, and what the driver costs by itself.

Run: python -m bench.bench_orchestration [--real]

Without an option a small graph is measured: one stage, four CPU-bound ones that depend on it, one that collects them.
With --real, the stages of the `smoke` profile for three seeds. Both run on the same machine one after the other, so
only their ratio means anything. The bound is what two places could reach at best: the longer of half of all seconds of
the commands and the longest path, with the seconds of the parallel run. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import flows  # noqa: F401  (sets Prefect's environment before prefect is imported)
from bench.bench_pipeline import ROOT, copy_tracked_files, run, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEEDS = [0, 1, 2]
PIPELINE = """
stages:
  data:
    cmd: python -S burn.py 1 out/data
    deps: [burn.py]
    outs: [out/data]
  branch:
    matrix:
      step: ${steps}
    cmd: python -S burn.py ${units} out/branch/${item.step}
    deps: [burn.py, out/data]
    params: [units]
    outs:
      - out/branch/${item.step}
  report:
    cmd: python -S burn.py 1 out/report
    deps: [burn.py, out/branch]
    outs: [out/report]
"""
BURN = """
import pathlib, sys
total = 0
for number in range(int(float(sys.argv[1]) * 12_000_000)):
    total += number & 7
out = pathlib.Path(sys.argv[2])
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(str(total))
"""


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--real", action="store_true", help="the stages of the smoke profile, three seeds")
    real = parser.parse_args().real
    home = Path(tempfile.mkdtemp())
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PYTHONPATH"] = str(ROOT)
    if real:
        compare(home, "smoke, 3 seeds", real_workspace)
    else:
        compare(home, "fan-out 4", small_workspace)
        overhead(home)
        no_op(home)
    shutil.rmtree(home)


def compare(home: Path, name: str, make: Callable[[Path], None]) -> None:
    """Serial against parallel, and the bound."""
    with workspace(make) as folder:
        serial = timed(folder, "dvc", "repro")
    with workspace(make) as folder:
        parallel, _ = drive(folder, "-j", "2")
    with server(home), workspace(make) as folder:
        served, stages = drive(folder, "-j", "2")
        edges = graph(folder)
    bound = max(sum(stages.values()) / 2, longest_path(stages, edges))
    print(f"| {name} | seconds | of serial |\n|---|---|---|")
    rows = {
        "`dvc repro`": serial,
        "`flows.reproduce -j 2`, temporary server": parallel,
        "`flows.reproduce -j 2`, running server": served,
        "bound for two at a time": bound,
    }
    for label, seconds in rows.items():
        print(f"| {label} | {seconds:.1f} | {seconds / serial:.2f} |", flush=True)
    print()


def overhead(home: Path) -> None:
    """What the driver adds to the seconds of its commands, one at a time."""

    def small(folder: Path) -> None:
        small_workspace(folder, units=2)

    with workspace(small) as folder:
        alone, stages = drive(folder, "-j", "1")
    with server(home), workspace(small) as folder:
        served, served_stages = drive(folder, "-j", "1")
    print("| six stages, one at a time: seconds beyond those of the commands | |\n|---|---|")
    print(f"| temporary server | {alone - sum(stages.values()):.1f} |")
    print(f"| running server | {served - sum(served_stages.values()):.1f} |\n", flush=True)


def no_op(home: Path) -> None:
    """A run of 30 stages that are all up to date, with a running server."""
    with workspace(lambda folder: small_workspace(folder, items=28, units=0.01)) as folder:
        run(folder, "dvc", "repro")
        with server(home):
            flow = min(drive(folder)[0] for _ in range(3))
        repro = min(timed(folder, "dvc", "repro") for _ in range(3))
    print("| 30 stages, nothing to do, best of 3 | seconds |\n|---|---|")
    print(f"| `dvc repro` | {repro:.1f} |\n| `flows.reproduce`, running server | {flow:.1f} |")


@contextmanager
def workspace(make: Callable[[Path], None]) -> Iterator[Path]:
    """An empty folder with a pipeline in it, removed afterwards."""
    folder = Path(tempfile.mkdtemp())
    make(folder)
    yield folder
    shutil.rmtree(folder)


def small_workspace(folder: Path, items: int = 4, units: float = 60) -> None:
    """The fan-out graph; a unit is about 0.6 s."""
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "burn.py").write_text(BURN)
    (folder / "params.yaml").write_text(f"steps: {list(range(items))}\nunits: {units}\n")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")


def real_workspace(folder: Path) -> None:
    """The project with the smoke profile for three seeds."""
    copy_tracked_files(folder)
    run(folder, sys.executable, "-m", "rlheals.profile", "smoke", f"seeds={SEEDS}")


@contextmanager
def server(home: Path) -> Iterator[None]:
    """A Prefect server that runs already."""
    from flows.server import temporary_server

    with temporary_server(home / "server.log") as url:
        os.environ["PREFECT_API_URL"] = url
        yield
        del os.environ["PREFECT_API_URL"]


def drive(folder: Path, *options: str) -> tuple[float, dict[str, float]]:
    """Wall seconds of the driver, and those of the command of every stage it ran."""
    seconds = timed(folder, sys.executable, "-m", "flows.reproduce", *options)
    newest = max((folder / "scratch" / "runs").glob("*/verdicts.json"))
    return seconds, {row["name"]: row["command_seconds"] for row in json.loads(newest.read_text())}


def graph(folder: Path) -> dict[str, tuple[str, ...]]:
    """Upstream of every stage."""
    from rlheals.orchestration.pipeline import Pipeline

    pipeline = Pipeline(folder)
    nodes = pipeline.plan()
    pipeline.close()
    return {node.name: node.upstream for node in nodes}


def longest_path(seconds: dict[str, float], upstream: dict[str, tuple[str, ...]]) -> float:
    """Seconds of the longest chain; the stages come after what they wait for."""
    ends: dict[str, float] = {}
    for name, before in upstream.items():
        ends[name] = seconds[name] + max((ends[other] for other in before), default=0.0)
    return max(ends.values())


if __name__ == "__main__":
    main()
