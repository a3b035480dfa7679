"""Small studies for tests of the grid: models in folders, hands, and a probe whose answers tell the live weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.models.topology import read_topology
from rlheals.reporting.schemas import SCHEMAS
from rlheals.restoration.checksum import checksum
from rlheals.restoration.plan import Subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

RUN = {"profile": "test", "model": "tiny", "seed": 0}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "tie_word_embeddings": False,
}


def llama_shapes(layers: int = 4, width: int = 128, inner: int = 384, words: int = 192) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{stem}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (width, inner), f"{stem}.input_layernorm.weight": (width,)}
    return shapes


def subjects(layers: int = 4, starts: Iterable[str] = (), **identities: str) -> Subjects:
    """Four different models and some starts; ``identities`` tells which are equal to others."""
    shapes = llama_shapes(layers)
    names = ["base", "sft_max_ood", "sft_end", "rl", *starts]
    known = {name: identities.get(name, name) for name in names}
    return Subjects(known, read_topology({**CONFIG, "num_hidden_layers": layers}, shapes), shapes, tuple(starts))


def hands(count: int = 2, split: str = "select") -> pl.DataFrame:
    """Hands of both conditions; only what the grid looks at."""
    rows = [
        {"condition": condition, "split": split, "hand_id": f"{condition}{i}"}
        for condition in ("id", "ood")
        for i in range(count)
    ]
    return pl.DataFrame(rows)


def answers(rows: pl.DataFrame, cell_id: str, solved: Callable[[str, int], bool], response: str = "") -> pl.DataFrame:
    """Schema ``answers``: one try a hand, solved as ``solved(condition, place)`` says."""
    records: list[dict[str, Any]] = []
    for place, hand in enumerate(rows.to_dicts()):
        good = solved(hand["condition"], place)
        names = {**RUN, "stage": "edit", "checkpoint_step": 0, "cell_id": cell_id}
        told = {
            "attempt": 1,
            "response": response,
            "verdict": "",
            "reward": 0.0,
            "tokens": 1,
            "engine": "",
            "sampling": "",
        }
        flags = {
            "solved": good,
            "solved_first_try": good,
            "solved_under_training_rule": False,
            "format_error": not good,
        }
        records.append({**names, **hand, **told, **flags, "fields_ok": True})
    return pl.DataFrame(records, schema=SCHEMAS["answers"])


def live_checksums(model: nn.Module) -> dict[str, str]:
    """Checksum of every parameter by name."""
    return {name: short_checksum(p.data) for name, p in model.named_parameters(remove_duplicate=False)}


def short_checksum(tensor: Tensor) -> str:
    """The checksum as a short text, which fits into a table."""
    return hashlib.sha256(checksum(tensor)).hexdigest()
