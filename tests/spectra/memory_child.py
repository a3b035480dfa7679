"""Diagnoses two folders under a limit on the address space; run by test_memory.py in a process of its own.

Usage: python -m tests.spectra.memory_child BASE TUNED CACHE WARM_BASE WARM_TUNED BYTES MODULES LAYERS
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from rlheals.spectra.diagnose import Caches, diagnose
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore


def run(base: str, tuned: str, cache: Path, modules: str, layers: str) -> tuple[int, int]:
    caches = Caches(FactorStore(cache / "factors", 2**33), ResultCache(cache))
    settings = DiagnoseSettings(
        modules=tuple(modules.split(",")) if modules else None,
        layers=tuple(map(int, layers.split(","))) if layers else None,
        nulls=2,
    )
    found = diagnose(Path(base), [Path(tuned)], settings, caches, function=False)
    return caches.factors.factorised, found.gauge["block"].n_unique()


def address_space() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    base, tuned, cache, warm_base, warm_tuned, allowed, modules, layers = sys.argv[1:]
    torch.set_num_threads(1)
    # Libraries, thread pools and arenas are part of the baseline.
    run(warm_base, warm_tuned, Path(cache) / "warm", "", "")
    baseline = address_space()
    limit = baseline + int(allowed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answer = run(base, tuned, Path(cache), modules, layers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = f"baseline {baseline >> 20} MiB, allowed {int(allowed) >> 20} MiB, peak {peak >> 10} MiB RSS"
    print(told, file=sys.stderr)
    print(*answer)


if __name__ == "__main__":
    main()
