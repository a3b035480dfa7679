"""``rlheals restore``: give a model back what another one had, and write the result."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.commands._shared import EPILOG, Json, bytes_of, default_cache, device_named, factor_store, print_json
from rlheals.errors import UserError

if TYPE_CHECKING:
    from rlheals.restoration.edit import Edit
    from rlheals.restoration.folder_edit import FolderEdit
    from rlheals.restoration.write_edit import Outputs

PLAIN, BY_RANKS = "interpolate", "directions"
"""The operator where none is named: without and with a window, a basis or the released scripts' ways."""
PLAIN_DOSE = 0.75
"""The dose of a plain step where none is given: in the study and on a real model it brought most of what was lost back,
for 0 to 10 points of the task; beyond .8 the task may fall off (docs/restoration.md)."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("restore", epilog=EPILOG)(restore)


def restore(
    reference: Annotated[Path, typer.Argument(help="Hugging Face folder of the model to go back to.")],
    target: Annotated[Path, typer.Argument(help="Folder of the model to edit; it is not changed.")],
    operator: Annotated[
        str | None,
        typer.Option(
            help="directions, values, swap, reset, round_trip; with a dose: rotate, interpolate, remove_inside, "
            "remove_outside, random_rotation, noise.",
            show_default=f"{PLAIN}; {BY_RANKS} with --window, --basis or --official",
        ),
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option(help="What to take: uv, u, v, sigma or all.", show_default="the operator's own"),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="Ranks: full, head:0.2, tail:64, ends:64-64, band:0.25-0.5. A number with a point is a share, without "
            "one a count: head:1.0 takes every rank, head:1 the first.",
            show_default="full",
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, e.g. 0-9,12; all if absent.")] = None,
    modules: Annotated[str | None, typer.Option(help="Matrices, e.g. q_proj,v_proj; all of a block if absent.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Edit the embedding too.")] = False,
    head: Annotated[bool, typer.Option("--head", help="Edit the head too.")] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything", help="Edit every tensor, norm scales and biases too (swap, interpolate, reset, noise)."
        ),
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Go on where weights of unknown kinds differ; they stay as they are.")
    ] = False,
    dose: Annotated[
        float | None,
        typer.Option(
            help="How far, where the operator has a dose: 1 is all the way.",
            show_default=f"{PLAIN_DOSE:g} of {PLAIN}, 1 of the others",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random controls.")] = 0,
    official: Annotated[
        bool, typer.Option("--official", help="Exactly as the scripts released with the paper do.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the edited model; an earlier output of rlheals there is replaced."),
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(help="File for the change alone, exact on any machine; as large as what it changes.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="File (JSON, about a kilobyte) for the edit and the sha256 of both models and the result, for whoever "
            "has the models: `rlheals patch apply` makes the same weights or says that it cannot."
        ),
    ] = None,
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

    Without further options it goes three quarters of the straight way back, which in the study and on a real model
    brought most of what was lost back, at a price in the task that has to be measured. The folder loads like any
    other: weights, config, tokenizer, templates, and a model card with the exact recipe. Reads and writes one tensor at
    a time, in start-up memory plus at most eight times the largest tensor as float32, whatever type it is stored in.
    Decompositions are kept in the cache `rlheals diagnose` uses.
    """
    from rlheals.restoration.folder_edit import FolderEdit
    from rlheals.restoration.grid import ModelSet
    from rlheals.restoration.write_edit import Outputs, write_edit

    outputs = Outputs(out, patch, recipe, bytes_of("--shard-gb", shard_gb, 10**9))
    scope = _scope(layers, modules, embeddings, head, everything)
    named = operator or (BY_RANKS if window or basis or official else PLAIN)
    how_far = dose if dose is not None else PLAIN_DOSE if named == PLAIN else 1.0
    edit = _edit(reference, target, named, basis, window or "full", scope, how_far, seed, official)
    if not dry_run:
        _check_outputs(outputs, (reference, target))
        if outputs.change_alone and not edit.dose:
            raise UserError("a dose of 0 changes nothing, so there is nothing to patch; give a larger --dose.")
    folders = {edit.reference: reference, edit.target: target}
    chosen = device_named(device)
    store = factor_store(cache or default_cache(), cache_gib, chosen)
    with ModelSet(folders, store) as models:
        planned = FolderEdit(edit, models, partial=partial)
        if dry_run:
            _tell_plan(planned, as_json)
            return
        digest = write_edit(planned, outputs, chosen)
    if as_json:
        print_json(as_content(planned, outputs, digest))
        return
    _tell(planned, outputs)
    if store.factorised or store.hits:
        typer.echo(store.told())


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


def _check_outputs(outputs: Outputs, models: tuple[Path, ...]) -> None:
    from rlheals.restoration.patch import check_patch_target
    from rlheals.restoration.recipe import check_recipe_target
    from rlheals.restoration.write_model import check_out

    if not outputs.paths:
        raise UserError(
            "say where to write: --out for a model folder, --patch for a patch file, --recipe for the edit alone, or "
            "--dry-run for none."
        )
    if outputs.folder is not None:
        check_out(outputs.folder, *models)
    files = {"patch": (outputs.patch, check_patch_target), "recipe": (outputs.recipe, check_recipe_target)}
    for name, (file, check) in files.items():
        if file is None:
            continue
        if outputs.folder is not None and file.resolve().is_relative_to(outputs.folder.resolve()):
            raise UserError(
                f"the {name} {file} would lie inside the model folder {outputs.folder}; name a file outside."
            )
        check(file, *models)
    if outputs.patch is not None and outputs.recipe is not None and outputs.patch.resolve() == outputs.recipe.resolve():
        raise UserError(f"{outputs.patch} cannot be both the patch and the recipe; name two files.")


def _tell_plan(planned: FolderEdit, as_json: bool) -> None:
    changes = planned.planned()
    if as_json:
        tensors = [{"tensor": c.name, "shape": list(c.shape), "ranks": c.ranks} for c in changes]
        print_json({"recipe": planned.edit.recipe(), "would_change": tensors})
        return
    typer.echo(f"{planned.edit.cell_id}: {len(changes)} of {len(planned.target.shapes)} tensors would change")
    for change in changes:
        typer.echo(f"  {change.name}  {list(change.shape)}  {change.ranks and f'ranks {change.ranks}'}".rstrip())


def as_content(planned: FolderEdit, outputs: Outputs, digest: str) -> dict[str, Any]:
    """What ``--json`` prints: the edit, what changed by how much, and what was written."""
    from math import isfinite

    content: dict[str, Any] = {
        "recipe": planned.edit.recipe(),
        "changed": {
            c.name: {"relative": c.relative if isfinite(c.relative) else None, "defect": c.defect}
            for c in planned.changes
            if c.relative
        },
        "notes": planned.notes,
        "left_although_different": {
            each.name: {"part": each.part, "relative": each.relative if isfinite(each.relative) else None}
            for each in planned.left.differing
        },
        "weights_sha256": digest,
    }
    places = {"out": outputs.folder, "patch": outputs.patch, "recipe_file": outputs.recipe}
    content |= {name: str(path) if path else None for name, path in places.items()}
    if outputs.patch is not None:
        patch_bytes, weight_bytes = _sizes(outputs.patch)
        content |= {"patch_bytes": patch_bytes, "patch_weight_bytes": weight_bytes}
    return content


def _sizes(file: Path) -> tuple[int, int]:
    """Bytes of a patch and of the weights that it changes."""
    from rlheals.restoration.patch import Patch

    with Patch(file) as patch:
        return patch.bytes, patch.weight_bytes


def _tell(planned: FolderEdit, outputs: Outputs) -> None:
    from rlheals.commands._patch_text import size_told
    from rlheals.restoration.folder_edit import relative_told

    changed = [change for change in planned.changes if change.relative]
    largest = max(changed, key=lambda change: change.relative, default=None)
    most = f", {largest.name} most (relative norm {relative_told(largest.relative)})" if largest else ""
    typer.echo(
        f"{planned.edit.cell_id}: {len(planned.changed)} of {len(planned.target.shapes)} tensors changed"
        + (most or "; the edit changes nothing")
    )
    if outputs.folder is not None:
        typer.echo(f"wrote {outputs.folder}")
    if outputs.patch is not None:
        typer.echo(f"wrote {outputs.patch}: {size_told(*_sizes(outputs.patch))}")
    if outputs.recipe is not None:
        typer.echo(
            f"wrote {outputs.recipe}: {outputs.recipe.stat().st_size:,} bytes; whoever has both models makes the same "
            f"weights of it by `rlheals patch apply {outputs.recipe.name} TARGET --reference REFERENCE --out DIR`."
        )
    for note in planned.notes:
        typer.echo(note)
    if planned.left.differing:
        parts = ", ".join(planned.left.parts)
        typer.echo(f"left as they are although they differ: {parts}; --everything takes them too")
    if largest is not None:
        for line in next_steps(planned, outputs):
            typer.echo(line)


def next_steps(planned: FolderEdit, outputs: Outputs) -> list[str]:
    """What to do with what was written: judge it, try other doses, undo it."""
    lines = []
    if outputs.folder is not None:
        lines.append(
            f"next: ask {outputs.folder} and {planned.target.path} the same questions, in and out of what it was tuned "
            f"for; of the card game `rlheals eval {outputs.folder}` asks them, elsewhere use an evaluation of your own."
        )
    if planned.edit.operator == PLAIN:
        lines.append(
            "next: try doses from 0.5 to 0.95 (--dose): a larger one brings more back, until it takes the tuning along."
        )
    elif planned.edit.operator == BY_RANKS:
        lines.append(f"next: compare with a plain step, --operator {PLAIN} --dose {PLAIN_DOSE:g}, which may do more.")
    if outputs.patch is not None:
        lines.append(f"undo: `rlheals patch invert {outputs.patch} --out FILE` writes the way back.")
    return lines
