"""What several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from rlheals.errors import EXIT_BAD_INPUT, EXIT_INTERNAL, EXIT_OK

EPILOG = (
    f"Exit codes: {EXIT_OK} success, {EXIT_INTERNAL} internal error (please report it), "
    f"{EXIT_BAD_INPUT} bad input (the message says what to change)."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs instead of text.")]


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(content, sort_keys=True))
