"""``rlheals patch``: the change of a model as a file of its own: made, applied, undone, joined, shown, exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.commands._shared import EPILOG, Json, bytes_of, default_cache, device_named, factor_store, print_json
from rlheals.errors import UserError

if TYPE_CHECKING:
    from rlheals.restoration.patch import Patch

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
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch file, or a recipe of `rlheals restore`.")],
    model: Annotated[Path, typer.Argument(help="Folder of the model it was made for; it is not changed.")],
    out: OutFolder,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of the model to go back to; a recipe needs it, a patch does not.")
    ] = None,
    same_tensors_only: SameTensors = False,
    shard_gb: Annotated[float, typer.Option(min=0.0001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for finished decompositions, of a recipe.", show_default="~/.cache/rlheals"),
    ] = None,
    cache_gib: Annotated[float, typer.Option(min=0.001, help="Largest size of the decompositions kept there.")] = 20,
    as_json: Json = False,
) -> None:
    """Write MODEL with the patch applied: bit for bit the edited weights; a model that differs anywhere is refused.

    A recipe is made again from MODEL and the model to go back to. Where a machine rounds otherwise, so that the
    weights are not bit for bit the promised ones, nothing is written.
    """
    from rlheals.restoration.recipe import is_recipe

    shard_bytes = bytes_of("--shard-gb", shard_gb, 10**9)
    if not is_recipe(patch):
        if reference is not None:
            raise UserError(f"{patch} is no recipe, and a patch needs no model to go back to; leave out --reference.")
        names, digest = _apply_patch(patch, model, out, shard_bytes, same_tensors_only)
    else:
        if reference is None:
            raise UserError(
                f"{patch} is a recipe, which is made again from both models; name the other by --reference."
            )
        if same_tensors_only:
            raise UserError(f"{patch} is a recipe, which is for whole models; leave out --same-tensors-only.")
        names, digest = _apply_recipe(patch, reference, model, out, shard_bytes, (cache or default_cache(), cache_gib))
    if as_json:
        print_json({"out": str(out), "changed": names, "weights_sha256": digest})
        return
    typer.echo(f"wrote {out}: {len(names)} tensors changed, sha256 of the weights {digest}")


def _apply_recipe(
    file: Path, reference: Path, model: Path, out: Path, shard_bytes: int, cache: tuple[Path, float]
) -> tuple[list[str], str]:
    """Names of the changed tensors, and the digest of the whole."""
    from rlheals.restoration.write_edit import apply_recipe

    planned, digest = apply_recipe(
        file, reference, model, out, lambda device: factor_store(*cache, device_named(device)), shard_bytes
    )
    return [change.name for change in planned.changes if change.relative], digest


def _apply_patch(
    patch: Path, model: Path, out: Path, shard_bytes: int, same_tensors_only: bool
) -> tuple[list[str], str]:
    """The same of a patch file."""
    from rlheals.restoration.folder_edit import patch_card
    from rlheals.restoration.patch import Patch, identify
    from rlheals.restoration.tied import twins
    from rlheals.restoration.write_model import check_out, write_model
    from rlheals.spectra.reader import Weights

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
            lambda found: patch_card(opened.origins, weights.path, source, names, title, found),
            out,
            shard_bytes,
        )
    return names, digest


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


def show(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch file, or a recipe of `rlheals restore`.")],
    as_json: Json = False,
) -> None:
    """Print what a patch or a recipe changes, what made it, and which model it is for."""
    from rlheals.commands._patch_text import recipe_lines
    from rlheals.restoration.recipe import as_content as recipe_content
    from rlheals.restoration.recipe import is_recipe, read_recipe

    if not is_recipe(patch):
        _tell(patch, as_json)
        return
    recipe = read_recipe(patch)
    if as_json:
        print_json({"recipe_file": str(patch), "bytes": patch.stat().st_size, **recipe_content(recipe)})
        return
    for line in recipe_lines(recipe, str(patch)):
        typer.echo(line)


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
    from rlheals.commands._patch_text import patch_lines
    from rlheals.restoration.patch import Patch

    with Patch(path) as patch:
        if as_json:
            print_json(as_content(patch))
            return
        for line in patch_lines(patch):
            typer.echo(line)


def as_content(patch: Patch) -> dict[str, Any]:
    """What ``--json`` prints of a patch."""
    from dataclasses import asdict

    return {
        "patch": str(patch.path),
        "bytes": patch.bytes,
        "weight_bytes": patch.weight_bytes,
        "models": asdict(patch.models),
        "origins": [asdict(origin) for origin in patch.origins],
        "tensors": {name: asdict(entry) for name, entry in patch.entries.items()},
    }
