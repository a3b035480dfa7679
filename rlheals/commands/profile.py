"""``rlheals profile``: write params.yaml from a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlheals.commands._shared import EPILOG, Json, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile", epilog=EPILOG)(profile)


def profile(
    name: Annotated[str | None, typer.Argument(help="Preset to write; --list shows them.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. sft.learning_rate=5e-4.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml"),
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and exit.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Only check the file when it is of this profile already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write params.yaml from a preset, with every key explained where it stands.

    A file you had edited by hand is first copied to scratch/params.before-1.yaml, or the next free number.
    """
    if list_presets:
        _list(as_json)
    elif name is None:
        from rlheals.errors import UserError

        raise UserError("name a preset, for example `rlheals profile mini`; `rlheals profile --list` shows them all.")
    else:
        _write(name, overrides or [], output, keep, as_json)


def _list(as_json: bool) -> None:
    from rlheals.profile import preset_names, preset_summary

    summaries = {name: preset_summary(name) for name in preset_names()}
    if as_json:
        print_json(summaries)
        return
    for name, summary in summaries.items():
        typer.echo(f"{name:<14}{summary}")


def _write(name: str, overrides: list[str], output: Path, keep: bool, as_json: bool) -> None:
    from rlheals.params import load_params
    from rlheals.profile import current_profile, render, write_profile

    rendered = render(name, overrides)
    if keep and not overrides and current_profile(output) == name:
        load_params(output)  # no stage would read it, and so find a mistake in it, when nothing is out of date
        notes, written = [f"{output} is of profile {name} already and was left as it is."], False
    else:
        backup = write_profile(rendered.text, output)
        notes = [f"wrote {output} (profile {name})", *rendered.notes]
        notes += [f"the file had been edited: its former content is in {backup}"] if backup else []
        written = True
    if as_json:
        print_json({"profile": name, "output": str(output), "written": written, "notes": notes})
        return
    for note in notes:
        typer.echo(note)
