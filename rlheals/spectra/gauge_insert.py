"""Other weights for the same function, to test and to show what gauge-aware drift leaves out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.block_factors import BLOCKS, group, planes, present_blocks, rows_of, tensor_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlheals.models.topology import Topology


def random_gauge(
    state: Mapping[str, Tensor], topology: Topology, seed: int, *, orthogonal: bool = False
) -> dict[str, Tensor]:
    """The same function with other weights: a random map of every freedom that `gauge_drift` knows.

    Args:
        state: a model's full state dict; not changed.
        topology: of the model.
        seed: of the maps.
        orthogonal: only rotations and permutations, which keep the singular values of the factors; otherwise
            invertible maps and scalings by up to e^±½ too, scalings of neurons with a random sign.

    Returns:
        A new state dict; tensors that no map touches are the same objects. Computed in float64 and rounded back, so
        that logits agree as far as the weights' own precision allows.
    """
    made = dict(state)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(topology.layers):
        names: dict[str, str] = {}
        for matrix in topology.matrices:
            if matrix.layer == layer:
                names |= tensor_names(state, matrix.name, matrix.module)
        modules = {name: state[tensor] for name, tensor in names.items()}
        for block in present_blocks(modules, topology, layer):
            wide = {name: tensor.double() for name, tensor in modules.items()}
            for name, tensor in _INSERT[block](wide, topology, generator, orthogonal).items():
                made[names[name]] = tensor.to(modules[name].dtype)
    return made


def _spread(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64).sub_(0.5).exp_()


def _insert_value_output(
    modules: Mapping[str, Tensor], topology: Topology, generator: torch.Generator, orthogonal: bool
) -> dict[str, Tensor]:
    size = topology.head_size
    made = {name: modules[name].clone() for name in ("v_proj", "v_proj.bias", "o_proj") if name in modules}
    for head in range(topology.kv_heads):
        turns = [torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2)]
        stretch = torch.ones(size, dtype=torch.float64) if orthogonal else _spread(size, generator)
        chosen, back = (turns[0] * stretch) @ turns[1].mT, (turns[1] / stretch) @ turns[0].mT
        for name in ("v_proj", "v_proj.bias"):
            if name in made:
                rows = rows_of(head, topology)
                made[name][rows] = chosen @ made[name][rows]
        for query_head in group(head, topology):
            columns = rows_of(query_head, topology)
            made["o_proj"][:, columns] = made["o_proj"][:, columns] @ back
    return made


def _insert_query_key(
    modules: Mapping[str, Tensor], topology: Topology, generator: torch.Generator, orthogonal: bool
) -> dict[str, Tensor]:
    half = topology.head_size // 2
    made = {name: modules[name].clone() for name in modules if name.partition(".")[0] in BLOCKS["query_key"]}
    for head in range(topology.kv_heads):
        phase = 2 * math.pi * torch.rand(half, generator=generator, dtype=torch.float64)
        size = torch.ones_like(phase) if orthogonal else _spread(half, generator)
        keys, queries = torch.polar(size, phase), torch.polar(1 / size, phase)
        for module, number, heads in (("k_proj", keys, [head]), ("q_proj", queries, group(head, topology))):
            for which in heads:
                for name in (module, f"{module}.bias"):
                    if name in made:
                        rows = rows_of(which, topology)
                        made[name][rows] = _turned(made[name][rows], number, topology)
    return made


def _turned(rows: Tensor, number: Tensor, topology: Topology) -> Tensor:
    """Rows of a head, or its bias, with each rotary plane multiplied by a complex number."""
    multiplied = planes(rows.reshape(topology.head_size, -1), topology).mT * number[:, None]
    stacked = torch.stack([multiplied.real, multiplied.imag])
    order = stacked.transpose(0, 1) if topology.rotary_pairs == "neighbours" else stacked
    return order.reshape(rows.shape)


def _insert_mlp(
    modules: Mapping[str, Tensor], topology: Topology, generator: torch.Generator, orthogonal: bool
) -> dict[str, Tensor]:
    count = modules["gate_proj"].shape[0]
    order = torch.randperm(count, generator=generator)
    scale = torch.ones(count, dtype=torch.float64)
    if not orthogonal:
        scale = _spread(count, generator) * (2.0 * torch.randint(2, (count,), generator=generator) - 1)
    made = {name: modules[name][order] for name in ("gate_proj", "gate_proj.bias") if name in modules}
    made["up_proj"] = modules["up_proj"][order] * scale[:, None]
    if "up_proj.bias" in modules:
        made["up_proj.bias"] = modules["up_proj.bias"][order] * scale
    made["down_proj"] = modules["down_proj"][:, order] / scale
    return made


_INSERT = {"value_output": _insert_value_output, "query_key": _insert_query_key, "mlp": _insert_mlp}
