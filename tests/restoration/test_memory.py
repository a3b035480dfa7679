"""Peak memory: an edited folder or a patch fits into the start-up's plus eight times the largest matrix in float32.

For narrower weights too: work is done in float32 and decompositions are float64 whatever the weights are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.restoration.folders import drifted, same_state, write
from tests.spectra.test_memory import ENVIRONMENT, ROOT, size


def limited(tmp_path: Path, allowed: int, dtype: str = "float32", **shape: int) -> subprocess.CompletedProcess[str]:
    for root, sizes in ((tmp_path / "warm", {"layers": 1, "shard_bytes": 2**20}), (tmp_path, shape)):
        write(root / "base", dtype=dtype, **sizes)
        write(root / "tuned", dtype=dtype, **sizes, change=drifted)
    names = [str(tmp_path), str(tmp_path / "warm"), str(allowed)]
    return subprocess.run(
        [sys.executable, "-m", "tests.restoration.memory_child", *names],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed weights leave no holes
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("dtype", "layers"), [("float32", 4), pytest.param("bfloat16", 7, marks=pytest.mark.slow)])
def test_a_folder_larger_than_the_limit_is_edited(tmp_path: Path, dtype: str, layers: int) -> None:
    largest = 4 * 512 * 1024
    done = limited(tmp_path, 8 * largest, dtype, layers=layers, hidden=512, intermediate=1024, shard_bytes=2**24)
    assert done.returncode == 0, done.stderr
    assert size(tmp_path / "tuned") > 8 * largest
    for number in range(5):
        assert same_state(tmp_path / f"out{number}", tmp_path / f"again{number}"), done.stderr
    assert Path(tmp_path / "difference").stat().st_size > 2 * largest


def test_the_limit_is_enforced(tmp_path: Path) -> None:
    """With a fraction of the allowance the same work fails, so the limit above is a real one."""
    done = limited(tmp_path, 4 * 512 * 1024, layers=1, hidden=512, intermediate=1024, shard_bytes=2**24)
    assert done.returncode != 0
