from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest

import rlheals
from rlheals.errors import UserError
from rlheals.spectra.results import Finding, ResultCache

if TYPE_CHECKING:
    from pathlib import Path

TABLE = pl.DataFrame(
    {"quantity": ["angle", "sigma"], "index": [None, 3], "value": [0.1, float("nan")]},
    schema={"quantity": pl.String, "index": pl.Int64, "value": pl.Float64},
)
FACTS = {"driver": "gesdd", "p_value": 0.25, "none": None}


class Question:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Finding:
        self.asked += 1
        return Finding(TABLE, FACTS)


def test_the_second_run_computes_nothing(tmp_path: Path) -> None:
    question = Question()
    first = ResultCache(tmp_path).finding(["digest", 0.25], question)
    again = ResultCache(tmp_path)
    second = again.finding(["digest", 0.25], question)
    assert question.asked == 1
    assert (again.computed, again.hits) == (0, 1)
    assert second.table.equals(first.table, null_equal=True)
    assert second.table.schema == TABLE.schema
    assert second.facts == FACTS


def test_other_settings_are_another_entry(tmp_path: Path) -> None:
    question, cache = Question(), ResultCache(tmp_path)
    cache.finding(["digest", 0.25], question)
    assert cache.has(["digest", 0.25])
    assert not cache.has(["digest", 0.5])
    cache.finding(["digest", 0.5], question)
    assert (question.asked, cache.computed, cache.hits) == (2, 2, 0)


def test_another_version_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ResultCache(tmp_path)
    cache.finding("digest", Question())
    monkeypatch.setattr(rlheals, "__version__", "99")
    assert not cache.has("digest")


@pytest.mark.parametrize("place", [0, 70, 100, -20, -1])
def test_a_flipped_bit_anywhere_is_a_miss(tmp_path: Path, place: int) -> None:
    question, cache = Question(), ResultCache(tmp_path)
    cache.finding("digest", question)
    content = bytearray(cache.path("digest").read_bytes())
    content[place] ^= 1
    cache.path("digest").write_bytes(content)
    assert cache.finding("digest", question).facts == FACTS
    assert question.asked == 2
    cache.finding("digest", question)
    assert question.asked == 2, "the damaged entry was replaced"


def test_a_cut_entry_is_a_miss(tmp_path: Path) -> None:
    question, cache = Question(), ResultCache(tmp_path)
    cache.finding("digest", question)
    cache.path("digest").write_bytes(cache.path("digest").read_bytes()[:50])
    cache.finding("digest", question)
    assert question.asked == 2


def test_a_failing_question_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ResultCache(tmp_path).finding("digest", fails)
    assert list(tmp_path.rglob("*.*")) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache .*file/results cannot be written to \(Not a directory\).*--cache"):
        ResultCache(tmp_path / "file")
