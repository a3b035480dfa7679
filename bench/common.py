"""Timing shared by the scripts of this folder."""

from __future__ import annotations

import statistics
import subprocess
import time


def command_seconds(command: list[str], repeats: int = 7) -> tuple[float, float]:
    """Median and best wall-clock seconds of a command over ``repeats`` runs, after one that warms the disk cache.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]), min(times[1:])
