"""How long a diagnosis will take: rates measured here in seconds, times the work that the shapes of a model mean.

The work of a thin decomposition of an (m, n) matrix is taken as ``m · n · min(m, n)``, which is right up to a constant
that depends on the ratio m : n and on the machine; that constant is what `calibrate` measures, on a matrix of every
ratio class at a size that takes a moment. Larger matrices use a processor better, so for them the estimate is on the
high side; for matrices of a few hundred rows the overhead of each call, which is not in it, doubles the time.
A GPU that is not here cannot be measured: its row is a formula over data-sheet numbers and says so.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

Shape = tuple[int, int]
T = TypeVar("T")
SQUARE, TALL = "square", "tall"
CALIBRATION: dict[str, Shape] = {SQUARE: (768, 768), TALL: (1536, 384)}
GIB = 2**30
WORD = 8  # bytes of a float64

# An 80 GB accelerator, from NVIDIA's A100 data sheet: memory bandwidth and float64 matrix rate.
GPU_BANDWIDTH = 2.0e12
GPU_FLOPS = 19.5e12
GPU_SHARE = 0.2
"""Share of either limit that a dense eigensolver is taken to reach; an assumption, not a measurement."""
GPU_SOURCE = (
    "not measured: work over 20 % (assumed) of the limits in the A100 80 GB data sheet, 2.0 TB/s and 19.5 TFLOP/s"
)


@dataclass(frozen=True)
class Rates:
    """What one device does, in seconds a unit of work ``m · n · min(m, n)``, by ratio class.

    Attributes:
        device: in words.
        factorise: a decomposition with both bases in float64.
        measure: every measure of one pair, without its nulls.
        null: one null draw.
        digest: bytes hashed a second.
        source: how the numbers came about.
    """

    device: str
    factorise: Mapping[str, float]
    measure: Mapping[str, float]
    null: Mapping[str, float]
    digest: float
    source: str


@dataclass(frozen=True)
class Workload:
    """The analysed matrices of a model: how many of each shape, and how large the model is on disk."""

    name: str
    shapes: Mapping[Shape, int]
    bytes_on_disk: int


@dataclass(frozen=True)
class Estimate:
    """Expected cost of diagnosing ``checkpoints`` tuned models against one base; seconds unless said otherwise."""

    model: str
    device: str
    matrices: int
    checkpoints: int
    factorise: float
    measure: float
    nulls: float
    read: float
    disk_gib: float
    source: str

    @property
    def first_run(self) -> float:
        """Seconds of a run that finds nothing in the cache."""
        return self.factorise + self.measure + self.nulls + self.read

    @property
    def second_run(self) -> float:
        """Seconds of the same run again: only the bytes are read and hashed."""
        return self.read


def llama_shapes(hidden: int, keys: int, intermediate: int, layers: int) -> dict[Shape, int]:
    """The seven matrices of every block, (out, in): queries and output, keys and values, gate and up, down."""
    shapes: dict[Shape, int] = {}
    block: dict[Shape, int] = {(hidden, hidden): 2, (intermediate, hidden): 2, (hidden, intermediate): 1}
    for shape, count in [*block.items(), ((keys, hidden), 2)]:
        shapes[shape] = shapes.get(shape, 0) + count * layers
    return shapes


KNOWN = (
    # Sizes from the config.json that each model is published with; bytes are those of its bfloat16 text weights.
    Workload("Qwen2.5-7B-Instruct", llama_shapes(3584, 512, 18944, 28), 15_231_233_024),
    Workload("Llama-3.2-11B-Vision-Instruct", llama_shapes(4096, 1024, 14336, 40), 19_550_000_000),
)
"""The two models of the paper, of the second its text model, whose cross-attention blocks have the others' shapes."""


def workload_of(
    path: Path, modules: Sequence[str] | None = None, layers: Sequence[int] | None = None, *, embeddings: bool = False
) -> Workload:
    """The work that the model in folder ``path`` means, from the headers of its files.

    Raises:
        UserError: the folder is unreadable, or nothing is selected.
    """
    from rlheals.models.topology import select
    from rlheals.spectra.reader import Weights

    with Weights(path) as weights:
        matrices = select(weights.topology, modules, layers, embeddings=embeddings)
        shapes = Counter((weights.shapes[each.name][0], weights.shapes[each.name][1]) for each in matrices)
        return Workload(path.resolve().name, shapes, weights.weight_bytes)


def work(shape: Shape) -> float:
    """``m · n · min(m, n)``."""
    return float(shape[0]) * shape[1] * min(shape)


def ratio_class(shape: Shape) -> str:
    """``tall`` from 2 : 1 on, either way round; else ``square``."""
    return TALL if max(shape) >= 2 * min(shape) else SQUARE


def estimate(workload: Workload, rates: Rates, checkpoints: int, nulls: int) -> Estimate:
    """Expected cost of diagnosing ``checkpoints`` models against one base with ``nulls`` draws a matrix."""

    def total(rate: Mapping[str, float], times: int) -> float:
        return times * sum(count * work(shape) * rate[ratio_class(shape)] for shape, count in workload.shapes.items())

    stored = sum(count * (sum(shape) + 1) * min(shape) * WORD for shape, count in workload.shapes.items())
    return Estimate(
        model=workload.name,
        device=rates.device,
        matrices=sum(workload.shapes.values()),
        checkpoints=checkpoints,
        factorise=total(rates.factorise, checkpoints + 1),
        measure=total(rates.measure, checkpoints),
        nulls=total(rates.null, checkpoints * nulls),
        # Read to be hashed, and once more to be decomposed.
        read=workload.bytes_on_disk * (checkpoints + 1) / rates.digest,
        disk_gib=stored * (checkpoints + 1) / GIB,
        source=rates.source,
    )


def gpu_rates(digest: float) -> Rates:
    """Rates of one 80 GB GPU by formula; ``digest`` is this machine's.

    Of the 4/3 · n³ operations that reduce a symmetric (n, n) matrix to tridiagonal form half are matrix-vector
    products, bound by memory (Golub and Van Loan, Matrix Computations, 8.3); forming the Gram matrix, the
    back-transformation and
    the refinement are matrix products, about 12 · m · n · min(m, n) operations in all.
    """
    a_unit = (WORD / 3 / GPU_BANDWIDTH + 12 / GPU_FLOPS) / GPU_SHARE
    products = 16 / GPU_FLOPS / GPU_SHARE
    both = (SQUARE, TALL)
    return Rates(
        "one 80 GB GPU",
        dict.fromkeys(both, a_unit),
        dict.fromkeys(both, products),
        dict.fromkeys(both, a_unit),
        digest,
        GPU_SOURCE,
    )


def calibrate(device: str = "cpu") -> Rates:
    """Measure the rates of this machine; a few seconds."""
    import torch

    generator = torch.Generator().manual_seed(0)
    factorise, measure, null = {}, {}, {}
    for name, shape in CALIBRATION.items():
        matrix = torch.randn(shape, generator=generator)
        seconds = _time_one(matrix, device)
        factorise[name], measure[name], null[name] = (each / work(shape) for each in seconds)
    cores = torch.get_num_threads()
    words = f"{cores} CPU core{'s' if cores > 1 else ''}" if device == "cpu" else torch.cuda.get_device_name()
    return Rates(words, factorise, measure, null, _digest_rate(), "measured here just now")


def _time_one(matrix: Tensor, device: str) -> tuple[float, float, float]:
    """Seconds of one decomposition, of one pair's measures and of one null draw."""
    import torch

    from rlheals.spectra.drift import MeasureSettings, measure
    from rlheals.spectra.factorise import factorise
    from rlheals.spectra.factors import MemoryFactors
    from rlheals.spectra.nulls import same_norm_bands

    other = matrix + 0.01 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    settings = MeasureSettings(ks=(0.125, 0.25, 0.5))
    factorise(matrix[:64, :64], device=device)  # the first call of a library sets it up
    base, seconds = _timed(lambda: MemoryFactors(factorise(matrix, device=device)))
    tuned = MemoryFactors(factorise(other, device=device))
    change = other - matrix
    _, measured = _timed(lambda: measure(base, tuned, change, settings))
    norm = float(change.norm())
    _, drawn = _timed(lambda: same_norm_bands(base, norm, settings, 2, 0))
    return seconds, measured, drawn / 2


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def _digest_rate(size: int = 2**25) -> float:
    content = bytes(size)
    _, seconds = _timed(lambda: hashlib.sha256(content).digest())
    return size / seconds


def plan(workloads: Sequence[Workload], checkpoints: int, nulls: int, device: str = "cpu") -> list[Estimate]:
    """Every workload on this machine and on one GPU."""
    here = calibrate(device)
    devices = [here] if device != "cpu" else [here, gpu_rates(here.digest)]
    return [estimate(workload, rates, checkpoints, nulls) for workload in workloads for rates in devices]
