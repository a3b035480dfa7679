"""Extracts a text model under a limit on the address space; run by test_extract_text.py in a process of its own.

Usage: python -m tests.models.memory_child ROOT ENOUGH TOO_LITTLE; ROOT holds the folders small and large, then come
two numbers of bytes.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from rlheals.models.extract_text import extract_text
from tests.spectra.memory_child import address_space


def limit(allowed: int) -> None:
    """Leave ``allowed`` bytes of address space beyond those in use."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + allowed, resource.RLIM_INFINITY))


def main() -> None:
    root, enough, too_little = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    # Libraries, thread pools and arenas are part of the baseline.
    extract_text(root / "small", root / "small-text", shard_bytes=2**16)
    limit(enough)
    extract_text(root / "large", root / "large-text", shard_bytes=2**24)
    print("extracted")
    limit(too_little)
    try:
        extract_text(root / "large", root / "again", shard_bytes=2**24)
    except (MemoryError, RuntimeError) as error:  # torch tells its allocator's failure as the latter
        print("refused" if "memory" in f"{error!r}".lower() else error)


if __name__ == "__main__":
    main()
