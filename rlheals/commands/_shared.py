"""What several commands share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.errors import EXIT_BAD_INPUT, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, UserError

if TYPE_CHECKING:
    from rlheals.spectra.store import FactorStore

GIB = 2**30

EPILOG = (
    f"Exit codes: {EXIT_OK} success, {EXIT_INTERNAL} internal error (please report it), "
    f"{EXIT_BAD_INPUT} bad input (the message says what to change), {EXIT_INTERRUPTED} stopped by Ctrl-C."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs instead of text.")]


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(content, sort_keys=True))


def default_cache() -> Path:
    """``rlheals`` below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlheals"


def device_named(name: str) -> str:
    """The device that ``--device`` means here.

    Raises:
        UserError: there is no such name, or no CUDA device.
    """
    from rlheals.stages.common import resolve_device

    if name not in ("cpu", "cuda", "auto"):
        raise UserError(f"--device {name} is not known; use cpu, cuda or auto.")
    return resolve_device(name, "--device")


def bytes_of(option: str, amount: float, unit: int) -> int:
    """A size that was given as so many units.

    Raises:
        UserError: it is no number, or more than any disk holds.
    """
    if not 0 < amount * unit < 2**63:
        raise UserError(f"{option} is a size such as 5, not {amount:g}.")
    return round(amount * unit)


def factor_store(directory: Path, cap_gib: float, device: str) -> FactorStore:
    """The decompositions kept in the cache folder ``directory``; every command that decomposes shares them."""
    from rlheals.spectra.store import FactorStore

    return FactorStore(directory / "factors", bytes_of("--cache-gib", cap_gib, GIB), device)
