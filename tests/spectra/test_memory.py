"""Peak memory: a diagnosis fits into its start-up's address space plus eight times its largest matrix in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[2]
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# The C library gives memory above 32 MiB a block back at once, and below it learns not to; here the matrices are small,
# so it is told to treat them as it treats those of a large model. MKL keeps what it packs matrices into, whose size
# depends on the processor and not on the model, unless it is told not to.
ENVIRONMENT = {
    **THREADS,
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MKL_DISABLE_FAST_MM": "1",
}


DOWN, QUERY = "model.layers.3.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"


def moved(name: str, tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim < 2 else tensor * 1.01


def limited(
    tmp_path: Path, largest: int, modules: str, layers: str, tensors: int = 8
) -> subprocess.CompletedProcess[str]:
    """Run the diagnosis of ``base`` and ``tuned`` in a process with that much address space beyond its start-up."""
    shape = {"layers": 1, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 2**20}
    warm = [write_checkpoint(tmp_path / name, **shape) for name in ("warm",)]
    warm.append(write_checkpoint(tmp_path / "warm-tuned", **shape, change=moved))
    names = [tmp_path / "base", tmp_path / "tuned", tmp_path / "cache", *warm]
    return subprocess.run(
        [sys.executable, "-m", "tests.spectra.memory_child", *map(str, names), str(tensors * largest), modules, layers],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def two_move(name: str, tensor: Tensor) -> Tensor:
    """One wide and one square matrix change, in two blocks, so that the gauge of both is measured too."""
    return moved(name, tensor) if name in (DOWN, QUERY) else tensor


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_limit_is_diagnosed(tmp_path: Path) -> None:
    """A quarter of a gibibyte: all of it is read and hashed, two matrices and their blocks are analysed."""
    shape = {"layers": 6, "hidden": 1024, "intermediate": 2816, "seed": 0, "shard_bytes": 2**26}
    base = write_checkpoint(tmp_path / "base", **shape)
    write_checkpoint(tmp_path / "tuned", **shape, change=two_move)
    largest = 1024 * 2816 * 4
    assert size(base) > 2**28 > 2 * 8 * largest
    done = limited(tmp_path, largest, "", "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "3"], "four tensors factorised, three blocks of the gauge of a layer"


def test_the_limit_is_enforced(tmp_path: Path) -> None:
    """With a fraction of the allowance the same diagnosis fails, so the limit above is a real one."""
    shape = {"layers": 4, "hidden": 512, "intermediate": 1024, "seed": 0, "shard_bytes": 2**26}
    write_checkpoint(tmp_path / "base", **shape)
    write_checkpoint(tmp_path / "tuned", **shape, change=two_move)
    done = limited(tmp_path, 1024 * 512 * 4, "down_proj", "3", tensors=1)
    assert done.returncode != 0
    assert "memory" in done.stderr.lower()


@pytest.mark.slow
def test_four_gibibytes_are_streamed(tmp_path: Path) -> None:
    """Every tensor is hashed; a few change and are analysed, the rest is unchanged."""
    shape = {"layers": 18, "hidden": 2048, "intermediate": 8192, "seed": 0, "shard_bytes": 2**29, "dtype": "float32"}

    def one(name: str, tensor: Tensor) -> Tensor:
        return tensor * 1.01 if name == "model.layers.5.mlp.down_proj.weight" else tensor

    base = write_checkpoint(tmp_path / "base", **shape)
    write_checkpoint(tmp_path / "tuned", **shape, change=one)
    assert size(base) >= 4 * 2**30
    done = limited(tmp_path, 2048 * 8192 * 4, "", "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "3"]
