"""``rlheals prune``: remove outputs of runs that params.yaml no longer declares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlheals.commands._shared import EPILOG, Json, print_json

if TYPE_CHECKING:
    from rlheals.orchestration.prune import Leftover


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("prune", epilog=EPILOG)(prune)


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Remove outputs of runs that params.yaml no longer declares, in the current profile.

    Removed are the outputs and dvc.lock entries of stages that dvc.yaml no longer makes, and folders under
    data/<profile> that a stage published and none declares. Other profiles, files of yours, and DVC's cache stay: a run
    that is declared again comes back from the cache with `dvc repro`.
    """
    from rlheals.errors import EXIT_BAD_INPUT, UserError
    from rlheals.orchestration.prune import find_leftovers, profile_of, remove_leftovers

    if as_json and not (yes or dry_run):
        raise UserError("--json asks no questions; add --dry-run or --yes.")
    root = Path.cwd()
    leftovers = find_leftovers(root)
    doomed = [leftover for leftover in leftovers if not leftover.keep]
    kept = [leftover for leftover in leftovers if leftover.keep]
    if not as_json:
        _show(profile_of(root), doomed, kept)
    removed = bool(doomed) and not dry_run and (yes or _confirmed())
    if removed:
        remove_leftovers(root, leftovers, say=lambda text: typer.echo(text, err=True))
    if as_json:
        content = {"removed": removed, "leftovers": [_record(leftover) for leftover in doomed]}
        print_json({"profile": profile_of(root), **content, "kept": [_record(leftover) for leftover in kept]})
    elif removed:
        typer.echo("removed; DVC's cache is as it was: declare a run again and `dvc repro` restores it.")
        typer.echo("To free the cache as well, read what docs/orchestration.md says about `dvc gc` first.")
    if kept:
        raise typer.Exit(EXIT_BAD_INPUT)


def _show(profile: str, doomed: list[Leftover], kept: list[Leftover]) -> None:
    if not doomed:
        typer.echo(f"nothing to remove: everything of profile {profile} is declared in params.yaml and dvc.yaml.")
    for leftover in doomed:
        typer.echo(f"{_size(leftover.size):>9}  {_name(leftover)}{_warning(leftover)}")
    if doomed:
        typer.echo(f"{_size(sum(leftover.size for leftover in doomed)):>9}  in all, profile {profile}")
    for leftover in kept:
        typer.echo(f"kept {_name(leftover)}: {leftover.keep}.", err=True)


def _name(leftover: Leftover) -> str:
    place = ", ".join(leftover.paths) or "nothing on disk"
    return f"{place} ({leftover.stage} in dvc.lock)" if leftover.stage else place


def _warning(leftover: Leftover) -> str:
    return "" if leftover.cached or not leftover.paths else "  [not in DVC's cache: cannot be restored]"


def _record(leftover: Leftover) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(leftover)


def _confirmed() -> bool:
    from rlheals.errors import UserError

    try:
        agreed = typer.confirm("Remove these?")
    except typer.Abort:
        raise UserError("there was no answer, so nothing was removed; answer y, or pass --yes.") from None
    if not agreed:
        typer.echo("nothing was removed.")
    return agreed


def _size(count: float) -> str:
    """Bytes for people, for example ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
