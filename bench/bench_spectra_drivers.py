"""Every driver of `rlheals.spectra` against `torch.linalg.svd`'s default, by shape: seconds, ratios, errors, memory.

Run: python -m bench.bench_spectra_drivers [--large] [--device cuda] [--threads 2]

Two baselines stand in each table: torch's default on the float32 matrix, and the same on the float64 matrix, which is
the one that gives bases of the quality that angles need. All drivers give that quality, so ``over_torch64`` compares
like with like; ``over_torch32`` is what the quality costs against the plain call. Runs alternate, the best of
``--repeats`` counts, and ratios are within one run. On a CPU, seconds are processor time of all threads, which other
work on the machine disturbs less; set OMP_NUM_THREADS, too, because SciPy's LAPACK does not follow ``--threads``.
``extra`` is the peak memory beyond the matrix, in units of its float32 size, measured in a fresh process on a 2048 ×
2048 and a 4096 × 1024 matrix (``--no-memory`` leaves it out). The table in `rlheals/spectra/drivers.py` is what this
printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from rlheals.spectra.drivers import DRIVERS, choose, decompose
from rlheals.spectra.factorise import factorise
from rlheals.spectra.refine import reconstruction_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlheals.spectra.drivers import Driver
    from rlheals.spectra.refine import Triples

SHAPES = [(256, 256), (1024, 1024), (2048, 2048), (4096, 1024), (6144, 1024), (8192, 1024), (1024, 4096)]
LARGE = [(4096, 4096), (16384, 2048)]
SLOW = {"gesvd": 512}  # largest rank at which the driver is timed: QR iteration takes 25 times as long as the others
MEMORY_SHAPES = [(2048, 2048), (4096, 1024)]


@dataclass
class Row:
    """One driver on one shape."""

    name: str
    seconds: float
    orthonormality: float | None
    reconstruction: float | None


def best_seconds(actions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Best seconds of each action over alternating runs, after one warm run each; on a CPU those of its threads."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    best = dict.fromkeys(actions, float("inf"))
    for turn in range(repeats + 1):
        for name, action in actions.items():
            begin = clock()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn or repeats == 0:
                best[name] = min(best[name], clock() - begin)
    return best


def measure(rows: int, columns: int, device: str, repeats: int, only: list[str] | None = None) -> list[Row]:
    """All drivers, or those in ``only``, and both baselines on one Gaussian matrix."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    fitting = [
        driver
        for driver in DRIVERS.values()
        if driver.name in (only or DRIVERS)
        and device in driver.devices
        and min(rows, columns) <= SLOW.get(driver.name, 1 << 30)
    ]
    actions: dict[str, Callable[[], object]] = {
        "torch float32": lambda: torch.linalg.svd(matrix, full_matrices=False),
        "torch float64": lambda: torch.linalg.svd(matrix.double(), full_matrices=False),
    }
    found: dict[str, Triples] = {}

    def run(driver: Driver) -> None:
        found[driver.name] = decompose(matrix, driver)

    actions |= {driver.name: partial(run, driver) for driver in fitting}
    actions["factorise (auto)"] = lambda: factorise(matrix, device=device)
    seconds = best_seconds(actions, repeats, device)
    errors = {name: (each.orthonormality, reconstruction_error(matrix, each)) for name, each in found.items()}
    return [Row(name, taken, *errors.get(name, (None, None))) for name, taken in seconds.items()]


def extra_memory(rows: int, columns: int, driver: str) -> float:
    """Peak resident memory of `factorise` beyond the matrix, in float32 sizes of it, in a fresh process."""
    command = [sys.executable, "-m", "bench.bench_spectra_drivers", "--peak", driver, str(rows), str(columns)]
    root = Path(__file__).resolve().parent.parent
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def print_peak(driver: str, rows: int, columns: int) -> None:
    """In the fresh process: print the peak of one factorisation; Linux only."""
    factorise(torch.randn(300, 300), driver)  # loads LAPACK and its buffers
    matrix = torch.randn(rows, columns)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    factorise(matrix, driver)
    print((_status("VmHWM") - before) / (matrix.numel() * 4))


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def shape_table(rows: int, columns: int, found: list[Row], device: str) -> Table:
    """One shape's rows, fastest driver marked."""
    seconds = {row.name: row.seconds for row in found}
    fastest = min((row for row in found if row.name in DRIVERS), key=lambda row: row.seconds).name
    chosen = choose(rows, columns, device)
    table = Table(title=f"{rows} × {columns} on {device}: fastest {fastest}, the table says {chosen}")
    for column in ("driver", "seconds", "over_torch32", "over_torch64", "orthonormality", "reconstruction"):
        table.add_column(column, justify="left" if column == "driver" else "right")
    for row in found:
        table.add_row(
            row.name,
            f"{row.seconds:.3f}",
            f"{seconds['torch float32'] / row.seconds:.2f}",
            f"{seconds['torch float64'] / row.seconds:.2f}",
            "" if row.orthonormality is None else f"{row.orthonormality:.0e}",
            "" if row.reconstruction is None else f"{row.reconstruction:.0e}",
        )
    return table


def memory_table() -> Table:
    """Peak memory of each CPU driver on two shapes."""
    table = Table(title="extra: peak memory of factorise beyond the matrix, in its float32 size")
    table.add_column("driver")
    for rows, columns in MEMORY_SHAPES:
        table.add_column(f"{rows} × {columns}", justify="right")
    for name, driver in DRIVERS.items():
        if "cpu" in driver.devices and name not in SLOW:
            table.add_row(name, *(f"{extra_memory(rows, columns, name):.1f}" for rows, columns in MEMORY_SHAPES))
    return table


def main() -> None:
    """Print one table a shape, and the memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true", help="4096 × 4096 and 16384 × 2048, too; some minutes more")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", help="for example 1024x1024 4096x1024, instead of the standard ones")
    parser.add_argument("--drivers", nargs="*", help="only these, beside the baselines")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(arguments.peak[0], int(arguments.peak[1]), int(arguments.peak[2]))
        return
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.shapes or []] or SHAPES
    console = Console(width=120)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for rows, columns in shapes + (LARGE if arguments.large else []):
        repeats = 0 if min(rows, columns) >= 4096 else arguments.repeats
        found = measure(rows, columns, arguments.device, repeats, arguments.drivers)
        console.print(shape_table(rows, columns, found, arguments.device))
    if not arguments.no_memory and arguments.device == "cpu":
        console.print(memory_table())


if __name__ == "__main__":
    main()
