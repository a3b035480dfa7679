from __future__ import annotations

import re

import polars as pl
import pytest

from rlheals.evaluation.dialogue import Dialogue
from rlheals.evaluation.probes import Prober, describe, summarise
from rlheals.inference import Sampling
from rlheals.reporting.schemas import SCHEMAS, check
from tests.common import make_tokenizer
from tests.evaluation.games import ScriptedEngine, SumTask, probe_rows

COLUMNS = {"profile": "mini", "model": "tiny", "seed": 0, "stage": "sft", "checkpoint_step": 5, "cell_id": ""}
# 10 hands: sums below 7 are solved at once, 7 to 10 at the second try, the rest never (11: answered one too low).
PAIRS = [(1, number) for number in range(1, 11)]


def reply(chat: str) -> str:
    first, second, *_ = (int(word) for word in re.findall(r"\d+", chat))
    total = first + second
    if total < 7 or ("wrong" in chat and total < 11):
        return str(total)
    return str(total - 1) if total == 11 else "again"


def prober() -> Prober:
    speak = Dialogue(make_tokenizer("words"))
    return Prober(ScriptedEngine(speak.tokenizer, reply), speak, SumTask(), "compact", Sampling(4), 1000)


def test_answers_hold_every_attempt() -> None:
    answers = prober().answers(probe_rows(PAIRS), 3, COLUMNS)
    check(answers, "answers")
    assert answers.height == 5 * 1 + 4 * 2 + 1 * 3
    assert answers.select(list(COLUMNS)).unique().row(0, named=True) == COLUMNS
    assert set(answers["engine"]) == {"scripted"}
    assert set(answers["sampling"]) == {"greedy"}
    second = answers.filter(hand_id="1 6").sort("attempt")
    assert second["response"].to_list() == ["again", "7"]
    assert second["solved"].to_list() == [False, True]
    assert second["solved_first_try"].to_list() == [False, False]
    assert second["format_error"].to_list() == [True, False]
    assert second["fields_ok"].to_list() == [None, True]


def test_summary_against_counts_by_hand() -> None:
    summary = summarise(prober().answers(probe_rows(PAIRS), 3, COLUMNS), (1, 3))
    assert summary["attempts"].to_list() == [1, 3]
    first, third = summary.rows(named=True)
    assert (first["n"], first["solved"], first["accuracy"]) == (10, 5, 0.5)
    assert (third["n"], third["solved"], third["accuracy"]) == (10, 9, 0.9)
    # Wilson interval of 5 in 10, Agresti and Coull (1998)
    assert first["wilson_low"] == pytest.approx(0.2366, abs=1e-4)
    assert first["wilson_high"] == pytest.approx(0.7634, abs=1e-4)
    for row in (first, third):
        assert row["format_error_rate"] == pytest.approx(0.4)
        assert row["training_rule_rate"] == pytest.approx(0.1)
        assert row["fields_ok_rate"] == 1.0
        assert row["mean_reward"] == 0.0
    assert first["solved_later_given_first_failed"] is None
    assert third["solved_later_given_first_failed"] == pytest.approx(4 / 5)


def test_summary_keeps_rungs_conditions_and_splits_apart() -> None:
    tables = [
        prober().answers(probe_rows(PAIRS[:size], condition, split), 1, {**COLUMNS, "checkpoint_step": step})
        for size, (condition, split, step) in enumerate(
            [("id", "select", 0), ("ood", "select", 0), ("ood", "confirm", 0), ("ood", "confirm", 9)], start=2
        )
    ]
    summary = summarise(pl.concat(tables))
    assert summary.select("condition", "split", "checkpoint_step", "n").rows() == [
        ("id", "select", 0, 2),
        ("ood", "select", 0, 3),
        ("ood", "confirm", 0, 4),
        ("ood", "confirm", 9, 5),
    ]


def test_all_solved_at_once_has_no_second_chance_rate() -> None:
    summary = summarise(prober().answers(probe_rows(PAIRS[:3]), 2, COLUMNS), (1, 2))
    assert summary["solved_later_given_first_failed"].to_list() == [None, None]
    assert list(summary.schema.items()) == list(pl.Schema(SCHEMAS["probe_summary"]).items())


def test_sampling_is_described_in_full() -> None:
    assert describe(Sampling(4)) == "greedy"
    assert (
        describe(Sampling(4, temperature=0.6, top_p=0.9, top_k=20, seed=7))
        == "temperature=0.6,top_p=0.9,top_k=20,seed=7"
    )
