"""Which tensor of a checkpoint is which matrix of the network: names and shapes to layers and modules, no weights read.

A decoder keeps its layers as ``<stem>.<number>.<path>``, and a two-dimensional ``weight`` there is a matrix: that
rule, with the tables of `rlheals.models.families`, reads Llama and its relatives, mixtures of experts (one tensor an
expert, or all stacked in one), fused projections, GPT-NeoX, OPT, Falcon, GPT-2 and so on. Whatever is not analysed is
listed with the reason, so that nothing is left out silently, and what is not *understood* is marked as such.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.models.families import (
    EMBEDDINGS,
    GAUGED,
    NEIGHBOURS,
    OUTSIDE,
    PLAIN_ATTENTION,
    block_kind,
    inputs_first,
    is_stack,
    setting,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_A_MATRIX = "not a matrix"
"""How the reasons end that leave a tensor out because it is a vector or a kernel of a few numbers a channel."""
BUFFER = "buffer that the model computes from its config, not a weight"
"""Why tables such as masks and rotary frequencies are left out."""
TIED = "the head is tied to the embedding"
"""Why a head that is stored though it is the embedding is left out."""
_DEFAULT_INITIALIZER_RANGE = 0.02  # of LlamaConfig, Qwen2Config and MllamaTextConfig in transformers
_DEFAULT_ROPE_THETA = 10000.0
_LAYER = re.compile(r"^(?P<stem>(?:.*?\.)?[A-Za-z_]\w*)\.(?P<layer>\d+)\.(?P<path>.+)$")
_TOWER = re.compile(r"(?:^|[._])(vision|visual|image|audio)(?:[._]|$)")
_NUMBER = re.compile(r"(\d+)")
_SLICE = re.compile(r"^(?P<tensor>.+)\[(?:(?P<entry>\d+)|:(?P<rows>\d+))\]$")
_LAYER_DIGITS = 5
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


@dataclass(frozen=True, order=True)
class Matrix:
    """One two-dimensional weight that can be analysed.

    Attributes:
        name: name of the tensor in the file; of a stack of matrices with the place in it, ``….gate_up_proj[3]``; of a
            table whose first rows alone are meant with their number, ``….embed_tokens.weight[:32000]``.
        layer: decoder layer, from 0; -1 for the embedding and the head.
        module: ``q_proj`` … ``down_proj``, ``embed_tokens`` or ``lm_head``; in other families the shortest end of the
            path that is unique within the layer, such as ``attn.c_proj``, the same for all experts.
        kind: ``self_attention``, ``cross_attention``, ``mlp``, ``expert``, ``mixer``, ``other``, ``embedding``,
            ``positions`` or ``head``.
        inputs_first: stored as (inputs, outputs), so that the side of the outputs, elsewhere the left, is the right.
    """

    name: str
    layer: int
    module: str
    kind: str
    inputs_first: bool = False


@dataclass(frozen=True)
class Topology:
    """What a checkpoint's tensors are, and the constants of its attention.

    Attributes:
        family: ``model_type`` of the config.
        matrices: every matrix that can be analysed, embedding first, then layer by layer, head last.
        left_out: every other tensor, with the reason.
        tied: the head is the embedding.
        layers: decoder layers.
        heads: query heads; ``kv_heads`` of keys and values.
        head_size: rows of one head in ``q_proj``.
        rotary_size: the first so many dimensions of a head are rotated (self-attention only; cross-attention has no
            positions).
        rotary_pairs: ``half`` when plane i holds dimensions i and i + rotary_size / 2, as in all Llama-like models of
            transformers but a few; ``neighbours`` when it holds 2i and 2i + 1.
        rope_theta: base of the rotary frequencies; None where the config keeps one for each kind of layer.
        initializer_range: standard deviation of fresh weights.
        stem: what the names of the layers begin with, such as ``model.layers``.
        gauged: it is known which changes of the attention and the MLP do nothing.
        unknown: those of ``left_out`` that may well be weights of the network like the others, but are not understood.
    """

    family: str
    matrices: tuple[Matrix, ...]
    left_out: dict[str, str]
    tied: bool
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int
    rotary_pairs: str
    rope_theta: float | None
    initializer_range: float
    stem: str = ""
    gauged: bool = False
    unknown: frozenset[str] = frozenset()

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None outside the layers."""
        found = _LAYER.match(name)
        return int(found["layer"]) if found and found["stem"] == self.stem else None


def read_topology(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Topology:
    """Name each tensor of ``shapes`` by layer and module.

    Args:
        config: content of ``config.json``; the part on the language model may lie under ``text_config``.
        shapes: shape of every tensor in the files.

    Raises:
        UserError: the config lacks a key or describes an encoder with a decoder, no tensor is named as in a decoder, a
            layer of the config has no matrix, or the projections have other heads than the config says.
    """
    text = text_config(config)
    family = str(config.get("model_type") or text.get("model_type") or "unknown")
    if config.get("is_encoder_decoder") is True:
        raise UserError(
            f"the model is an encoder with a decoder ({family}), whose layers are not analysed; use a causal language "
            "model, which has a decoder only."
        )
    layers = _layers(text, shapes, strict=family in GAUGED)
    heads, kv_heads, head_size = _heads(text, strict=family in GAUGED)
    rope = text.get("rope_parameters") or {}
    stem, matrices, left_out, unknown = _sort_tensors(shapes, layers, family)
    tied = is_tied(config, shapes)
    if tied:
        left_out |= {m.name: TIED for m in matrices if m.kind == "head"}
        matrices = [matrix for matrix in matrices if matrix.kind != "head"]
    if family in PLAIN_ATTENTION:
        _check_heads(matrices, shapes, heads, kv_heads, head_size)
    share = text.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    return Topology(
        family=family,
        matrices=tuple(matrices),
        left_out=left_out,
        tied=tied,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        rotary_size=int(head_size * share),
        rotary_pairs="neighbours" if family in NEIGHBOURS else "half",
        rope_theta=_rope_theta(text, rope),
        initializer_range=float(text.get("initializer_range") or _DEFAULT_INITIALIZER_RANGE),
        stem=stem,
        gauged=family in GAUGED,
        unknown=frozenset(unknown),
    )


def split_name(name: str) -> tuple[str, int | None, int | None]:
    """Tensor in the file, entry of its stack and number of its first rows that the name of a matrix means.

    >>> split_name("a.weight"), split_name("a.weight[3]"), split_name("a.weight[:32000]")
    (('a.weight', None, None), ('a.weight', 3, None), ('a.weight', None, 32000))
    """
    found = _SLICE.match(name)
    if not found:
        return name, None, None
    entry, rows = (None if found[key] is None else int(found[key]) for key in ("entry", "rows"))
    return found["tensor"], entry, rows


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: ``text_config`` of a multimodal model, else all of it."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def select(
    topology: Topology,
    modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    *,
    embeddings: bool = False,
) -> tuple[Matrix, ...]:
    """The matrices to analyse, in the topology's order.

    Args:
        topology: of the checkpoint.
        modules: names of modules; None for all within the layers. ``embed_tokens`` and ``lm_head`` may be named too.
        layers: decoder layers; None for all. They do not hold back the embedding and the head.
        embeddings: take the embedding and the head along.

    Raises:
        UserError: a module or layer that the model does not have, or nothing is left.
    """
    known = list(dict.fromkeys(matrix.module for matrix in topology.matrices))
    for module in modules or ():
        if module not in known:
            raise UserError(_unknown_module(module, known, topology))
    for layer in layers or ():
        if not 0 <= layer < topology.layers:
            raise UserError(
                f"layer {layer} is outside the model, which has layers 0 to {topology.layers - 1}; correct the layers."
            )
    taken = tuple(m for m in topology.matrices if _is_taken(m, modules, layers, embeddings))
    if not taken:
        raise UserError(
            f"no matrix is selected by modules {', '.join(modules or ['(all)'])} in layers "
            f"{', '.join(map(str, layers if layers is not None else ['(all)'])) or '(none)'}; widen the selection."
        )
    return taken


def parse_layers(text: str) -> list[int]:
    """Layers of a text such as ``0-9,12``, ascending, each once.

    >>> parse_layers("0-2,7,1")
    [0, 1, 2, 7]

    Raises:
        UserError: it is not a list of numbers and ascending ranges.
    """
    layers: set[int] = set()
    for part in text.split(","):
        found = _RANGE.match(part.strip())
        numbers = [number for number in found.groups() if number] if found else []
        if any(len(number) > _LAYER_DIGITS for number in numbers):
            raise UserError(f"layers {text[:40]!r} go beyond any model's; write them as 0-9,12.")
        first, last = (int(numbers[0]), int(numbers[-1])) if numbers else (1, 0)
        if last < first:
            raise UserError(f"layers {text!r} is not a list of layers at {part.strip()!r}; write it as 0-9,12.")
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_modules(text: str) -> tuple[str, ...]:
    """Names of modules in a text such as ``q_proj,v_proj``.

    Raises:
        UserError: one is empty.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise UserError(f"modules {text!r} is not a list of names; write it as q_proj,v_proj, or leave it out for all.")
    return names


def _sort_tensors(
    shapes: Mapping[str, tuple[int, ...]], layers: int, family: str
) -> tuple[str, list[Matrix], dict[str, str], set[str]]:
    """The stem, the matrices in the order of the network, the reason for each tensor that is none, and unknown ones."""
    stem = _decoder_stem(shapes, layers)
    modules = _module_names(shapes, stem)
    matrices: list[Matrix] = []
    left_out: dict[str, str] = {}
    unknown: set[str] = set()
    for name, shape in shapes.items():
        found = _outside(name, shape, stem) or _reason(name, shape, stem, layers)
        if isinstance(found, Matrix):
            matrices.append(found)
        elif found:
            left_out[name] = found
            if len(shape) > 1 and not found.endswith((NOT_A_MATRIX, "language model")):
                unknown.add(name)
        else:
            matrices += _matrices(name, shape, modules[name], family)
    missing = sorted(set(range(layers)) - {matrix.layer for matrix in matrices})
    if missing:
        raise UserError(
            f"the config says {layers} layers, but layer {missing[0]} has no weight under {stem}.{missing[0]}; "
            "use the config and weights of one and the same model."
        )
    return stem, sorted(matrices, key=_position), left_out, unknown


def _decoder_stem(shapes: Mapping[str, tuple[int, ...]], layers: int) -> str:
    """The prefix under which the language model keeps its layers, such as ``model.layers``: most numbers lie there."""
    numbers: dict[str, int] = defaultdict(int)
    found: dict[str, set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        layer = _LAYER.match(name)
        if layer and layer["path"].endswith(".weight") and len(shape) == 2 and not _TOWER.search(name):
            numbers[layer["stem"]] += math.prod(shape)
            found[layer["stem"]].add(int(layer["layer"]))
    if not numbers:
        example = next(iter(shapes), "(none)")
        raise UserError(
            "no weight is named as in a decoder (….layers.N.self_attn.q_proj.weight, ….h.N.attn.c_attn.weight and so "
            f"on), the first is {example}; use a checkpoint of a causal language model of transformers."
        )
    return max(numbers, key=lambda stem: (found[stem] >= set(range(layers)), numbers[stem]))


def _module_names(shapes: Mapping[str, tuple[int, ...]], stem: str) -> dict[str, tuple[int, str, list[str]]]:
    """Layer, module and path of every tensor of the layers; numbers within a path are left out of its name."""
    paths: dict[str, tuple[int, list[str]]] = {}
    for name in shapes:
        layer = _LAYER.match(name)
        if layer and layer["stem"] == stem:
            parts = [part for part in layer["path"].split(".") if not part.isdigit()]
            paths[name] = int(layer["layer"]), parts
    ends: dict[tuple[int, tuple[str, ...]], set[tuple[str, ...]]] = defaultdict(set)
    for name, (number, path) in paths.items():
        whole = tuple(_without_weight(path))
        if len(shapes[name]) > 1:
            for start in range(len(whole)):
                ends[number, whole[start:]].add(whole)
    return {name: (number, _shortest_end(number, path, ends), path) for name, (number, path) in paths.items()}


def _shortest_end(
    number: int, path: list[str], ends: Mapping[tuple[int, tuple[str, ...]], set[tuple[str, ...]]]
) -> str:
    whole = tuple(_without_weight(path))
    starts = [at for at in range(len(whole) - 1, 0, -1) if len(ends.get((number, whole[at:]), ())) == 1]
    return ".".join(whole[starts[0] if starts else 0 :])


def _without_weight(path: list[str]) -> list[str]:
    return path[:-1] if path[-1] == "weight" and len(path) > 1 else path


def _outside(name: str, shape: tuple[int, ...], stem: str) -> Matrix | str | None:
    """The table outside the layers that a tensor is, or why it is none of the language model's matrices; else None."""
    parts = name.split(".")
    if tower := _TOWER.search(name):
        return f"{'audio' if tower[1] == 'audio' else 'vision'} tower, not the language model"
    if "projector" in name:
        return "projector between towers, not the language model"
    if parts[-1].endswith("bias"):
        return f"bias, {NOT_A_MATRIX}"
    if len(shape) < 2:
        return f"{'norm scale' if 'norm' in name else 'gate or other vector'}, {NOT_A_MATRIX}"
    table = len(parts) > 1 and parts[-1] == "weight" and len(shape) == 2 and EMBEDDINGS.get(parts[-2])
    layer = _LAYER.match(name)
    if table and not (layer and layer["stem"] == stem):
        return Matrix(name, -1, parts[-2], table)
    return None


def _reason(name: str, shape: tuple[int, ...], stem: str, layers: int) -> str:
    """Why a tensor is no matrix of a layer; empty where it is one, or a stack of them."""
    layer = _LAYER.match(name)
    if not layer or layer["stem"] != stem:
        return f"outside the decoder's layers ({stem})"
    if int(layer["layer"]) >= layers:
        return f"layer beyond the {layers} of the config"
    path = layer["path"].split(".")
    if is_stack(path, shape) or (len(shape) == 2 and path[-1] == "weight" and min(shape) > 1):
        return ""
    if len(shape) == 2 and path[-1] == "weight":
        return f"a single row or column, {NOT_A_MATRIX}"
    if len(shape) == 3 and any("conv" in part for part in path):
        return f"convolution kernel, {NOT_A_MATRIX}"
    return "a kind of parameter that rlheals does not know"


def _matrices(name: str, shape: tuple[int, ...], where: tuple[int, str, list[str]], family: str) -> list[Matrix]:
    """The matrix that a tensor of a layer is, or those it stacks."""
    layer, module, path = where
    kind = block_kind(path) or "other"
    if len(shape) == 2:
        linear = kind in ("self_attention", "cross_attention", "mlp")
        return [Matrix(name, layer, module, kind, linear and inputs_first(family, stacked=False))]
    turned = inputs_first(family, stacked=True)
    return [Matrix(f"{name}[{entry}]", layer, module, kind, turned) for entry in range(shape[0])]


def _position(matrix: Matrix) -> tuple[int, int, list[int | str]]:
    """Sort key: tables before the layers, layers in order with Llama's order of modules inside, head."""
    natural: list[int | str] = [int(part) if part.isdigit() else part for part in _NUMBER.split(matrix.name)]
    if matrix.kind == "head":
        return (1 << 30, 0, natural)
    order = MODULES.index(matrix.module) if matrix.module in MODULES else len(MODULES)
    return (matrix.layer, order, natural)


def _is_taken(matrix: Matrix, modules: Sequence[str] | None, layers: Sequence[int] | None, embeddings: bool) -> bool:
    if matrix.kind in OUTSIDE:
        return embeddings or matrix.module in (modules or ())
    return (modules is None or matrix.module in modules) and (layers is None or matrix.layer in layers)


def _unknown_module(module: str, known: list[str], topology: Topology) -> str:
    if module == "lm_head" and topology.tied:
        return "this model's lm_head is tied to its embedding; name embed_tokens instead."
    nearest = difflib.get_close_matches(module, known, n=1, cutoff=0)
    return f"the model has no module {module!r}, did you mean {nearest[0]!r}? It has {', '.join(known)}."


def _layers(text: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], *, strict: bool) -> int:
    """Decoder layers; by the weights themselves where a family that is not gauged counts otherwise or not at all."""
    if strict or setting(text, "num_hidden_layers") is not None:
        told = _whole(text, "num_hidden_layers")
        numbers = _numbers(shapes, _decoder_stem(shapes, told))
        if strict or numbers >= set(range(told)):
            return told
    return max(_numbers(shapes, _decoder_stem(shapes, 0)), default=0) + 1


def _numbers(shapes: Mapping[str, tuple[int, ...]], stem: str) -> set[int]:
    """The layers that ``stem`` has a matrix of."""
    found = [_LAYER.match(name) for name, shape in shapes.items() if len(shape) > 1]
    return {int(layer["layer"]) for layer in found if layer and layer["stem"] == stem}


def _heads(text: dict[str, Any], *, strict: bool) -> tuple[int, int, int]:
    """Query heads, key-value heads and rows of a head; (1, 1, 1) where a family that is not gauged has none of that.

    Raises:
        UserError: the family is gauged and the config does not give them.
    """
    try:
        heads = _whole(text, "num_attention_heads")
        return (
            heads,
            _whole(text, "num_key_value_heads", heads),
            _whole(text, "head_dim", _whole(text, "hidden_size") // heads),
        )
    except UserError:
        if strict:
            raise
        return 1, 1, 1


def tables(shapes: Mapping[str, tuple[int, ...]], kind: str) -> list[str]:
    """The tensors outside any layer that are tables of this kind (``embedding``, ``positions``, ``head``)."""
    parts = {name: name.split(".") for name, shape in shapes.items() if len(shape) == 2 and not _TOWER.search(name)}
    return [
        name for name, part in parts.items() if part[-1] == "weight" and EMBEDDINGS.get(".".join(part[-2:-1])) == kind
    ]


def is_tied(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """What the config says; without a word of it, a model that stores an embedding and no head has it tied."""
    for part in (config, text_config(config)):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return bool(tables(shapes, "embedding")) and not tables(shapes, "head")


def _rope_theta(text: dict[str, Any], rope: dict[str, Any]) -> float | None:
    if any(isinstance(value, dict) for value in rope.values()):
        return None
    return float(rope.get("rope_theta") or text.get("rope_theta") or _DEFAULT_ROPE_THETA)


def _check_heads(
    matrices: Sequence[Matrix], shapes: Mapping[str, tuple[int, ...]], heads: int, kv_heads: int, head_size: int
) -> None:
    expected = {"q_proj": heads * head_size, "k_proj": kv_heads * head_size, "v_proj": kv_heads * head_size}
    for matrix in matrices:
        rows = shapes[matrix.name][0]
        if rows != expected.get(matrix.module, rows):
            raise UserError(
                f"tensor {matrix.name} has {rows} rows, but the config's heads make {expected[matrix.module]}; "
                "use the config and weights of one and the same model."
            )


def _whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of the config; ``default`` where it is absent or null."""
    found = setting(config, key)
    value = default if found is None else found
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json must give {key} as a positive whole number, not {value!r}; repair the config.")
    return value
