"""``rlheals restore``: give a model back what another one had, and write the result."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.commands._shared import EPILOG, Json, bytes_of, default_cache, device_named, factor_store, print_json
from rlheals.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.restoration.edit import Edit
    from rlheals.restoration.folder_edit import FolderEdit
    from rlheals.restoration.patch import PatchWriter


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("restore", epilog=EPILOG)(restore)


def restore(
    reference: Annotated[Path, typer.Argument(help="Hugging Face folder of the model to go back to.")],
    target: Annotated[Path, typer.Argument(help="Folder of the model to edit; it is not changed.")],
    operator: Annotated[
        str,
        typer.Option(
            help="directions, values, swap, reset, round_trip; with a dose: rotate, interpolate, remove_inside, "
            "remove_outside, random_rotation, noise."
        ),
    ] = "directions",
    basis: Annotated[
        str | None,
        typer.Option(help="What to take: uv, u, v, sigma or all.", show_default="the operator's own"),
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            help="Ranks: full, head:0.2, tail:64, ends:64-64, band:0.25-0.5. A number with a point is a share, without "
            "one a count: head:1.0 takes every rank, head:1 the first."
        ),
    ] = "full",
    layers: Annotated[str | None, typer.Option(help="Blocks, e.g. 0-9,12; all if absent.")] = None,
    modules: Annotated[str | None, typer.Option(help="Matrices, e.g. q_proj,v_proj; all of a block if absent.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Edit the embedding too.")] = False,
    head: Annotated[bool, typer.Option("--head", help="Edit the head too.")] = False,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Edit every tensor: tables, norm scales and biases too; not with windows."),
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Edit what is understood where other weights differ, too, and stay.")
    ] = False,
    dose: Annotated[float, typer.Option(help="How far, where the operator has a dose: 1 is all the way.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random controls.")] = 0,
    official: Annotated[
        bool, typer.Option("--official", help="Exactly as the scripts released with the paper do.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the edited model; an earlier output of rlheals there is replaced."),
    ] = None,
    patch: Annotated[Path | None, typer.Option(help="File for the change alone.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would change.")] = False,
    shard_gb: Annotated[float, typer.Option(min=0.0001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for finished decompositions.", show_default="~/.cache/rlheals")
    ] = None,
    cache_gib: Annotated[float, typer.Option(min=0.001, help="Largest size of the decompositions kept there.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Edit the weights of TARGET towards those of REFERENCE, without training, as a new folder or a patch file.

    The folder loads like any other: weights, config, tokenizer, templates, and a model card with the exact recipe.
    Reads and writes one tensor at a time, in start-up memory plus at most eight times the largest tensor as float32,
    whatever type it is stored in. Decompositions are kept in the cache `rlheals diagnose` uses.
    """
    from rlheals.restoration.folder_edit import FolderEdit
    from rlheals.restoration.grid import ModelSet

    shard_bytes = bytes_of("--shard-gb", shard_gb, 10**9)
    scope = _scope(layers, modules, embeddings, head, everything)
    edit = _edit(reference, target, operator, basis, window, scope, dose, seed, official)
    _check_outputs(out, patch, dry_run, (reference, target))
    if patch is not None and not dry_run and not edit.dose:
        raise UserError("a dose of 0 changes nothing, so there is nothing to patch; give a larger --dose.")
    folders = {edit.reference: reference, edit.target: target}
    store = factor_store(cache or default_cache(), cache_gib, device_named(device))
    with ModelSet(folders, store) as models:
        planned = FolderEdit(edit, models, partial=partial)
        if dry_run:
            _tell_plan(planned, as_json)
            return
        digest = _run(planned, out, patch, shard_bytes)
    _tell(planned, out, patch, digest, as_json)


def _scope(layers: str | None, modules: str | None, embeddings: bool, head: bool, everything: bool) -> Any:
    from rlheals.models.topology import parse_layers, parse_modules
    from rlheals.restoration.edit import Scope

    if everything and (layers is not None or modules is not None):
        raise UserError("--everything takes every tensor; leave out --layers and --modules, or leave it out.")
    if everything:
        return Scope(everything=True)
    named = () if modules is None else parse_modules(modules)
    return Scope(named, None if layers is None else tuple(parse_layers(layers)), embeddings=embeddings, head=head)


def _edit(
    reference: Path,
    target: Path,
    operator: str,
    basis: str | None,
    window: str,
    scope: Any,
    dose: float,
    seed: int,
    official: bool,
) -> Edit:
    from rlheals.restoration.edit import BASES, Edit
    from rlheals.restoration.folder_edit import model_names
    from rlheals.restoration.windows import parse_window

    names = model_names(reference, target)
    chosen = basis or BASES.get(operator, ("uv",))[0]  # an unknown operator is refused by Edit
    return Edit(operator, chosen, *names, scope, parse_window(window), dose, seed=seed, official=official)


def _check_outputs(out: Path | None, patch: Path | None, dry_run: bool, models: tuple[Path, ...]) -> None:
    from rlheals.restoration.patch import check_patch_target
    from rlheals.restoration.write_model import check_out

    if dry_run:
        return
    if out is None and patch is None:
        raise UserError(
            "say where to write: --out for a model folder, --patch for a patch file, or --dry-run for none."
        )
    if out is not None:
        check_out(out, *models)
    if patch is not None:
        if out is not None and patch.resolve().is_relative_to(out.resolve()):
            raise UserError(f"the patch {patch} would lie inside the model folder {out}; name a file outside.")
        check_patch_target(patch, *models)


def _run(planned: FolderEdit, out: Path | None, patch: Path | None, shard_bytes: int) -> str:
    """Edit every tensor once, into the folder, the patch, or both; the digest of the folder's weights, if any.

    Raises:
        UserError: both models hold the same weights and a patch is asked for; see also `_change_all`.
    """
    from rlheals.restoration.folder_edit import edit_card
    from rlheals.restoration.patch import PatchWriter, hash_weights, model_digest
    from rlheals.restoration.write_model import write_model

    for weights in (planned.reference, planned.target):
        hash_weights(weights)
    if patch is not None and model_digest(planned.reference) == model_digest(planned.target):
        raise UserError("both models hold the same weights, so there is nothing to patch; check which are named.")
    origin = planned.origin()
    digest = ""
    with ExitStack() as stack:
        writer = stack.enter_context(PatchWriter(patch)) if patch else None
        if out is not None:
            name = out.resolve().name
            digest = write_model(
                planned.target,
                lambda each: _changed(planned, each, writer),
                lambda found: edit_card(planned, origin, name, found),
                out,
                shard_bytes,
            )
        else:
            _change_all(planned, writer)
        if writer is not None:
            writer.finish([origin], writer.ends(planned.target))
    return digest


def _change_all(planned: FolderEdit, writer: PatchWriter | None) -> None:
    """Edit every tensor for the patch alone.

    Raises:
        UserError: none of them changes, and a patch without a change cannot be applied.
    """
    from rlheals.progress import Progress

    progress = Progress(f"editing {planned.target.path.name}", len(planned.names), "tensor")
    for name in planned.names:
        _changed(planned, name, writer)
        progress.update(note=name)
    if writer is not None and not writer.entries:
        raise UserError("the edit changes nothing, so there is nothing to patch; check that the models differ.")


def _changed(planned: FolderEdit, name: str, writer: PatchWriter | None) -> Tensor | None:
    edited = planned.edited(name)
    if edited is None:
        return None
    if writer is not None:
        writer.add(name, planned.target.tensor(name), edited.tensor)
    return edited.tensor


def _tell_plan(planned: FolderEdit, as_json: bool) -> None:
    changes = planned.planned()
    if as_json:
        tensors = [{"tensor": c.name, "shape": list(c.shape), "ranks": c.ranks} for c in changes]
        print_json({"recipe": planned.edit.recipe(), "would_change": tensors})
        return
    typer.echo(f"{planned.edit.cell_id}: {len(changes)} of {len(planned.target.shapes)} tensors would change")
    for change in changes:
        typer.echo(f"  {change.name}  {list(change.shape)}  {change.ranks and f'ranks {change.ranks}'}".rstrip())


def _tell(planned: FolderEdit, out: Path | None, patch: Path | None, digest: str, as_json: bool) -> None:
    from math import isfinite

    from rlheals.restoration.folder_edit import relative_told

    changed = [change for change in planned.changes if change.relative]
    left = planned.left
    if as_json:
        print_json(
            {
                "recipe": planned.edit.recipe(),
                "notes": planned.notes,
                "left_although_different": {
                    each.name: {"part": each.part, "relative": each.relative if isfinite(each.relative) else None}
                    for each in left.differing
                },
                "changed": {
                    c.name: {"relative": c.relative if isfinite(c.relative) else None, "defect": c.defect}
                    for c in changed
                },
                "weights_sha256": digest or None,
                "out": str(out) if out else None,
                "patch": str(patch) if patch else None,
            }
        )
        return
    largest = max(changed, key=lambda change: change.relative, default=None)
    typer.echo(
        f"{planned.edit.cell_id}: {len(planned.changed)} of {len(planned.target.shapes)} tensors changed"
        + (
            f", {largest.name} most (relative norm {relative_told(largest.relative)})"
            if largest
            else "; the edit changes nothing"
        )
    )
    for note in planned.notes:
        typer.echo(note)
    if left.differing:
        typer.echo(f"left as they are although they differ: {', '.join(left.parts)}; --everything takes them too")
    for path in (out, patch):
        if path is not None:
            typer.echo(f"wrote {path}")
