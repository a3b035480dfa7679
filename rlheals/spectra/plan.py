"""How long a diagnosis will take: rates measured here in processor time, times the work that a model's shapes mean.

The work of a thin decomposition of an (m, n) matrix is taken as ``m · n · min(m, n)``, which is right up to a constant
that depends on the ratio m : n and on the machine; that constant is what `calibrate` measures, on a matrix of every
ratio class at a size that takes a moment. Larger matrices use a processor better, so for them the estimate is on the
high side; for matrices of a few hundred rows the overhead of each call, which is not in it, doubles the time. Gauge
grows with the weights of the layers; function drift is measured in `rlheals.spectra.plan_function`.

Processor time is that of all threads together, and does not grow when other programs use the machine; how much longer
the clock said it took is kept beside it. A GPU that is not here cannot be measured: its row is a formula over
data-sheet numbers and says so.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlheals.spectra.settings import FUNCTION_NULLS, GAUGE_NULLS
from rlheals.spectra.timing import timed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from rlheals.spectra.plan_function import FunctionCost

Shape = tuple[int, int]
SQUARE, TALL = "square", "tall"
CALIBRATION: dict[str, Shape] = {SQUARE: (768, 768), TALL: (1536, 384)}
GAUGE_LAYER = (512, 1024, 8, 4)
"""Width, MLP width, heads and key-value heads of the layer on which gauge is timed."""
FEW_NULLS = 2
"""The fewest draws that give a band; what they would cost is told beside the draws asked for."""
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
        gauge: one gauge measure (a draw is another), in seconds a weight of a layer.
        digest: bytes hashed a second.
        source: how the numbers came about.
        busy: seconds of the clock over those of the processor while the rates were measured, with one thread's work;
            above 1 when other programs used the machine.
        on_cpu: whether decompositions are made on a CPU.
    """

    device: str
    factorise: Mapping[str, float]
    measure: Mapping[str, float]
    null: Mapping[str, float]
    gauge: float
    digest: float
    source: str
    busy: float = 1.0
    on_cpu: bool = True


@dataclass(frozen=True)
class Workload:
    """The analysed matrices of a model: how many of each shape, and how large the model is on disk.

    Attributes:
        name: of the model.
        shapes: of the analysed matrices, and how many of each.
        bytes_on_disk: of all weights.
        gauge_weights: numbers in the layers whose gauge is measured; 0 for none.
        function: cost of function drift; None where it is not measured, or not known.
    """

    name: str
    shapes: Mapping[Shape, int]
    bytes_on_disk: int
    gauge_weights: int = 0
    function: FunctionCost | None = None


@dataclass(frozen=True)
class Estimate:
    """Expected cost of diagnosing ``checkpoints`` tuned models against one base; seconds unless said otherwise.

    Attributes:
        model: its name.
        device: in words.
        matrices: how many are analysed.
        checkpoints: tuned models.
        draws: null draws asked for.
        factorise: decompositions.
        measure: measures of the real change.
        null: one null draw of every matrix.
        gauge: gauge without draws; each draw is as much again.
        function: function drift without draws; None where it is left out.
        function_draw: one noise model.
        read: reading and hashing.
        disk_gib: GiB of decompositions on disk.
        source: how the numbers came about.
        start_up: of the program, libraries included.
    """

    model: str
    device: str
    matrices: int
    checkpoints: int
    draws: int
    factorise: float
    measure: float
    null: float
    gauge: float
    function: float | None
    function_draw: float
    read: float
    disk_gib: float
    source: str
    start_up: float = 0.0

    def first_run(self, draws: int | None = None) -> float:
        """Seconds of a run that finds nothing in the cache, with as many null draws as asked for or as given."""
        return self.factorise + self.measure + self.second_run + self.nulls(draws) + self.others(draws)

    def nulls(self, draws: int | None = None) -> float:
        """Seconds of the null draws of the matrices."""
        return self.null * (self.draws if draws is None else draws)

    def others(self, draws: int | None = None) -> float:
        """Seconds of gauge and function drift with their draws, of which they take fewer."""
        count = self.draws if draws is None else draws
        gauged, modelled = min(count, GAUGE_NULLS), min(count, FUNCTION_NULLS)
        gauge = self.gauge * (1 + (gauged if gauged > 1 else 0))
        return gauge + (self.function or 0.0) + self.function_draw * (modelled if modelled > 1 else 0)

    @property
    def second_run(self) -> float:
        """Seconds of the same run again: the bytes are read and hashed, nothing else."""
        return self.start_up + self.read


@dataclass(frozen=True)
class Forecast:
    """What a run would cost.

    Attributes:
        estimates: of the model asked for first, on this machine and elsewhere.
        busy: seconds of the clock over those of the processor while it was measured.
        left_out: what the estimates do not hold, as a noun; empty for nothing.
    """

    estimates: tuple[Estimate, ...]
    busy: float
    left_out: str = ""


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
    path: Path,
    modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    *,
    embeddings: bool = False,
    gauge: bool = False,
) -> Workload:
    """The work that the model in folder ``path`` means, from the headers of its files; function drift left out.

    Raises:
        UserError: the folder is unreadable, or nothing is selected.
    """
    from rlheals.models.topology import select
    from rlheals.spectra.gauge_question import whole_layers
    from rlheals.spectra.reader import Weights

    with Weights(path) as weights:
        matrices = select(weights.topology, modules, layers, embeddings=embeddings)
        shapes = Counter((weights.shapes[each.name][0], weights.shapes[each.name][1]) for each in matrices)
        blocks = [each for _, parts in whole_layers(matrices) for each in parts] if gauge else []
        gauged = sum(math.prod(weights.shapes[each.name]) for each in blocks)
        return Workload(path.resolve().name, shapes, weights.weight_bytes, gauged)


def work(shape: Shape) -> float:
    """``m · n · min(m, n)``."""
    return float(shape[0]) * shape[1] * min(shape)


def ratio_class(shape: Shape) -> str:
    """``tall`` from 2 : 1 on, either way round; else ``square``."""
    return TALL if max(shape) >= 2 * min(shape) else SQUARE


def estimate(workload: Workload, rates: Rates, checkpoints: int, draws: int) -> Estimate:
    """Expected cost of diagnosing ``checkpoints`` models against one base with so many null draws a matrix."""

    def total(rate: Mapping[str, float], times: int) -> float:
        return times * sum(count * work(shape) * rate[ratio_class(shape)] for shape, count in workload.shapes.items())

    stored = sum(count * (sum(shape) + 1) * min(shape) * WORD for shape, count in workload.shapes.items())
    function = workload.function
    return Estimate(
        model=workload.name,
        device=rates.device,
        matrices=sum(workload.shapes.values()),
        checkpoints=checkpoints,
        draws=draws,
        factorise=total(rates.factorise, checkpoints + 1),
        measure=total(rates.measure, checkpoints),
        null=total(rates.null, checkpoints),
        gauge=checkpoints * workload.gauge_weights * rates.gauge,
        function=None if function is None else function.texts + checkpoints * function.compare,
        function_draw=0.0 if function is None else checkpoints * function.draw,
        # Read to be hashed, and once more to be decomposed.
        read=workload.bytes_on_disk * (checkpoints + 1) / rates.digest,
        disk_gib=stored * (checkpoints + 1) / GIB,
        source=rates.source,
    )


def gpu_rates(here: Rates) -> Rates:
    """Rates of one 80 GB GPU by formula; hashing and gauge, which a CPU does in any case, are this machine's.

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
        here.gauge,
        here.digest,
        GPU_SOURCE,
    )


def calibrate(device: str = "cpu") -> Rates:
    """Measure the rates of this machine; a few seconds."""
    import torch

    generator = torch.Generator().manual_seed(0)
    factorise, measure, null = {}, {}, {}
    begin = time.perf_counter(), time.process_time()
    for name, shape in CALIBRATION.items():
        matrix = torch.randn(shape, generator=generator)
        seconds = _time_one(matrix, device)
        factorise[name], measure[name], null[name] = (each / work(shape) for each in seconds)
    rates = _gauge_rate(), _digest_rate()
    clock, processor = time.perf_counter() - begin[0], time.process_time() - begin[1]
    cores = torch.get_num_threads()
    if device != "cpu":
        name, said = torch.cuda.get_device_name(), "measured here just now, by the clock"
        return Rates(name, factorise, measure, null, *rates, said, on_cpu=False)
    words = f"{cores} CPU thread{'s' if cores > 1 else ''}"
    source = "measured here just now, in processor time of all threads together"
    return Rates(words, factorise, measure, null, *rates, source, max(1.0, clock / processor))


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
    base, seconds = timed(lambda: MemoryFactors(factorise(matrix, device=device)), device)
    tuned = MemoryFactors(factorise(other, device=device))
    change = other - matrix
    _, measured = timed(lambda: measure(base, tuned, change, settings), device)
    norm = float(change.norm())
    _, drawn = timed(lambda: same_norm_bands(base, norm, settings, 2, 0), device)
    return seconds, measured, drawn / 2


def _gauge_rate() -> float:
    """Seconds of one gauge measure, a weight of the layer."""
    import torch

    from rlheals.models.topology import read_topology
    from rlheals.spectra.gauge import gauge_drift

    width, inner, heads, kv_heads = GAUGE_LAYER
    keys = width // heads * kv_heads
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": width, "intermediate_size": inner}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    attention = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    names = {f"model.layers.0.self_attn.{name}.weight": shape for name, shape in attention.items()}
    names |= {f"model.layers.0.mlp.{name}.weight": shape for name, shape in mlp.items()}
    outside = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (1, width))
    topology = read_topology(config, {**outside, **names})
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in {**attention, **mlp}.items()}
    tuned = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    # A draw is a measure of noise: with two draws there are three.
    _, seconds = timed(lambda: gauge_drift(base, tuned, topology, 0, draws=2), "cpu")
    return seconds / 3 / sum(tensor.numel() for tensor in base.values())


def _digest_rate(size: int = 2**25) -> float:
    content = bytes(size)
    _, seconds = timed(lambda: hashlib.sha256(content).digest(), "cpu")
    return size / seconds


def plan(
    workloads: Sequence[Workload], rates: Rates, checkpoints: int, draws: int, start_up: float = 0.0
) -> list[Estimate]:
    """Every workload on this machine, whose rates are given, and on one GPU where these are a CPU's."""
    devices = [rates, gpu_rates(rates)] if rates.on_cpu else [rates]
    found = [estimate(workload, each, checkpoints, draws) for workload in workloads for each in devices]
    found = [replace(each, start_up=start_up) for each in found]
    # A GPU's forward passes are not among the formulas.
    return [replace(each, function=None, function_draw=0.0) if each.source == GPU_SOURCE else each for each in found]
