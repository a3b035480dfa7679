"""The Llama inside a Llama-3.2-Vision checkpoint: which of its tensors belong to it, and its config; no weights read.

Without an image, Mllama skips its cross-attention layers (``MllamaTextModel.forward`` of transformers) and its other
layers are those of Llama, so that what is left computes the same function of a text. Of the embedding, the rows beyond
the vocabulary are the image token's and never the answer to a text: the head has no rows for them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.models.checkpoint import CONFIG, REPAIR, name_some
from rlheals.models.topology import text_config

if TYPE_CHECKING:
    from collections.abc import Mapping

FAMILIES = ("mllama", "mllama_text_model")
ADDED_ROWS = 8
"""Rows of Mllama's embedding beyond its vocabulary, of which the first is the image token's."""
EMBEDDING = "model.embed_tokens.weight"
# As the hub and transformers on disk name them, as transformers does in memory, and the text model on its own.
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
_TEXT = re.compile(rf"^(?:{'|'.join(map(re.escape, _PREFIXES))})(?P<rest>(?:embed_tokens|layers|norm|lm_head)\..+)$")
_OTHER = re.compile(r"^(?:model\.)?(?P<part>vision_model|multi_modal_projector)\.")
_PARTS = {"vision_model": "vision tower", "multi_modal_projector": "projector"}
_CROSS_ATTENTION = "cross-attention layers"
# What LlamaConfig calls by the same name and means by it the same.
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_parameters",
)


@dataclass(frozen=True)
class Extraction:
    """What becomes of each tensor of an Mllama checkpoint.

    Attributes:
        config: content of the Llama's ``config.json``.
        sources: name in the checkpoint of each tensor of the Llama, in the order of the network.
        shapes: shape of each tensor of the Llama.
        layers: layer of the checkpoint that each layer of the Llama is.
        cross_attention_layers: layers of the checkpoint that are left out.
        left_out: every tensor that is left out, with the part of the checkpoint it belongs to.
        cut_rows: rows of the checkpoint's embedding that are left out.
        image_token: token id among them that stands for an image; None where the config names none.
    """

    config: dict[str, Any]
    sources: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[int, ...]
    cross_attention_layers: tuple[int, ...]
    left_out: dict[str, str]
    cut_rows: range
    image_token: int | None

    def layer_map(self) -> dict[str, Any]:
        """The content of ``layers.json``: where each layer was, for spectra published with the checkpoint's numbering.

        JSON has no numbers as keys, so the layers of the Llama are texts.
        """
        return {
            "mllama_layers": len(self.layers) + len(self.cross_attention_layers),
            "cross_attention_layers": list(self.cross_attention_layers),
            "llama_to_mllama": {str(ours): theirs for ours, theirs in enumerate(self.layers)},
        }


def check_family(config: Mapping[str, Any], where: str) -> None:
    """Check that a config describes an Mllama or its text model.

    Raises:
        UserError: it does not; for a model that is text already, it says that there is nothing to extract.
    """
    family = config.get("model_type")
    if family in FAMILIES:
        return
    if family is None:
        raise UserError(f"{where}/{CONFIG} names no model_type; {REPAIR}.")
    if any(isinstance(value, dict) and key.endswith("_config") for key, value in config.items() if "quant" not in key):
        raise UserError(
            f"{where} is a model of type {family}, whose parts are not known here; name a folder of Llama-3.2-Vision "
            "(model_type mllama)."
        )
    raise UserError(
        f"{where} is a model of type {family}, which has no vision part, so there is nothing to extract; use the "
        "folder as it is."
    )


def plan_extraction(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> Extraction:
    """Say of each tensor of an Mllama checkpoint where it goes.

    Args:
        config: content of its ``config.json``.
        shapes: shape of every tensor in its files.
        where: what errors call it.

    Raises:
        UserError: the config is no Mllama's or cannot be read; a tensor of the text model or of a cross-attention
            layer is missing, there twice, or of another shape; or a tensor belongs to no part of Mllama.
    """
    check_family(config, where)
    text, llama_config = _read_configs(config, where)
    crossed = tuple(n for n in range(text.num_hidden_layers) if n in text.cross_attention_layers)
    layers = tuple(n for n in range(text.num_hidden_layers) if n not in crossed)
    expected = _expected_shapes(text, layers, crossed)
    found, left_out = _sort_tensors(shapes, expected, where)
    image_rows = {EMBEDDING: (text.vocab_size, text.hidden_size)}
    sources = {_llama_name(rest, layers): found[rest] for rest in expected if not _is_crossed(rest, crossed)}
    left_out |= {found[rest]: _CROSS_ATTENTION for rest in expected if _is_crossed(rest, crossed)}
    return Extraction(
        config=llama_config,
        sources=sources,
        shapes={name: image_rows.get(name, shapes[source]) for name, source in sources.items()},
        layers=layers,
        cross_attention_layers=crossed,
        left_out=left_out,
        cut_rows=range(text.vocab_size, text.vocab_size + ADDED_ROWS),
        image_token=config.get("image_token_index", config.get("image_token_id")),
    )


def _read_configs(config: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """The text model's config as transformers reads it, with its defaults and old names of keys; and the Llama's."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    try:
        text = MllamaTextConfig.from_dict(text_config(config))
        return text, _llama_config(text)
    except Exception as error:  # the library raises many types for a bad config
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{where}/{CONFIG} describes no Mllama that can be built ({reason}); {REPAIR}.") from error


def _llama_config(text: Any) -> dict[str, Any]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{key: getattr(text, key) for key in _CARRIED},
        num_hidden_layers=len(set(range(text.num_hidden_layers)) - set(text.cross_attention_layers)),
        attention_dropout=text.dropout,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def _expected_shapes(text: Any, layers: tuple[int, ...], crossed: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model by its name without prefix, in the order of the network."""
    ordinary, crossing = _layer_shapes(text, "self_attn"), _layer_shapes(text, "cross_attn")
    head_size = text.hidden_size // text.num_attention_heads
    crossing |= {"cross_attn.q_norm.weight": (head_size,), "cross_attn.k_norm.weight": (head_size,)}
    crossing |= {"cross_attn_attn_gate": (1,), "cross_attn_mlp_gate": (1,)}
    expected: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (text.vocab_size + ADDED_ROWS, text.hidden_size),
    }
    for layer in sorted((*layers, *crossed)):
        kind = crossing if layer in crossed else ordinary
        expected |= {f"layers.{layer}.{name}": shape for name, shape in kind.items()}
    return {**expected, "norm.weight": (text.hidden_size,), "lm_head.weight": (text.vocab_size, text.hidden_size)}


def _layer_shapes(text: Any, attention: str) -> dict[str, tuple[int, ...]]:
    """What both kinds of layer have."""
    hidden, wide = text.hidden_size, text.intermediate_size
    narrow = hidden // text.num_attention_heads * text.num_key_value_heads
    return {
        "input_layernorm.weight": (hidden,),
        f"{attention}.q_proj.weight": (hidden, hidden),
        f"{attention}.k_proj.weight": (narrow, hidden),
        f"{attention}.v_proj.weight": (narrow, hidden),
        f"{attention}.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


def _sort_tensors(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The text model's tensors by their name without prefix, and the part that each of the others belongs to."""
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    problems = []
    for name, shape in shapes.items():
        other, text = _OTHER.match(name), _TEXT.match(name)
        rest = text["rest"] if text else ""
        if other:
            left_out[name] = _PARTS[other["part"]]
        elif rest not in expected:
            problems.append(f"{name} is unexpected")
        elif rest in found:
            problems.append(f"{name} is there a second time as {found[rest]}")
        elif shape != expected[rest]:
            problems.append(f"{name} has shape {list(shape)}, not {list(expected[rest])}")
        found.setdefault(rest, name)
    problems += [f"{rest} is missing" for rest in expected if rest not in found]
    if problems:
        raise UserError(
            f"{where} does not hold the Mllama its {CONFIG} describes: {name_some(problems)}. "
            "Use the config and weights of one and the same model."
        )
    return found, left_out


def _is_crossed(rest: str, crossed: tuple[int, ...]) -> bool:
    return rest.startswith("layers.") and int(rest.split(".")[1]) in crossed


def _llama_name(rest: str, layers: tuple[int, ...]) -> str:
    if rest.startswith("lm_head."):
        return rest
    if not rest.startswith("layers."):
        return f"model.{rest}"
    _, layer, inner = rest.split(".", 2)
    return f"model.layers.{layers.index(int(layer))}.{inner}"
