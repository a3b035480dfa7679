"""Seeds that depend on counters only, so that the same place in a run always draws the same random numbers."""

from __future__ import annotations

import hashlib


def counter_seed(*counters: int | str) -> int:
    """A seed in [0, 2^31) that depends on the counters only: sha256 of their texts joined by slashes."""
    digest = hashlib.sha256("/".join(map(str, counters)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**31
