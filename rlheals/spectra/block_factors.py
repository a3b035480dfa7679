"""The factors inside a decoder block whose product alone matters, read a head or a few neurons at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from torch import Tensor

    from rlheals.models.topology import Topology

BLOCKS = {
    "value_output": ("v_proj", "o_proj"),
    "query_key": ("q_proj", "k_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
BIASED = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
"""Modules whose bias belongs to a factor; those of o_proj and down_proj stand outside the product."""
PIECE = 256
"""Neurons brought to float64 at a time."""


def tensor_names(state: Container[str], weight: str, module: str) -> dict[str, str]:
    """What belongs to a weight, by module: itself, its bias, and the norm of queries or keys, where they exist.

    Args:
        state: whatever holds the tensors' names.
        weight: name of the weight's tensor.
        module: ``q_proj`` and so on.

    Returns:
        Such as ``{"q_proj": "….q_proj.weight", "q_proj.bias": "….q_proj.bias", "q_norm": "….q_norm.weight"}``.
    """
    stem = weight.removesuffix(".weight")
    names = {module: weight, f"{module}.bias": f"{stem}.bias"}
    if module in ("q_proj", "k_proj"):
        parent, letter = stem.rpartition(".")[0], module[0]
        names[f"{letter}_norm"] = f"{parent}.{letter}_norm.weight"
    return {name: tensor for name, tensor in names.items() if tensor in state}


def present_blocks(modules: Mapping[str, Tensor], topology: Topology, layer: int) -> list[str]:
    """The blocks whose matrices are all there and whose freedom is known."""
    found = [block for block, parts in BLOCKS.items() if all(part in modules for part in parts)]
    crossed = any(matrix.layer == layer and matrix.kind == "cross_attention" for matrix in topology.matrices)
    turned = topology.rotary_size == topology.head_size and not crossed
    if "query_key" in found and (not turned or "q_norm" in modules or "k_norm" in modules):
        found.remove("query_key")
    return found


def widened(modules: Mapping[str, Tensor], module: str, rows: slice | Tensor = slice(None)) -> Tensor:
    """Some rows of a weight in float64, with the bias as one more column."""
    weight = modules[module][rows].double()
    if f"{module}.bias" not in modules:
        return weight
    return torch.cat([weight, modules[f"{module}.bias"][rows].double()[:, None]], dim=1)


def rows_of(head: int, topology: Topology) -> slice:
    """Rows of a head in q_proj, k_proj or v_proj, and its columns in o_proj."""
    return slice(head * topology.head_size, (head + 1) * topology.head_size)


def group(head: int, topology: Topology) -> range:
    """The query heads that share a key-value head."""
    size = topology.heads // topology.kv_heads
    return range(head * size, (head + 1) * size)


def planes(rows: Tensor, topology: Topology) -> Tensor:
    """(head size, inputs) rows of a head as one complex column a rotary plane: (inputs, head size / 2)."""
    half = topology.head_size // 2
    neighbours = topology.rotary_pairs == "neighbours"
    real, imaginary = (rows[0::2], rows[1::2]) if neighbours else (rows[:half], rows[half:])
    return torch.complex(real, imaginary).mT


def neurons_of(modules: Mapping[str, Tensor], part: str, which: slice | Tensor) -> Tensor:
    """Some neurons' vectors of one matrix, (inputs, neurons) in float64."""
    return modules[part][:, which].double() if part == "down_proj" else widened(modules, part, which).mT


def pieces(count: int) -> Iterator[slice]:
    """Consecutive slices of at most `PIECE` of ``count`` neurons."""
    return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))
