"""``rlheals extract-text``: the text model of a Llama-3.2-Vision folder as a plain Llama folder."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from rlheals.commands._shared import EPILOG, Json, print_json

if TYPE_CHECKING:
    from rlheals.models.extract_text import Extracted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("extract-text", epilog=EPILOG)(extract_text)


def extract_text(
    model: Annotated[Path, typer.Argument(help="Folder of a Llama-3.2-Vision model; it is not changed.")],
    out: Annotated[Path, typer.Argument(help="New folder for the text model.")],
    shard_gb: Annotated[float, typer.Option(min=0.0001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Write the text model of MODEL as a plain Llama folder, which gives the same answers to texts without images.

    The self-attention layers, embedding, norm and head are copied bit for bit; vision tower, projector, cross-attention
    layers and the embedding's rows for images are left out. Reads and writes one tensor at a time. OUT holds config,
    tokenizer, a model card, and layers.json, which says which layer of MODEL each layer was.
    """
    from rlheals.models.extract_text import extract_text as extract

    _tell(extract(model, out, round(shard_gb * 10**9)), out, as_json)


def _tell(done: Extracted, out: Path, as_json: bool) -> None:
    from rlheals.models.extract_text import LAYERS, cut_rows_told, left_out_parts

    plan = done.plan
    parts = left_out_parts(plan)
    if as_json:
        print_json(
            {
                "out": str(out),
                "parameters": done.parameters,
                "weights_sha256": done.weights_sha256,
                "source": done.source,
                "left_out": parts,
                "cut_rows": [plan.cut_rows.start, plan.cut_rows.stop],
                **plan.layer_map(),
            }
        )
        return
    typer.echo(
        f"wrote {out}: a Llama of {len(plan.layers)} layers and {done.parameters:,} parameters, sha256 of the weights "
        f"{done.weights_sha256}"
    )
    typer.echo(f"  left out: {', '.join(f'{part} ({count} tensors)' for part, count in parts.items()) or 'nothing'}")
    typer.echo(f"  {cut_rows_told(plan)}")
    typer.echo(f"  {LAYERS} says which layer of {done.source['name']} each layer was")
