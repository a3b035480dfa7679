from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.tasks.general_points import solver
from tests.tasks.general_points_oracles import OPERATIONS, brute_force, canonical, leaves, parsed, tree_value

MULTISETS = list(combinations_with_replacement(range(1, 14), 4))


@pytest.fixture(scope="module")
def table() -> dict[tuple[int, ...], int]:
    return solver.solution_table(range(1, 14), 4, 24)


def test_solvable_multisets(table: dict[tuple[int, ...], int]):
    assert list(table) == MULTISETS
    solvable = {values for values, count in table.items() if count}
    assert len(solvable) == 1362
    assert sum(max(values) <= 10 for values in solvable) == 566
    assert sum(max(values) > 10 for values in solvable) == 796
    assert solvable == {values for values in MULTISETS if solver.solvable(values, 24)}


def test_multisets_with_whole_number_chains():
    expressible = [values for values in MULTISETS if solver.integer_chains(values, 24)]
    assert len(expressible) == 1344
    assert sum(max(values) <= 10 for values in expressible) == 556


@pytest.mark.parametrize("target", [24, 1, 37])
def test_solutions_are_those_of_brute_force(target: int):
    for values in random.Random(target).sample(MULTISETS, 12):
        expected = {canonical(tree) for tree in brute_force(values, target)}
        assert {canonical(as_nested(tree)) for tree in solver.solutions(values, target)} == expected
        assert solver.count_solutions(values, target) == len(expected)


def as_nested(tree: solver.Tree) -> object:
    return tree[0][0] if len(tree) == 1 else (tree[1], as_nested(tree[2]), as_nested(tree[3]))


@pytest.mark.parametrize("values", [(3, 3, 8, 8), (1, 2, 3, 4), (6, 6, 6, 6), (12, 12, 13, 13), (1, 1, 12, 12)])
def test_expressions_read_by_python_give_the_target(values: tuple[int, ...]):
    texts = solver.expressions(values, 24)
    assert texts
    assert len(texts) == len(set(texts))
    for text in texts:
        tree = parsed(text)
        assert sorted(leaves(tree)) == list(values)
        assert tree_value(tree) == 24


def test_expression_has_no_needless_brackets():
    assert solver.expressions((3, 3, 8, 8), 24) == ("8/(3-8/3)",)
    for text in solver.expressions((1, 2, 3, 4), 24):
        tree = parsed(text)
        for place, character in enumerate(text):
            if character == "(":
                depth = [text[: end + 1].count("(") - text[: end + 1].count(")") for end in range(len(text))]
                close = next(i for i in range(place, len(text)) if depth[i] == depth[place] - 1)
                assert parsed(text[:place] + text[place + 1 : close] + text[close + 1 :]) != tree


@given(st.lists(st.integers(1, 13), min_size=3, max_size=4), st.integers(1, 60))
@settings(max_examples=50)
def test_chains_are_exact_and_use_each_number_once(values: list[int], target: int):
    found = solver.chains(values, target)
    assert len(found) == len(set(found))
    assert bool(found) == solver.solvable(values, target)
    for chain in found:
        pool = [Fraction(value) for value in values]
        for a, operation, b, result in chain:
            pool.remove(a)
            pool.remove(b)
            assert OPERATIONS[operation](a, b) == result
            pool.append(result)
        assert pool == [target]


@given(st.lists(st.integers(1, 13), min_size=4, max_size=4), st.sampled_from([30, 144]))
@settings(max_examples=50)
def test_integer_chains_are_the_chains_of_small_whole_results(values: list[int], maximum: int):
    small = [
        chain
        for chain in solver.chains(values, 24)
        if all(result.denominator == 1 and 0 <= result <= maximum for *_, result in chain)
    ]
    assert sorted(small) == sorted(solver.integer_chains(values, 24, maximum))


def test_balanced_tree_has_both_orders_of_its_halves():
    chains = solver.integer_chains((1, 5, 2, 2), 24, 144)
    assert ((5, "+", 1, 6), (2, "+", 2, 4), (6, "*", 4, 24)) in chains
    assert ((2, "+", 2, 4), (5, "+", 1, 6), (6, "*", 4, 24)) in chains


@given(st.permutations([2, 3, 7, 13]), st.integers(1, 100))
def test_order_of_the_values_does_not_matter(values: list[int], target: int):
    assert solver.expressions(values, target) == solver.expressions([2, 3, 7, 13], target)
    assert solver.first_solution(values, target) == solver.first_solution([2, 3, 7, 13], target)


@pytest.mark.parametrize("cards", [3, 5, 6])
def test_other_hand_sizes(cards: int):
    generator = random.Random(cards)
    for _ in range(20):
        values = [generator.randint(1, 13) for _ in range(cards)]
        tree = solver.first_solution(values, 24)
        assert (tree is not None) == solver.solvable(values, 24)
        if tree is not None:
            nested = as_nested(tree)
            assert sorted(leaves(nested)) == sorted(values)
            assert tree_value(nested) == 24


def test_zero_may_multiply_anything():
    assert solver.solvable((5, 5, 7, 9), 0)
    assert "24" not in solver.expressions((24, 5, 5, 7), 24)
    assert any("*" in text for text in solver.expressions((24, 5, 5, 7), 24))


def test_hopeless_target_is_cheap_and_unsolvable():
    before = solver._first.cache_info().misses
    assert not solver.solvable((13, 13, 13, 13, 13, 13), 10**9)
    assert solver._first.cache_info().misses - before == 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_reaches_works_in_the_middle_of_a_solution(values: list[int]):
    pool = tuple((value, 2) if value % 2 else (value // 2, 1) for value in values)
    halves = [Fraction(value, 2) for value in values]
    assert solver.reaches(pool, solver.rational(sum(values), 2))
    product = Fraction(1)
    for half in halves:
        product *= half
    assert solver.reaches(pool, (product.numerator, product.denominator))
