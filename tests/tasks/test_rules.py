from __future__ import annotations

import pytest

from rlheals.errors import UserError
from rlheals.tasks.general_points.rules import BROAD_RANKS, STANDARD_RANKS, Rule


def test_values_of_every_symbol_under_both_rules():
    assert Rule.faces_as_10().values(STANDARD_RANKS) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10)
    assert Rule.faces_as_11_12_13().values(STANDARD_RANKS) == tuple(range(1, 14))
    assert Rule.faces_as_10().values(BROAD_RANKS) == (*range(1, 14), 10, 10, 10)


def test_custom_mapping_may_change_any_symbol():
    rule = Rule({"J": 2, "Q": 3, "K": 5, "A": 14}, 24)
    assert rule.values(["A", "K", "Q", "J", "7"]) == (14, 5, 3, 2, 7)
    assert rule.description() == "'J', 'Q', and 'K' count as '2', '3', and '5', respectively. 'A' counts as '14'."


def test_equal_rules_hash_alike_and_differ_from_others():
    assert {Rule.faces_as_10(24), Rule({"K": 10, "Q": 10, "J": 10}, 24)} == {Rule.faces_as_10(24)}
    assert Rule.faces_as_10(24) != Rule.faces_as_10(25)
    assert Rule.faces_as_10(24) != Rule.faces_as_11_12_13(24)


def test_unknown_card_is_named():
    with pytest.raises(UserError, match="card 'Z'"):
        Rule.faces_as_10().values(["4", "Z"])
