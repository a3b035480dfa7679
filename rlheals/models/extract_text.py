"""Write the text model of a Llama-3.2-Vision folder as a plain Llama folder, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from rlheals import __version__
from rlheals.errors import UserError, disk_errors
from rlheals.models.checkpoint import CONFIG, GENERATION_CONFIG, generation_config, read_json
from rlheals.models.mllama import EMBEDDING, Extraction, check_family, plan_extraction
from rlheals.models.topology import read_topology
from rlheals.restoration.patch import hash_weights, identify, tensor_digest
from rlheals.restoration.write_model import SHARD_BYTES, check_out, write_model
from rlheals.spectra.reader import Weights

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = "layers.json"
# What a text model needs beside weights and config; processors of images and training state stay behind.
_COPIED = (
    GENERATION_CONFIG,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_TEMPLATES = ("additional_chat_templates", "chat_templates")


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        plan: where each tensor went.
        parameters: weights of the Llama.
        source: name and sha256 of the weights it was taken from.
        weights_sha256: `rlheals.restoration.patch.model_digest` of the Llama.
    """

    plan: Extraction
    parameters: int
    source: dict[str, str]
    weights_sha256: str


class TextWeights(Weights):
    """The Llama inside an open Mllama folder, read as if it were a folder of its own.

    It borrows the files of ``source``, so it opens none and is closed with it. ``path`` is the folder of the files that
    go along with the weights.
    """

    def __init__(self, source: Weights, plan: Extraction, path: Path) -> None:
        self.path, self.config, self.shapes = path, plan.config, plan.shapes
        self.dtypes = {name: source.dtypes[theirs] for name, theirs in plan.sources.items()}
        self.weight_bytes = sum(math.prod(plan.shapes[n]) * _itemsize(dtype) for n, dtype in self.dtypes.items())
        self.topology = read_topology(plan.config, plan.shapes)
        self._source, self._plan = source, plan

    def close(self) -> None:
        """Nothing: the files are the source's."""

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name`` of the Llama; of the embedding, the rows of the vocabulary. Else as `Weights.tensor`."""
        tensor = self._source.tensor(self._plan.sources[name])
        return tensor[: self._plan.cut_rows.start] if name == EMBEDDING else tensor

    def digest(self, name: str) -> str:
        """As `Weights.digest`."""
        return tensor_digest(self.tensor(name)) if name == EMBEDDING else self._source.digest(self._plan.sources[name])


def extract_text(model: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Extracted:
    """Write the text model of the Mllama folder ``model`` as the Llama folder ``out``, whole or not at all.

    Args:
        model: a folder of Llama-3.2-Vision, or of its text model with the cross-attention layers; it is not changed.
        out: a new folder, or one that rlheals wrote before; it gets a manifest.
        shard_bytes: size that no weight file exceeds, unless a single tensor does.

    Raises:
        UserError: ``model`` is no Mllama, damaged, or holds other tensors than its config describes; ``out`` is not
            free, lies in ``model`` or holds it, or cannot be written.
    """
    check_places(model, out)
    if (model / CONFIG).is_file():
        check_family(read_json(model / CONFIG), str(model))  # before a manifest's digests make it read all weights
    with Weights(model) as source, TemporaryDirectory(prefix="rlheals-") as beside:
        plan = plan_extraction(source.config, source.shapes, str(model))
        plan.config["dtype"] = source.dtypes[plan.sources[EMBEDDING]]
        # Where no file is there to be copied, config.json alone says which tokens end a response.
        plan.config["eos_token_id"] = generation_config(model).eos_token_id
        with disk_errors(Path(beside)):
            _gather(model, Path(beside), plan)
        hash_weights(source)
        text = TextWeights(source, plan, Path(beside))
        name, origin = out.resolve().name, identify(source)
        digest = write_model(text, lambda _: None, lambda found: _card(plan, origin, name, found), out, shard_bytes)
    return Extracted(plan, sum(map(math.prod, plan.shapes.values())), origin, digest)


def check_places(model: Path, out: Path) -> None:
    """Make sure that writing ``out`` changes nothing in ``model`` and nothing that rlheals did not write.

    Raises:
        UserError: it would.
    """
    if out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"{out} is or lies in {model}, which is read; name another folder to write to.")
    check_out(out, model)


def _gather(model: Path, folder: Path, plan: Extraction) -> None:
    """Put into ``folder`` what goes along with the weights, for `write_model` to copy."""
    for pattern in _COPIED:
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for name in _TEMPLATES:
        if (model / name).is_dir():
            shutil.copytree(model / name, folder / name, copy_function=shutil.copyfile)
    for name, content in ((CONFIG, plan.config), (LAYERS, plan.layer_map())):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def left_out_parts(plan: Extraction) -> dict[str, int]:
    """How many tensors of each part of the checkpoint are left out."""
    parts = list(plan.left_out.values())
    return {part: parts.count(part) for part in sorted(set(parts))}


def cut_rows_told(plan: Extraction) -> str:
    """One sentence on the rows that the embedding lost."""
    rows = plan.cut_rows
    span = f"rows {rows.start} to {rows.stop - 1}"
    image = f" ({plan.image_token} is the image token's)" if plan.image_token in rows else ""
    return (
        f"the embedding is cut from {rows.stop} to {rows.start} rows: {span} went{image}, so these ids cannot be in a "
        "prompt"
    )


def _card(plan: Extraction, source: dict[str, str], title: str, digest: str) -> str:
    parts = [f"- {part}: {count} tensors" for part, count in left_out_parts(plan).items()]
    rows = [f"| {ours} | {theirs} |" for ours, theirs in enumerate(plan.layers)]
    return "\n".join(
        [
            *("---", "library_name: transformers", "tags:", "- rlheals", "---", "", f"# {title}", ""),
            f"The text model of `{source['name']}` as a plain Llama, taken out by rlheals {__version__} with torch "
            f"{torch.__version__}. No weight is changed: of a text without an image, both compute the same.",
            "",
            "| | model | sha256 of the weights |",
            "|---|---|---|",
            f"| source | {source['name']} | `{source['weights_sha256']}` |",
            f"| this model | | `{digest}` |",
            "",
            "## Left out",
            "",
            *parts,
            f"- {cut_rows_told(plan)}, though the tokenizer is unchanged",
            "",
            "## Layers",
            "",
            f"What is published on the source counts its {len(plan.layers) + len(plan.cross_attention_layers)} layers; "
            f"`{LAYERS}` has this table for programs.",
            "",
            "| layer here | layer of the source |",
            "|---|---|",
            *rows,
            "",
            f"The licence and terms of `{source['name']}` apply to this model too.",
            "",
        ]
    )


def _itemsize(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize
