"""Edits, patches and rebuilds a folder under a limit on the address space; run by test_memory.py in its own process.

Usage: python -m tests.restoration.memory_child ROOT WARM_ROOT BYTES; each root holds the folders base and tuned.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from rlheals import cli
from tests.spectra.memory_child import address_space


def run(root: Path) -> None:
    base, tuned = str(root / "base"), str(root / "tuned")
    cache = ["--cache", str(root / "cache"), "--device", "cpu"]
    edits = (
        ["--operator", "interpolate", "--dose", "0.5"],
        ["--window", "head:0.2"],
        ["--window", "head:4"],
        ["--operator", "rotate", "--window", "head:0.5", "--dose", "0.5"],
        ["--operator", "noise"],
    )
    for number, edit in enumerate(edits):
        out, patch = str(root / f"out{number}"), str(root / f"patch{number}")
        call("restore", base, tuned, *edit, "--modules", "down_proj", "--out", out, "--patch", patch, *cache)
        call("patch", "apply", patch, tuned, "--out", str(root / f"again{number}"))
        call("patch", "invert", patch, "--out", f"{patch}-back")
        call("patch", "compose", patch, f"{patch}-back", "--out", f"{patch}-none")
    call("patch", "make", base, tuned, "--out", str(root / "difference"))


def call(*arguments: str) -> None:
    with suppress(SystemExit):
        cli.app(list(arguments), prog_name="rlheals")


def main() -> None:
    root, warm, allowed = sys.argv[1:]
    torch.set_num_threads(1)
    # Libraries, thread pools and arenas are part of the baseline.
    run(Path(warm))
    baseline = address_space()
    limit = baseline + int(allowed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run(Path(root))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = f"baseline {baseline >> 20} MiB, allowed {int(allowed) >> 20} MiB, peak {peak >> 10} MiB RSS"
    print(told, file=sys.stderr)


if __name__ == "__main__":
    main()
