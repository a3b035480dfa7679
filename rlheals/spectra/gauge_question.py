"""One layer of one pair: how much of its change the network's function can see."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from rlheals.spectra.block_factors import BLOCKS, tensor_names
from rlheals.spectra.gauge import gauge_drift, undefined_blocks
from rlheals.spectra.noise import seed_of
from rlheals.spectra.results import Finding
from rlheals.spectra.settings import GAUGE_NULLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from rlheals.models.topology import Matrix
    from rlheals.spectra.reader import Weights
    from rlheals.spectra.settings import DiagnoseSettings

COLUMNS: dict[str, type[pl.DataType]] = {
    "block": pl.String,
    "head": pl.Int64,
    "quantity": pl.String,
    "value": pl.Float64,
    "noise_low": pl.Float64,
    "noise_high": pl.Float64,
}
KEPT = 3
"""Tensors of the largest size, in float32, that are kept in memory between two readings of them."""
SMALLEST_KEPT = 2**23
FLOAT32 = 4


def whole_layers(matrices: Sequence[Matrix]) -> list[tuple[int, tuple[Matrix, ...]]]:
    """The layers with at least one block whose matrices are all among ``matrices``, with those blocks' matrices."""
    by_layer: dict[int, dict[str, Matrix]] = {}
    for matrix in matrices:
        if matrix.layer >= 0:
            by_layer.setdefault(matrix.layer, {})[matrix.module] = matrix
    layers = []
    for layer, modules in by_layer.items():
        whole = [name for parts in BLOCKS.values() if all(part in modules for part in parts) for name in parts]
        if whole:
            layers.append((layer, tuple(modules[name] for name in whole)))
    return layers


@dataclass(frozen=True)
class GaugeQuestion:
    """How much of the change of layer ``layer`` is free?"""

    layer: int
    matrices: tuple[Matrix, ...]
    reference: Weights
    target: Weights
    settings: DiagnoseSettings

    @property
    def same(self) -> bool:
        """Whether all tensors of the two models are bit-identical."""
        return self._digests(self.reference) == self._digests(self.target)

    def decides(self) -> list[Any]:
        """What the answer depends on, as JSON."""
        topology = self.reference.topology
        shape = [topology.heads, topology.kv_heads, topology.head_size, topology.rotary_size, topology.rotary_pairs]
        digests = [self._digests(self.reference), self._digests(self.target)]
        kinds = [matrix.kind for matrix in self.matrices]
        return ["gauge", self.layer, digests, kinds, shape, self._draws, self.settings.seed]

    def answer(self) -> Finding:
        """Measure every whole block, and the same on null draws."""
        memory = _Memory(self._largest())
        base, tuned = (LazyLayer(weights, self._names(weights), memory) for weights in (self.reference, self.target))
        rows = gauge_drift(
            base,
            tuned,
            self.reference.topology,
            self.layer,
            draws=self._draws,
            seed=self._seed(),
        )
        columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
        undefined = undefined_blocks(base, tuned, self.reference.topology, self.layer)
        return Finding(pl.DataFrame(columns, schema=COLUMNS), {"undefined": undefined})

    @property
    def _draws(self) -> int:
        return min(self.settings.nulls, GAUGE_NULLS)

    def _seed(self) -> int:
        """Of the null draws: from the bytes, so that no two layers, pairs or runs share their noise."""
        digests = [self._digests(self.reference), self._digests(self.target)]
        return seed_of(self.settings.seed, *(digest for side in digests for digest in side.values()))

    def _names(self, weights: Weights) -> dict[str, str]:
        """Module (or module.bias) → tensor."""
        found: dict[str, str] = {}
        for matrix in self.matrices:
            found |= tensor_names(weights.shapes, matrix.name, matrix.module)
        return found

    def _digests(self, weights: Weights) -> dict[str, str]:
        return {name: weights.digest(tensor) for name, tensor in self._names(weights).items()}

    def _largest(self) -> int:
        """Bytes of the largest matrix in float32."""
        shapes = (self.reference.shapes[matrix.name] for matrix in self.matrices)
        return max(rows * columns for rows, columns in shapes) * FLOAT32


class _Memory:
    """The tensors read last, as many as fit."""

    def __init__(self, largest: int) -> None:
        self.limit = max(KEPT * largest, SMALLEST_KEPT)
        self.tensors: OrderedDict[tuple[int, str], Tensor] = OrderedDict()

    def tensor(self, weights: Weights, name: str) -> Tensor:
        key = (id(weights), name)
        if key not in self.tensors:
            size = math.prod(weights.shapes[name]) * getattr(torch, weights.dtypes[name]).itemsize
            while self.tensors and size + sum(each.nbytes for each in self.tensors.values()) > self.limit:
                self.tensors.popitem(last=False)
            self.tensors[key] = weights.tensor(name)
        self.tensors.move_to_end(key)
        return self.tensors[key]


class LazyLayer(Mapping[str, "Tensor"]):
    """Modules of one layer by name; a tensor is read when it is asked for, and again when it was let go since."""

    def __init__(self, weights: Weights, names: Mapping[str, str], memory: _Memory) -> None:
        self._weights, self._names, self._memory = weights, names, memory

    def __getitem__(self, module: str) -> Tensor:
        return self._memory.tensor(self._weights, self._names[module])

    def __contains__(self, module: object) -> bool:
        return module in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
