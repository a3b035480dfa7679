"""The page of ``rlheals diagnose``: one file with styles and figures inside, made from the tables only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
import vl_convert
from markupsafe import Markup

from rlheals.reporting import offline
from rlheals.reporting.drift import Drift, pair_label, with_ladder
from rlheals.reporting.figures.drift_map import PAIRS
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.reporting.sections.spectra import TURNED, context, figures
from rlheals.reporting.site import TEMPLATES, environment, versions
from rlheals.reporting.verdict_words import TURNS, WORDS, counted
from rlheals.reporting.words import listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FILE = "index.html"


def write_page(
    tables: Mapping[str, pl.DataFrame],
    directory: Path,
    *,
    left_out: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    follows: Sequence[str] = (),
) -> None:
    """Write ``index.html`` into ``directory``.

    Args:
        tables: tables of the spectra family by schema name; ``spectra_verdicts`` must have rows, absent ones are empty.
        directory: an existing folder.
        left_out: tensor name → why it was not analysed.
        notes: sentences that the command printed.
        follows: what it said last: how large the change is, and what to do next.

    Raises:
        UserError: a table is not of its schema.
    """
    (directory / FILE).write_text(page(tables, left_out=left_out, notes=notes, follows=follows), encoding="utf-8")


def page(
    tables: Mapping[str, pl.DataFrame],
    *,
    left_out: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    follows: Sequence[str] = (),
) -> str:
    """The page as text; see `write_page`."""
    drift = with_ladder(as_drift(tables))
    drawn = [
        {"name": name, "caption": figure.caption, "svg": Markup(_svg(figure.chart.to_dict(), name))}
        for name, figure in figures(drift).items()
    ]
    return (
        environment()
        .get_template("diagnosis.html.j2")
        .render(
            **context(drift),
            css=Markup((TEMPLATES / "style.css").read_text()),
            answer=answer(drift),
            lead=_lead(drift),
            figures=drawn,
            matrices=_matrices(drift),
            hidden_pairs=max(0, len(drift.pairs) - PAIRS),
            left_out=sorted((left_out or {}).items()),
            notes=list(notes),
            follows=list(follows),
            words=WORDS,
            versions=versions(),
        )
    )


def as_drift(tables: Mapping[str, pl.DataFrame]) -> Drift:
    """Tables by schema name as one `Drift`; an absent table is empty.

    Raises:
        UserError: a table is not of its schema.
    """

    def table(name: str) -> pl.DataFrame:
        return check(tables[name], name) if name in tables else pl.DataFrame(schema=SCHEMAS[name])

    names = ("spectra", "spectra_verdicts", "gauge", "function_drift", "spectra_ladder")
    spectra, verdicts, gauge, function, ladder = (table(name) for name in names)
    return Drift(spectra, verdicts, gauge, function, ladder)


def answer(drift: Drift) -> list[str]:
    """One sentence a pair: how many matrices changed in which way."""
    return [f"{pair_label(pair)}: {_counted(drift.verdicts.filter(pl.col('pair') == pair))}." for pair in drift.pairs]


def _counted(rows: pl.DataFrame) -> str:
    found = dict(rows["verdict"].value_counts().iter_rows())
    turned = sum(found.get(verdict, 0) for verdict in TURNED)
    parts = listed(counted(rows))
    if not turned:
        return f"nothing that noise of the same norm would not do ({parts} of {len(rows)} matrices)"
    said = f"{turned} of {len(rows)} matrices changed other than by noise ({parts})"
    numbers = turned_against_noise(rows)
    return f"{said}; the leading singular vectors turned {numbers}" if numbers else said


def turned_against_noise(rows: pl.DataFrame) -> str:
    """In how many matrices the leading vectors turned less than, as, or more than noise turns them; empty for none.

    >>> turned_against_noise(pl.DataFrame({"turn": ["as noise", "less than noise", ""]}))
    'less than noise in 1 matrix and as noise in 1 matrix'
    """
    counts = [(turn, int((rows["turn"] == turn).sum())) for turn in TURNS]
    return listed([f"{turn} in {count} {'matrix' if count == 1 else 'matrices'}" for turn, count in counts if count])


def _lead(drift: Drift) -> str:
    shape = drift.verdicts
    layers = shape.filter(pl.col("layer") >= 0)["layer"].n_unique()
    modules = shape["module"].unique(maintain_order=True).to_list()
    where = f"{layers} {'layer' if layers == 1 else 'layers'}"
    often = f"{len(drift.pairs)} {'comparison' if len(drift.pairs) == 1 else 'comparisons'}"
    return f"{shape['tensor'].n_unique()} matrices ({listed(modules)}) in {where}, {often}."


def _matrices(drift: Drift) -> list[dict[str, Any]]:
    """All matrices, those that changed most first within a pair."""
    rows = drift.verdicts.sort("relative_change", descending=True, maintain_order=True)
    return [{"pair": pair_label(pair), "rows": rows.filter(pl.col("pair") == pair).to_dicts()} for pair in drift.pairs]


def _svg(spec: dict[str, Any], name: str) -> str:
    return offline.unique_ids(vl_convert.vegalite_to_svg(spec), name)
