from __future__ import annotations

import numpy as np
import pytest

from rlheals.errors import UserError
from rlheals.tasks import make_task, task_spec_model
from rlheals.tasks.general_points.pretraining import ARROW, EOS, pretraining_rows, vocabulary
from rlheals.tasks.general_points.verifier import SOLVED

SPEC = task_spec_model("general_points").model_validate(
    {
        "name": "general_points",
        "target": 24,
        "cards": 4,
        "deck": "standard",
        "replacement": True,
        "training_rule": {"J": 10, "Q": 10, "K": 10},
        "ood_rule": {"J": 11, "Q": 12, "K": 13},
        "held_out": 0.25,
        "reserved": 0.2,
        "fidelity": "exact",
        "attempts": 5,
        "feedback": "neutral",
    }
)
KINDS = ("read", "solve", "play", "play_words", "retry")


def rows(kind: str, count: int = 200, seed: int = 0) -> list[list[tuple[str, bool]]]:
    return pretraining_rows({kind: 1.0}, np.random.default_rng(seed), count, SPEC)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_words_of_the_vocabulary_and_end_in_a_trained_segment(kind: str):
    words = set(vocabulary())
    for row in rows(kind):
        assert row[-1][1]
        assert row[-1][0].endswith(EOS)
        assert {word for text, _ in row for word in text.split()} <= words


def test_vocabulary_has_no_duplicates():
    assert len(vocabulary()) == len(set(vocabulary()))


def test_rows_are_a_function_of_the_generator():
    assert rows("retry", seed=1) == rows("retry", seed=1)
    assert rows("retry", seed=1) != rows("retry", seed=2)


def test_exact_layout_is_never_shown_by_chance_alone():
    # Seven independent slots of a four-card response are all exact with probability 0.25 ** 7 = 6e-5.
    exact = sum(
        row[-1][0].startswith('{ "cards"') and '"number"' in row[-1][0] and "}" in row[-1][0]
        for row in rows("play_words", 500)
    )
    assert exact < 15


def test_first_response_of_a_retry_is_wrong_for_the_stated_reason():
    task = make_task(SPEC)
    for row in rows("retry", 100):
        prompt, _, rest = row[0][0].partition(f" {ARROW} ")
        wrong, _, feedback = rest.partition(f" {EOS} ")
        assert wrong
        assert feedback.startswith("no")
        assert feedback.endswith(ARROW)
        assert not row[0][1]
        assert prompt.startswith("<bos> task 24 rule")
    assert task.special_words()["eos"] == EOS
    assert SOLVED == "solved"


@pytest.mark.parametrize(
    ("mixture", "sentence"), [({"reed": 1.0}, "base.mixture.reed"), ({"read": 0.5}, "sums to 0.5")]
)
def test_bad_mixture_is_one_sentence(mixture: dict[str, float], sentence: str):
    with pytest.raises(UserError, match=sentence):
        pretraining_rows(mixture, np.random.default_rng(0), 1, SPEC)


def test_target_beyond_the_format_is_one_sentence_instead_of_a_search_without_end():
    with pytest.raises(UserError, match=r"task\.target is 999983"):
        pretraining_rows({"play_words": 1.0}, np.random.default_rng(0), 1, SPEC.model_copy(update={"target": 999983}))
