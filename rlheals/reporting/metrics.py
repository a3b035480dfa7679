"""``metrics.json``: the few numbers of each run that ``dvc metrics diff`` compares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rlheals.reporting.sections import Content

DIGITS = 6


def collect(contents: Iterable[Content]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Metrics of all sections as ``{model: {"seed<k>": {name: value}}}``, rounded to ``DIGITS`` places.

    Raises:
        ValueError: two sections give the same number of the same run.
    """
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for content in contents:
        for (model, seed), numbers in content.metrics.items():
            own = found.setdefault(model, {}).setdefault(f"seed{seed}", {})
            twice = own.keys() & numbers.keys()
            if twice:
                raise ValueError(f"two sections report the metric {sorted(twice)[0]}")
            own |= {name: _rounded(value) for name, value in numbers.items()}
    return found


def write(metrics: dict[str, Any], path: Path) -> None:
    """Write metrics as JSON with a stable order."""
    path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def _rounded(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.3g}") if abs(value) < 10**-DIGITS else round(value, DIGITS)
