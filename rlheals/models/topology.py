"""Which tensor of a checkpoint is which matrix of the network: names and shapes to layers and modules, no weights read.

Covers every decoder that names its weights as Llama does, ``….layers.N.(self_attn|cross_attn|mlp).<module>.weight``:
Llama, Qwen2, the text model of Mllama (under each of its prefixes, with its cross-attention layers), Mistral and so on.
Whatever is not analysed is listed with the reason, so that nothing is left out silently.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = {"self_attn": "self_attention", "cross_attn": "cross_attention", "mlp": "mlp"}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = {"embed_tokens": "embedding", "lm_head": "head"}
# Families whose q, k and v projections hold exactly heads × head size rows, so that a wrong config can be told.
_PLAIN_ATTENTION = {"llama", "mistral", "mllama", "mllama_text_model", "qwen2", "qwen3"}
# Families that rotate neighbouring dimensions (2i, 2i + 1) together; all others pair i with i + half.
_NEIGHBOURS = {"cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium"}
_DEFAULT_INITIALIZER_RANGE = 0.02  # of LlamaConfig, Qwen2Config and MllamaTextConfig in transformers
_DEFAULT_ROPE_THETA = 10000.0
_MATRIX = re.compile(r"^(?P<stem>.*\blayers)\.(?P<layer>\d+)\.(?P<block>\w+)\.(?P<module>\w+)\.weight$")
_LAYER = re.compile(r"^(?P<stem>.*\blayers)\.(?P<layer>\d+)\.")
_TOWER = re.compile(r"(?:^|[._])(vision|visual|image|audio)(?:[._]|$)")
_LAYER_DIGITS = 5
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


@dataclass(frozen=True, order=True)
class Matrix:
    """One two-dimensional weight that can be analysed.

    Attributes:
        name: name of the tensor in the file.
        layer: decoder layer, from 0; -1 for the embedding and the head.
        module: ``q_proj`` … ``down_proj``, ``embed_tokens`` or ``lm_head``.
        kind: ``self_attention``, ``cross_attention``, ``mlp``, ``embedding`` or ``head``.
    """

    name: str
    layer: int
    module: str
    kind: str


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


def read_topology(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Topology:
    """Name each tensor of ``shapes`` by layer and module.

    Args:
        config: content of ``config.json``; the part on the language model may lie under ``text_config``.
        shapes: shape of every tensor in the files.

    Raises:
        UserError: the config lacks a key, no tensor is named as in a Llama-like model, a layer of the config has no
            matrix, or the projections have other heads than the config says.
    """
    text = text_config(config)
    family = str(config.get("model_type") or text.get("model_type") or "unknown")
    layers = _whole(text, "num_hidden_layers")
    heads = _whole(text, "num_attention_heads")
    kv_heads = _whole(text, "num_key_value_heads", heads)
    head_size = _whole(text, "head_dim", _whole(text, "hidden_size") // heads)
    rope = text.get("rope_parameters") or {}
    matrices, left_out = _sort_tensors(shapes, layers)
    tied = _is_tied(config, text, matrices)
    if tied:
        left_out |= {m.name: "the head is tied to the embedding" for m in matrices if m.kind == "head"}
        matrices = [matrix for matrix in matrices if matrix.kind != "head"]
    if family in _PLAIN_ATTENTION:
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
        rotary_pairs="neighbours" if family in _NEIGHBOURS else "half",
        rope_theta=_rope_theta(text, rope),
        initializer_range=float(text.get("initializer_range") or _DEFAULT_INITIALIZER_RANGE),
    )


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


def _sort_tensors(shapes: Mapping[str, tuple[int, ...]], layers: int) -> tuple[list[Matrix], dict[str, str]]:
    """Matrices in the order of the network, and the reason for each tensor that is none."""
    stem = _decoder_stem(shapes)
    matrices, left_out = [], {}
    for name, shape in shapes.items():
        found = _as_matrix(name, shape, stem, layers)
        if isinstance(found, Matrix):
            matrices.append(found)
        else:
            left_out[name] = found
    missing = sorted(set(range(layers)) - {matrix.layer for matrix in matrices})
    if missing:
        raise UserError(
            f"the config says {layers} layers, but layer {missing[0]} has no weight under {stem}.{missing[0]}; "
            "use the config and weights of one and the same model."
        )
    return sorted(matrices, key=_position), left_out


def _decoder_stem(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The prefix under which the language model keeps its layers, such as ``model.layers``."""
    stems = Counter(
        found["stem"]
        for name, shape in shapes.items()
        if (found := _MATRIX.match(name)) and found["block"] in KINDS and len(shape) == 2 and not _TOWER.search(name)
    )
    if not stems:
        example = next(iter(shapes), "(none)")
        raise UserError(
            "no weight is named as in a Llama-like model (….layers.N.self_attn.q_proj.weight), the first is "
            f"{example}; use a Llama, Qwen2, Mllama or similar checkpoint of transformers."
        )
    return stems.most_common(1)[0][0]


def _as_matrix(name: str, shape: tuple[int, ...], stem: str, layers: int) -> Matrix | str:
    """The matrix that a tensor is, or why it is not analysed."""
    parts = name.split(".")
    if tower := _TOWER.search(name):
        return f"{'audio' if tower[1] == 'audio' else 'vision'} tower, not the language model"
    if "projector" in name:
        return "projector between towers, not the language model"
    if parts[-1] == "bias":
        return "bias, not a matrix"
    if len(shape) < 2:
        return f"{'norm scale' if 'norm' in name else 'gate or other vector'}, not a matrix"
    if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDINGS and len(shape) == 2:
        return Matrix(name, -1, parts[-2], EMBEDDINGS[parts[-2]])
    layer = _LAYER.match(name)
    if not layer or layer["stem"] != stem:
        return f"outside the decoder's layers ({stem})"
    if int(layer["layer"]) >= layers:
        return f"layer beyond the {layers} of the config"
    found = _MATRIX.match(name)
    if not found or found["block"] not in KINDS or len(shape) != 2:
        return "part of a module that Llama does not have"
    return Matrix(name, int(found["layer"]), found["module"], KINDS[found["block"]])


def _position(matrix: Matrix) -> tuple[int, int, str]:
    """Sort key: embedding, layers in order with Llama's order of modules inside, head."""
    if matrix.kind == "head":
        return (1 << 30, 0, matrix.name)
    order = MODULES.index(matrix.module) if matrix.module in MODULES else len(MODULES)
    return (matrix.layer, order, matrix.name)


def _is_taken(matrix: Matrix, modules: Sequence[str] | None, layers: Sequence[int] | None, embeddings: bool) -> bool:
    if matrix.layer < 0:
        return embeddings or matrix.module in (modules or ())
    return (modules is None or matrix.module in modules) and (layers is None or matrix.layer in layers)


def _unknown_module(module: str, known: list[str], topology: Topology) -> str:
    if module == "lm_head" and topology.tied:
        return "this model's lm_head is tied to its embedding; name embed_tokens instead."
    nearest = difflib.get_close_matches(module, known, n=1, cutoff=0)
    return f"the model has no module {module!r}, did you mean {nearest[0]!r}? It has {', '.join(known)}."


def _is_tied(config: dict[str, Any], text: dict[str, Any], matrices: Sequence[Matrix]) -> bool:
    """What the config says; without a word of it, a model that stores no head has it tied."""
    for part in (config, text):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return {"embedding", "head"} & {matrix.kind for matrix in matrices} == {"embedding"}


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
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json must give {key} as a positive whole number, not {value!r}; repair the config.")
    return value
