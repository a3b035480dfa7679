"""Counts and warnings as a reader sees them."""

from __future__ import annotations

import polars as pl

from rlheals.reporting.verdict_words import counted, warning_lines

LAW = "base matches the law (N(0, 1)), so it is fresh"


def test_every_verdict_is_counted_even_one_without_a_word() -> None:
    verdicts = ["structured rotation", "unchanged", "structured rotation", "undefined"]
    assert counted(pl.DataFrame({"verdict": verdicts})) == ["1 unchanged", "2 structured", "1 undefined"]


def test_warnings_of_a_kind_are_one_line_with_a_count() -> None:
    rows = [(f"w{place}", f"{LAW}: from {place} to 9") for place in range(40)]
    rows += [("w0", "tuned is odd: 3"), ("w1", ""), ("w2", f"{LAW}: from 2 to 9; tuned is odd: 4")]
    table = pl.DataFrame(rows, ["tensor", "warning"], orient="row")
    assert warning_lines(table) == [
        f"40 matrices (w0, w1, w2 and 37 more): {LAW}.",
        "2 matrices (w0, w2): tuned is odd.",
    ]
    every = warning_lines(table, every=True)
    assert len(every) == 42
    assert f"w7: {LAW}: from 7 to 9." in every


def test_a_warning_that_stands_alone_keeps_its_numbers() -> None:
    table = pl.DataFrame({"tensor": ["w", "w"], "warning": [f"{LAW}: from 1 to 9"] * 2})
    assert warning_lines(table) == [f"w: {LAW}: from 1 to 9."]
    assert warning_lines(table.clear()) == []
