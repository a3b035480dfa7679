from __future__ import annotations

import os

from hypothesis import settings

# Tests share the cores with whatever else runs, and two OpenMP threads on busy cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A loaded machine is slow, not wrong; and a failing example must come back on the next run, wherever that is.
settings.register_profile("rlheals", deadline=None, derandomize=True)
settings.load_profile("rlheals")
