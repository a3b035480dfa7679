"""Commands of ``rlheals``, one module each; a new command is a new file here.

A module offers ``register(app)``, which adds its command to the typer app. It may import typer and the standard library
at the top and everything else inside functions, so that ``rlheals --help`` answers at once.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def register_all(app: typer.Typer) -> None:
    """Add the command of every module in this folder, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}").register(app)
