"""How far one block's factors and their product moved, before and after the best map between the factors.

Products are never formed: all norms come from inner products of size head × head or from sums a column.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.alignment import Grams, Tally, best_map, best_scale, best_turn
from rlheals.spectra.block_factors import BLOCKS, group, planes, rows_of, widened
from rlheals.spectra.neurons import match_neurons, neuron_overlaps, neuron_tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from rlheals.models.topology import Topology

QUANTITIES = ("raw_change", "product_change", "aligned_change", "raw_angle_mean", "aligned_angle_mean", "gauge_share")


def measure_block(
    block: str, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], topology: Topology
) -> dict[int | None, list[float]]:
    """The values of `QUANTITIES` by head."""
    if block == "mlp":
        return {None: _mlp(base, tuned)}
    compare = _value_output if block == "value_output" else _query_key
    return {head: compare(base, tuned, topology, head) for head in range(topology.kv_heads)}


def _values(raw: Tally, aligned: Tally, product: float) -> list[float]:
    """In the order of `QUANTITIES`."""
    before, after = raw.change(), aligned.change()
    share = max(0.0, 1 - (after / before) ** 2) if before > 0 else 0.0
    return [before, product, after, float(raw.angles().mean()), float(aligned.angles().mean()), share]


def _value_output(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], topology: Topology, head: int
) -> list[float]:
    """One value head and its group's output columns, both as (rows, head size), as `best_map` has them."""

    def value(modules: Mapping[str, Tensor]) -> Tensor:
        return widened(modules, "v_proj", rows_of(head, topology)).mT

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for query_head in group(head, topology):
            columns = rows_of(query_head, topology)
            yield base["o_proj"][:, columns].double(), tuned["o_proj"][:, columns].double()

    before, after = value(base), value(tuned)
    raw, grams = Tally.of(before, after), Grams.of(before, after)
    output_grams = None
    for pair in outputs():
        raw, found = raw + Tally.of(*pair), Grams.of(*pair)
        output_grams = found if output_grams is None else output_grams + found
    assert output_grams is not None
    chosen = best_map(grams, output_grams)
    back = torch.linalg.inv(chosen)
    after = after @ chosen.mT
    aligned, change = Tally.of(before, after), after - before
    gram, inner, moved = before.mT @ before, change.mT @ before, change.mT @ change
    changed = whole = 0.0
    for output, other in outputs():
        other = other @ back
        aligned, shift = aligned + Tally.of(output, other), other - output
        # ‖B'A'ᵀ − BAᵀ‖² of ΔB Aᵀ + B' ΔAᵀ, by traces of (head size × head size) matrices
        changed += float(((shift.mT @ shift) * gram).sum() + ((other.mT @ other) * moved).sum())
        changed += 2 * float(((shift.mT @ other) * inner.mT).sum())
        whole += float(((output.mT @ output) * gram).sum())
    product = math.sqrt(max(0.0, changed) / whole) if whole > 0 else 0.0
    return _values(raw, aligned, product)


def _query_key(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], topology: Topology, head: int) -> list[float]:
    """One key head and its group's queries, plane by plane.

    The score of positions m and n is ``Re Σ e^{iθ(m−n)} q̄ k`` over planes, so a plane's invariant is the outer product
    ``k qᴴ`` over the inputs: its real part is what commutes with the rotation, its imaginary part what rotates along.
    """

    def read(modules: Mapping[str, Tensor], module: str, which: int) -> Tensor:
        return planes(widened(modules, module, rows_of(which, topology)), topology)

    before, after = read(base, "k_proj", head), read(tuned, "k_proj", head)
    keys, overlap = Tally.of(before, after), (before.conj() * after).sum(0)
    raw = keys
    queries, query_overlap = [], torch.zeros_like(overlap)
    for query_head in group(head, topology):
        query, other = read(base, "q_proj", query_head), read(tuned, "q_proj", query_head)
        queries.append(Tally.of(query, other))
        query_overlap = query_overlap + (query.conj() * other).sum(0)
    together = _sum(queries)
    raw = keys + together
    chosen = best_turn(keys.after, overlap, together.after, query_overlap)
    keys = Tally.of(before, after * chosen)
    turned = [
        Tally.of(read(base, "q_proj", which), read(tuned, "q_proj", which) / chosen.conj())
        for which in group(head, topology)
    ]
    together = _sum(turned)
    return _values(raw, keys + together, keys.outer_change(together))


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = tallies[0]
    for tally in tallies[1:]:
        total = total + tally
    return total


def _mlp(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[float]:
    """All neurons of a gated MLP; see `match_neurons` for how they are paired."""
    raw = {part: neuron_tally(base, tuned, part) for part in BLOCKS["mlp"]}
    order = match_neurons(base, tuned)
    up, down = (neuron_overlaps(base, tuned, part, order) for part in ("up_proj", "down_proj"))
    scale = best_scale(up[1], up[2], down[1], down[2])
    gate = neuron_tally(base, tuned, "gate_proj", order)
    grown = neuron_tally(base, tuned, "up_proj", order, scale)
    shrunk = neuron_tally(base, tuned, "down_proj", order, 1 / scale)
    product = math.sqrt((gate.change() ** 2 + grown.outer_change(shrunk) ** 2) / 2)
    return _values(_sum(list(raw.values())), gate + grown + shrunk, product)
