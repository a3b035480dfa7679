"""The ``rlheals`` command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rlheals import __version__
from rlheals.commands import register_all
from rlheals.commands._shared import EPILOG
from rlheals.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="rlheals",
    help="What fine-tuning turned in a language model, and whether it can be turned back.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for the help page would take longer than everything else
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlheals {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What fine-tuning turned in a language model, and whether it can be turned back."""


register_all(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C one and 130."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="rlheals")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except SystemExit as stopped:
        if stopped.code == EXIT_INTERRUPTED:  # typer makes it of a KeyboardInterrupt, without a word
            below = "\n" if sys.stderr.isatty() else ""  # a progress bar
            print(f"{below}interrupted; nothing unfinished was written", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
