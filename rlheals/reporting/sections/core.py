"""What a section of the report is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import altair as alt
    import polars as pl

    from rlheals.reporting.tables import Study

RunMetrics = dict[tuple[str, int], dict[str, float | int | None]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and the sentence below it."""

    chart: alt.TopLevelMixin
    caption: str


@dataclass(frozen=True, slots=True)
class Content:
    """What a section contributes.

    Attributes:
        figures: by file name without ending; the template shows one with ``figure("name")``.
        context: values for the section's template.
        findings: sentences for the summary at the top of the page, as plain text.
        tables: files for ``tables/``, by file name; ``.csv`` or ``.parquet`` decides the format.
        metrics: numbers for ``metrics.json``, by (model, seed).
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    metrics: RunMetrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        key: name; its template is ``templates/sections/<key>.html.j2``.
        title: heading.
        order: position on the page.
        build: makes the content from tables, or returns None when the stage that writes them has not run.
    """

    key: str
    title: str
    order: int
    build: Callable[[Study], Content | None]
