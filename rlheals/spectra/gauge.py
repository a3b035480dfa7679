"""Drift that the network's function can see, told from drift that it cannot.

Three parts of a decoder block hold factors whose product alone matters, so that training may turn the factors freely:

- value_output: any invertible map M on a head's inner dimension, ``W_V → M W_V``, ``W_O → W_O M⁻¹``. Query heads that
  share a value head share M, so their output columns are stacked.
- query_key: a rotation and a scaling inside each rotary plane, one complex number c a plane, ``k → c k``,
  ``q → q / c̄``; nothing else commutes with the position's rotation. Query heads that share a key head share c.
- mlp: permutation of the neurons of a gated MLP, and a factor s ≠ 0 a neuron, ``up → s up``, ``down → down / s``; the
  gate stays, as its activation is not linear.

Biases of q, k, v, gate and up belong to the factors as one more input column. Compared are the invariant products,
and the factors after the best such map (`rlheals.spectra.alignment`) was applied to the tuned model. Products are
never formed: all norms come from inner products of size head × head or from sums a column.

Source of the argument: the source paper's appendix A, for orthogonal maps and without grouped heads, rotary planes and
gates, which are added here; Ainsworth et al. 2022 (arXiv 2209.04836) for the matching of neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlheals.spectra.block_factors import BIASED, BLOCKS, present_blocks, tensor_names
from rlheals.spectra.gauge_insert import random_gauge as random_gauge
from rlheals.spectra.invariants import QUANTITIES as QUANTITIES
from rlheals.spectra.invariants import measure_block
from rlheals.spectra.noise import add_noise, change_norm
from rlheals.spectra.nulls import prediction_band

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlheals.models.topology import Topology


@dataclass(frozen=True)
class GaugeRow:
    """One number of one block.

    Attributes:
        layer: decoder layer.
        block: ``value_output``, ``query_key`` or ``mlp``.
        head: key-value head, with all query heads of its group; None for ``mlp``.
        quantity: one of `QUANTITIES`. ``raw_change`` and ``aligned_change`` are the relative Frobenius change of the
            stacked factors before and after alignment; ``product_change`` that of the invariant product (for ``mlp``
            the root mean square of the gate's and of the neurons' down-times-up products' relative change);
            ``raw_angle_mean`` and ``aligned_angle_mean`` the mean angle, in radians, by which the vector that an
            inner coordinate (rotary plane, neuron) holds in the stacked factors turned; ``gauge_share`` is
            ``1 − aligned_change² / raw_change²``, at least 0: how much of the change does nothing.
        value: the measured number.
        noise_low: lower end of the 95 % prediction interval of base + Gaussian noise of each tensor's norm of change;
            None without draws.
        noise_high: its upper end.
    """

    layer: int
    block: str
    head: int | None
    quantity: str
    value: float
    noise_low: float | None = None
    noise_high: float | None = None


def gauge_drift(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    topology: Topology,
    layer: int,
    *,
    draws: int = 0,
    seed: int = 0,
) -> list[GaugeRow]:
    """Raw, aligned and invariant change of every block of one layer that both mappings hold whole.

    The mappings are read a tensor at a time and nothing of them is kept but slices, so one that reads lazily keeps
    memory at one block of the base, the noise on it, and a few slices in float64.

    Args:
        base: module to weight, ``v_proj`` → (out, in); the biases that the model has under ``v_proj.bias`` and so on.
            ``q_norm`` or ``k_norm`` (any value) marks attention that normalises queries and keys; their scales break
            the freedom of query_key, which is then left out.
        tuned: the same of the other model.
        topology: heads and rotary planes. query_key is left out where only a part of a head is rotated and in layers
            of cross-attention, which have no positions.
        layer: for the rows and the noise.
        draws: random changes behind each null band; a band needs two at least.
        seed: of the draws.

    Returns:
        Rows by block, head and quantity; none of a block that `undefined_blocks` names.
    """
    rows = []
    undefined = undefined_blocks(base, tuned, topology, layer)
    for block in present_blocks(base, topology, layer):
        if block in undefined:
            continue
        measured = measure_block(block, base, tuned, topology)
        rows += [
            GaugeRow(layer, block, head, quantity, value)
            for head, values in measured.items()
            for quantity, value in zip(QUANTITIES, values, strict=True)
        ]
    return _with_bands(rows, base, tuned, topology, layer, draws, seed) if draws > 1 else rows


def undefined_blocks(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], topology: Topology, layer: int
) -> dict[str, str]:
    """Blocks with a factor that is all zero in a model, and which: their product is zero whatever the other factor is.

    Args:
        base: as for `gauge_drift`.
        tuned: as for `gauge_drift`.
        topology: as for `gauge_drift`.
        layer: as for `gauge_drift`.

    Returns:
        Block → ``down_proj is zero in the reference``.
    """
    found: dict[str, str] = {}
    for block in present_blocks(base, topology, layer):
        for part in BLOCKS[block]:
            zero = next((side for side, each in (("reference", base), ("target", tuned)) if not each[part].any()), "")
            if zero and block not in found:
                found[block] = f"{part} is zero in the {zero}"
    return found


def layer_modules(state: Mapping[str, Tensor], topology: Topology, layer: int) -> dict[str, Tensor]:
    """One layer's weights and biases out of a state dict, by the names that `gauge_drift` reads."""
    found: dict[str, Tensor] = {}
    for matrix in topology.matrices:
        if matrix.layer == layer:
            found |= {name: state[tensor] for name, tensor in tensor_names(state, matrix.name, matrix.module).items()}
    return found


def _with_bands(
    rows: list[GaugeRow],
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    topology: Topology,
    layer: int,
    draws: int,
    seed: int,
) -> list[GaugeRow]:
    """The rows with the bands of base + noise."""
    banded = []
    for block in dict.fromkeys(row.block for row in rows):
        norms = _change_norms(base, tuned, block)
        drawn = np.array([_numbers(block, base, norms, topology, f"{seed}/{draw}/{layer}") for draw in range(draws)])
        low, high = prediction_band(drawn)
        mine = [row for row in rows if row.block == block]
        ends = zip(mine, low, high, strict=True)
        banded += [replace(row, noise_low=float(least), noise_high=float(most)) for row, least, most in ends]
    return banded


def _numbers(
    block: str, base: Mapping[str, Tensor], norms: Mapping[str, float], topology: Topology, seed: str
) -> list[float]:
    """What `measure_block` finds on one draw of noise, flat in the order of the rows."""
    noisy = {name: add_noise(base[name], norm, f"{seed}/{name}") for name, norm in norms.items()}
    return [value for values in measure_block(block, base, noisy, topology).values() for value in values]


def _change_norms(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], block: str) -> dict[str, float]:
    """Frobenius norm of the change of each factor and bias."""
    names = [*BLOCKS[block], *(f"{part}.bias" for part in BLOCKS[block] if part in BIASED)]
    return {name: change_norm(base[name], tuned[name]) for name in names if name in base}
