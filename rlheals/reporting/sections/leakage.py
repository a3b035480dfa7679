"""What the dataset stage checked about leaks between training and probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.reporting.sections.core import Content, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlheals.reporting.tables import Study


def build(study: Study) -> Content | None:
    """The leakage report of every run, side by side; None when the dataset stage's output is not here."""
    if not study.has("dataset"):
        return None
    study.check_runs("dataset")
    reports = [dict(_flat(study.json("dataset", "leakage.json", *run))) for run in study.runs]
    keys = list(dict.fromkeys(key for report in reports for key in report))
    rows = [(key, [report.get(key, "–") for report in reports]) for key in keys]
    return Content(context={"runs": study.runs, "rows": rows})


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested entries as (dotted name, text); long lists are told by their length."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and len(value) > 6:
        yield prefix, f"{len(value)} entries"
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        yield prefix, text


SECTION = Section("leakage", "Leakage report", 70, build)
