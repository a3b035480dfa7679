"""Diagnosis of a ladder of 8 checkpoints at 5 values of k against the straightforward way, in seconds and ratios.

Run: python -m bench.bench_spectra [--hidden 512] [--layers 2]

The straightforward way loads whole models and calls ``torch.linalg.svd`` in float32, its default, on both matrices for
every question (which checkpoint, matrix and k), then measures the principal angles of the leading singular vectors.
`diagnose` measures the same angles from float64 bases, and everything else it measures but the nulls and the gauge,
which the other way does not have; the angles are checked against each other. Goals: the first run at least 5 times
shorter, the second, from the cache, at least 50 times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import polars as pl
import torch
from safetensors.torch import load_file

from rlheals.spectra.angles import SIDES, columns, principal_angles, resolve_k
from rlheals.spectra.diagnose import Caches, diagnose
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

T = TypeVar("T")

KS = (0.0625, 0.125, 0.25, 0.375, 0.5)
CHECKPOINTS = 8
Answers = dict[tuple[str, str, str, int], float]
"""Mean angle by checkpoint, tensor, side and k."""


def drifted(name: str, tensor: Tensor, step: int) -> Tensor:
    """A checkpoint's tensor: the base's plus noise that grows with the step."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * step + len(name)))
    return tensor if tensor.ndim < 2 else tensor + 2e-4 * step * noise


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def straightforward(base: Path, tuned: list[Path]) -> Answers:
    """Whole models in memory, and both decompositions for every question."""
    found: Answers = {}
    for folder in tuned:
        before, after = load(base), load(folder)
        for name in before:
            if "proj" not in name:
                continue
            for share in KS:
                first, second = (
                    torch.linalg.svd(state[name].float(), full_matrices=False) for state in (before, after)
                )
                k = resolve_k(share, first.S.numel())
                part = columns("top", k, first.S.numel())
                bases = {"left": (first.U, second.U), "right": (first.Vh.mT, second.Vh.mT)}
                for side in SIDES:
                    a, b = bases[side]
                    found[folder.name, name, side, k] = float(
                        principal_angles(a[:, part].double(), b[:, part].double()).mean()
                    )
    return found


def ours(base: Path, tuned: list[Path], cache: Path) -> tuple[Answers, int]:
    """The same angles (and every other measure but the nulls) by `diagnose`, and how many tensors it factorised."""
    caches = Caches(FactorStore(cache / "factors", 2**36), ResultCache(cache))
    settings = DiagnoseSettings(ks=KS, parts=("top",), nulls=0, gauge=False)
    rows = diagnose(base, tuned, settings, caches, function=False).spectra
    means = rows.filter((pl.col("quantity") == "angle_mean") & (pl.col("part") == "top"))
    keys = means.select(pl.col("pair").str.split(" → ").list.last(), "tensor", "side", "k", "value")
    return {
        (pair, tensor, side, k): value for pair, tensor, side, k, value in keys.iter_rows()
    }, caches.factors.factorised


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What ``call`` returns, and its seconds."""
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write = partial(
            write_checkpoint,
            layers=arguments.layers,
            hidden=arguments.hidden,
            intermediate=2 * arguments.hidden,
            seed=0,
            shard_bytes=2**28,
        )
        base = write(root / "base")
        steps = range(1, CHECKPOINTS + 1)
        tuned = [write(root / f"checkpoint-{step}", change=partial(drifted, step=step)) for step in steps]
        (first, factorised), first_seconds = timed(lambda: ours(base, tuned, root / "cache"))
        (_, again), second_seconds = timed(lambda: ours(base, tuned, root / "cache"))
        plain, plain_seconds = timed(lambda: straightforward(base, tuned))
        gap = max(abs(first[key] - plain[key]) for key in plain)
    report = {
        "straightforward_seconds": round(plain_seconds, 2),
        "first_run_seconds": round(first_seconds, 2),
        "second_run_seconds": round(second_seconds, 3),
        "first_run_ratio": round(plain_seconds / first_seconds, 1),
        "second_run_ratio": round(plain_seconds / second_seconds, 1),
        "largest_difference_rad": gap,
        "answers": len(plain),
        "factorised": [factorised, again],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
