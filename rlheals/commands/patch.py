"""``rlheals patch``: the change of a model as a file of its own: made, applied, undone, joined, shown, exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.commands._shared import EPILOG, Json, bytes_of, print_json

if TYPE_CHECKING:
    from rlheals.restoration.patch import Entry, Origin, Patch

PatchFile = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch file.")]
OutFile = Annotated[Path, typer.Option("--out", help="File for the new patch.")]
SameTensors = Annotated[
    bool,
    typer.Option(
        "--same-tensors-only", help="Accept another model as long as the tensors that the patch changes are the same."
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="New folder; an earlier output of rlheals there is replaced.")]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        help="The change of a model as a file of its own, exact to the bit.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for command in (make, apply, invert, compose, show, digest, lora):
        group.command(epilog=EPILOG)(command)
    app.add_typer(group, name="patch")


def make(
    before: Annotated[Path, typer.Argument(help="Hugging Face folder of the model before.")],
    after: Annotated[Path, typer.Argument(help="Folder of the model after, of the same architecture and type.")],
    out: OutFile,
    as_json: Json = False,
) -> None:
    """Write what leads from BEFORE to AFTER; each tensor's change is applied once to check that it is exact."""
    from rlheals.restoration.patch import make_patch

    make_patch(before, after, out)
    _tell(out, as_json)


def apply(
    patch: PatchFile,
    model: Annotated[Path, typer.Argument(help="Folder of the model it was made for; it is not changed.")],
    out: OutFolder,
    same_tensors_only: SameTensors = False,
    shard_gb: Annotated[float, typer.Option(min=0.0001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Write MODEL with the patch applied: bit for bit the edited weights; a model that differs anywhere is refused."""
    from rlheals.restoration.folder_edit import patch_card
    from rlheals.restoration.patch import Patch, identify
    from rlheals.restoration.tied import twins
    from rlheals.restoration.write_model import check_out, write_model
    from rlheals.spectra.reader import Weights

    shard_bytes = bytes_of("--shard-gb", shard_gb, 10**9)
    check_out(out, model, patch)
    with Patch(patch) as opened, Weights(model) as weights:
        opened.check_base(weights, same_tensors_only=same_tensors_only)
        source, title = identify(weights), out.resolve().name
        sources = {name: name for name in opened.entries}
        if source["weights_sha256"] != opened.models.before:
            # A tied head that this model stores and the patch's own did not has to follow the embedding.
            sources |= twins(weights, opened.entries)
        names = [name for name in weights.shapes if name in sources]
        digest = write_model(
            weights,
            lambda name: opened.apply(sources[name], weights.tensor(sources[name])) if name in sources else None,
            lambda found: patch_card(opened.origins, source, names, title, found),
            out,
            shard_bytes,
        )
    if as_json:
        print_json({"out": str(out), "changed": names, "weights_sha256": digest})
        return
    typer.echo(f"wrote {out}: {len(names)} tensors changed, sha256 of the weights {digest}")


def invert(patch: PatchFile, out: OutFile, as_json: Json = False) -> None:
    """Write the patch that undoes PATCH."""
    from rlheals.restoration.patch import invert_patch

    invert_patch(patch, out)
    _tell(out, as_json)


def compose(
    first: Annotated[Path, typer.Argument(help="The patch to apply first.")],
    second: Annotated[Path, typer.Argument(help="The patch to apply to what the first gives.")],
    out: OutFile,
    as_json: Json = False,
) -> None:
    """Write one patch that does what FIRST and then SECOND do; a change that cancels out is dropped."""
    from rlheals.restoration.patch import compose_patches

    compose_patches(first, second, out)
    _tell(out, as_json)


def show(patch: PatchFile, as_json: Json = False) -> None:
    """Print what a patch changes, what made it, and which model it is for."""
    _tell(patch, as_json)


def digest(
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder of a model.")],
    as_json: Json = False,
) -> None:
    """Print the sha256 of a model's weights, the same however they are cut into files: what patches know it by."""
    from rlheals.restoration.patch import hash_weights, model_digest
    from rlheals.spectra.reader import Weights

    with Weights(model) as weights:
        hash_weights(weights)
        found = model_digest(weights)
    if as_json:
        print_json({"model": str(model), "weights_sha256": found})
        return
    typer.echo(f"{found}  {model}")


def lora(
    patch: PatchFile,
    model: Annotated[Path, typer.Argument(help="Folder of the model it was made for.")],
    out: OutFolder,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank.", show_default="a quarter of each matrix's")
    ] = None,
    same_tensors_only: SameTensors = False,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest relative error of a tensor's change, beyond rounding.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Write a LoRA adapter in the format of PEFT, if each tensor's change is of low rank.

    An adapter is close to the patch but not exact: the largest error is printed.
    """
    from dataclasses import asdict

    from rlheals.restoration.adapter import export_lora

    done = export_lora(patch, model, out, most=rank, tolerance=tolerance, same_tensors_only=same_tensors_only)
    if as_json:
        print_json({"out": str(out), "adapted": [asdict(each) for each in done]})
        return
    ranks = sorted({each.rank for each in done})
    typer.echo(
        f"wrote {out}: {len(done)} matrices, ranks {ranks[0]} to {ranks[-1]}, largest relative error of a change "
        f"{max(each.error for each in done):.2g}"
    )


def _tell(path: Path, as_json: bool) -> None:
    from rlheals.restoration.patch import Patch

    with Patch(path) as patch:
        if as_json:
            print_json(as_content(patch))
            return
        weights = sum(_weight_bytes(entry) for entry in patch.entries.values())
        typer.echo(f"{path}: {len(patch.entries)} tensors, {patch.bytes:,} bytes for {weights:,} bytes of weights")
        typer.echo(f"  for the model of weights sha256 {patch.models.before or 'not known'}")
        typer.echo(f"  gives the model of weights sha256 {patch.models.after or 'not known'}")
        for number, origin in enumerate(patch.origins):
            typer.echo(f"  {_origin(origin, patch.given if number == 0 else 'the model that the change gave')}")
        for name, entry in patch.entries.items():
            kind = ", ".join(f"rank {rank} with what rounding left" if rank else "each number" for rank in entry.ranks)
            typer.echo(f"  {name}  {entry.dtype} {list(entry.shape)}  {kind}; for sha256 {entry.before[:12]}…")


def as_content(patch: Patch) -> dict[str, Any]:
    """What ``--json`` prints of a patch."""
    from dataclasses import asdict

    return {
        "patch": str(patch.path),
        "bytes": patch.bytes,
        "models": asdict(patch.models),
        "origins": [asdict(origin) for origin in patch.origins],
        "tensors": {name: asdict(entry) for name, entry in patch.entries.items()},
    }


def _origin(origin: Origin, given: str) -> str:
    """One change of a patch; ``given`` is the model that it gave, which is what an inverted one is for."""
    from rlheals.restoration.edit import from_recipe

    what = from_recipe(origin.recipe).cell_id if origin.recipe else "the difference of two models"
    if origin.inverted:
        return f"undoes {what}, for {given}"
    return f"{what}, made for {origin.target.get('name', 'an unnamed model')}"


def _weight_bytes(entry: Entry) -> int:
    from math import prod

    from rlheals.restoration.tensor_file import DTYPES

    return prod(entry.shape) * DTYPES[entry.dtype].itemsize
