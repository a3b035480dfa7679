"""Exact solver: which numbers can be combined to a target with + - * /, and how. Knows nothing of text.

Rationals are (numerator, denominator) pairs in lowest terms with a positive denominator: several times faster than
`fractions.Fraction`, which the tests use as oracle. The search runs backwards from the target: to reach t from a
multiset, split it in two, take every value x of the smaller half and ask whether the other half reaches the one
number that an operation with x turns into t. Memory is bounded by the size of the caches.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from math import gcd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Rational = tuple[int, int]
Multiset = tuple[Rational, ...]
"""Ascending by (numerator, denominator); any fixed order would do."""
Tree = tuple[Any, ...]
"""A leaf is ``(value,)`` with a `Rational`; a node is ``(value, operation, left, right)``."""
Step = tuple[Fraction, str, Fraction, Fraction]
Chain = tuple[Step, ...]
"""Binary steps ``(a, operation, b, result)``, one fewer than there are numbers."""
IntegerChain = tuple[tuple[int, str, int, int], ...]

# Sets of all reachable values are kept up to this size; larger multisets are searched backwards.
_REACH_SIZE = 3
_CACHE = 1 << 17


def rational(numerator: int, denominator: int = 1) -> Rational:
    """``numerator / denominator`` in lowest terms, denominator positive."""
    divisor = gcd(numerator, denominator)
    if denominator < 0:
        divisor = -divisor
    return numerator // divisor, denominator // divisor


def combine(operation: str, a: Rational, b: Rational) -> Rational:
    """``a operation b``; raises `ZeroDivisionError` when b is 0 in a division."""
    if operation == "+":
        return rational(a[0] * b[1] + b[0] * a[1], a[1] * b[1])
    if operation == "-":
        return rational(a[0] * b[1] - b[0] * a[1], a[1] * b[1])
    if operation == "*":
        return rational(a[0] * b[0], a[1] * b[1])
    if b[0] == 0:
        raise ZeroDivisionError
    return rational(a[0] * b[1], a[1] * b[0])


def solvable(values: Iterable[int], target: int) -> bool:
    """Whether some formula uses every value once and equals ``target`` exactly."""
    return reaches(_multiset(values), (target, 1))


def reaches(values: Multiset, target: Rational) -> bool:
    """`solvable` for rational numbers, as they stand in the middle of a solution."""
    return _first(tuple(sorted(values)), target, None) is not None


def count_solutions(values: Iterable[int], target: int) -> int:
    """Number of distinct expression trees, the order of the operands of + and * not counted."""
    return len(solutions(values, target))


def solutions(values: Iterable[int], target: int) -> tuple[Tree, ...]:
    """All distinct expression trees; of + and * only the order with the larger operand first."""
    return _trees(_multiset(values), (target, 1), None)


def first_solution(values: Iterable[int], target: int, maximum: int | None = None) -> Tree | None:
    """Any one tree, the same on every call; see `integer_chains` for ``maximum``. Fast for six numbers too."""
    return _first(_multiset(values), (target, 1), maximum)


def expressions(values: Iterable[int], target: int) -> tuple[str, ...]:
    """`solutions` as infix text with the fewest brackets, without duplicates (``(a+b)+c`` is ``a+(b+c)``), sorted.

    >>> expressions([3, 3, 8, 8], 24)
    ('8/(3-8/3)',)
    """
    return tuple(sorted({infix(tree) for tree in solutions(values, target)}))


def chains(values: Iterable[int], target: int) -> tuple[Chain, ...]:
    """All solutions as sequences of binary steps, in every order in which the steps can be made."""
    found = dict.fromkeys(order for tree in solutions(values, target) for order in _orders(tree))
    return tuple(
        tuple((Fraction(*a), operation, Fraction(*b), Fraction(*result)) for a, operation, b, result in order)
        for order in found
    )


def integer_chains(values: Iterable[int], target: int, maximum: int = 144) -> tuple[IntegerChain, ...]:
    """The `chains` whose every result is a whole number from 0 to ``maximum``."""
    trees = _trees(_multiset(values), (target, 1), maximum)
    found = dict.fromkeys(order for tree in trees for order in _orders(tree))
    return tuple(tuple((a[0], operation, b[0], result[0]) for a, operation, b, result in order) for order in found)


def solution_table(numbers: Iterable[int], cards: int, target: int) -> dict[tuple[int, ...], int]:
    """`count_solutions` of every multiset of ``cards`` ``numbers``; 0 marks the unsolvable ones."""
    multisets = combinations_with_replacement(sorted(set(numbers)), cards)
    return {values: count_solutions(values, target) for values in multisets}


def infix(tree: Tree) -> str:
    """The tree as text, with only the brackets that precedence and left association leave necessary."""
    return _infix(tree)[0]


def _infix(tree: Tree) -> tuple[str, str]:
    """(text, operation at the top); leaves are whole numbers and have an empty operation."""
    if len(tree) == 1:
        return str(tree[0][0]), ""
    _, operation, left, right = tree
    (left_text, left_top), (right_text, right_top) = _infix(left), _infix(right)
    if operation in "*/" and left_top in ("+", "-"):
        left_text = f"({left_text})"
    if (
        (operation == "*" and right_top in ("+", "-"))
        or (operation == "/" and right_top)
        or (operation == "-" and right_top in ("+", "-"))
    ):
        right_text = f"({right_text})"
    return f"{left_text}{operation}{right_text}", operation


def _multiset(values: Iterable[int]) -> Multiset:
    return tuple(sorted((value, 1) for value in values))


def _allowed(value: Rational, maximum: int | None) -> bool:
    return maximum is None or (value[1] == 1 and 0 <= value[0] <= maximum)


@lru_cache(maxsize=_CACHE)
def _splits(values: Multiset) -> tuple[tuple[Multiset, Multiset], ...]:
    """Every way to cut a multiset in two parts, the smaller first; each cut once, whatever numbers are equal."""
    found: dict[tuple[Multiset, Multiset], None] = {}
    everything = range(len(values))
    for size in range(1, len(values) // 2 + 1):
        for chosen in combinations(everything, size):
            part = tuple(values[i] for i in chosen)
            rest = tuple(values[i] for i in everything if i not in chosen)
            if len(part) == len(rest) and (rest, part) in found:
                continue
            found[part, rest] = None
    return tuple(found)


@lru_cache(maxsize=_CACHE)
def _reach(values: Multiset, maximum: int | None) -> dict[Rational, None]:
    """Every number the multiset can be combined to, in a fixed order."""
    if len(values) == 1:
        return {values[0]: None} if _allowed(values[0], maximum) else {}
    found: dict[Rational, None] = {}
    for left, right in _splits(values):
        for x in _reach(left, maximum):
            for y in _reach(right, maximum):
                for value in _results(x, y):
                    if _allowed(value, maximum):
                        found[value] = None
    return found


def _results(x: Rational, y: Rational) -> Iterator[Rational]:
    """The results of all operations on x and y, in both orders."""
    yield combine("+", x, y)
    yield combine("*", x, y)
    yield combine("-", x, y)
    yield combine("-", y, x)
    if y[0]:
        yield combine("/", x, y)
    if x[0]:
        yield combine("/", y, x)


def _partners(x: Rational, target: Rational) -> Iterator[tuple[str, bool, Rational | None]]:
    """All (operation, x is the right operand, y) that give ``target``; y None is any number (0 divides nothing)."""
    yield "+", False, combine("-", target, x)
    yield "-", False, combine("-", x, target)
    yield "-", True, combine("+", target, x)
    if x[0]:
        yield "*", False, combine("/", target, x)
        yield "/", True, combine("*", target, x)
        if target[0]:
            yield "/", False, combine("/", x, target)
    elif not target[0]:
        yield "*", False, None
        yield "/", False, None


def _candidates(
    left: Multiset, right: Multiset, target: Rational, maximum: int | None
) -> Iterator[tuple[str, bool, Rational, Rational]]:
    """All (operation, x is the right operand, x of ``left``, y that ``right`` may reach) with result ``target``."""
    small = len(right) <= _REACH_SIZE
    for x in _reach(left, maximum):
        for operation, flipped, y in _partners(x, target):
            if y is None:
                for any_y in _reach(right, maximum):
                    if operation == "*" or any_y[0]:
                        yield operation, flipped, x, any_y
            elif (y in _reach(right, maximum)) if small else _allowed(y, maximum):
                yield operation, flipped, x, y


def _out_of_reach(values: Multiset, target: Rational) -> bool:
    """A bound that costs nothing: |numerator| + |denominator| never exceeds the product of those sums of the values.

    By induction over + - * /: if p/q and r/s obey it, then so does every result before it is reduced.
    """
    bound = 1
    for numerator, denominator in values:
        bound *= abs(numerator) + denominator
    return abs(target[0]) + target[1] > bound


def _node(operation: str, flipped: bool, a: Tree, b: Tree, target: Rational) -> Tree:
    """The tree of ``a operation b``; the operands of + and * are put in canonical order, the larger first."""
    if operation in "+*":
        by_size = a[0][0] * b[0][1] - b[0][0] * a[0][1]
        flipped = by_size < 0 or (by_size == 0 and repr(a) < repr(b))
    return (target, operation, b, a) if flipped else (target, operation, a, b)


@lru_cache(maxsize=_CACHE)
def _trees(values: Multiset, target: Rational, maximum: int | None) -> tuple[Tree, ...]:
    if not _allowed(target, maximum):
        return ()
    if len(values) == 1:
        return ((target,),) if values[0] == target else ()
    if _out_of_reach(values, target):
        return ()
    found: dict[Tree, None] = {}
    for left, right in _splits(values):
        for operation, flipped, x, y in _candidates(left, right, target, maximum):
            for b in _trees(right, y, maximum):
                for a in _trees(left, x, maximum):
                    found[_node(operation, flipped, a, b, target)] = None
    return tuple(found)


@lru_cache(maxsize=_CACHE)
def _first(values: Multiset, target: Rational, maximum: int | None) -> Tree | None:
    if not _allowed(target, maximum):
        return None
    if len(values) == 1:
        return (target,) if values[0] == target else None
    if _out_of_reach(values, target):
        return None
    for left, right in _splits(values):
        for operation, flipped, x, y in _candidates(left, right, target, maximum):
            b = _first(right, y, maximum)
            if b is not None:
                a = _first(left, x, maximum)
                assert a is not None
                return _node(operation, flipped, a, b, target)
    return None


_Order = tuple[tuple[Rational, str, Rational, Rational], ...]


def _orders(tree: Tree) -> Iterator[_Order]:
    """Every order in which the nodes of ``tree`` can be computed, operands before results."""
    if len(tree) == 1:
        yield ()
        return
    value, operation, left, right = tree
    step = (left[0], operation, right[0], value)
    for first in _orders(left):
        for second in _orders(right):
            for merged in _merges(first, second):
                yield (*merged, step)


def _merges(first: _Order, second: _Order) -> Iterator[_Order]:
    """All interleavings of two sequences that keep the order within each."""
    if not first or not second:
        yield first + second
        return
    for rest in _merges(first[1:], second):
        yield (first[0], *rest)
    for rest in _merges(first, second[1:]):
        yield (second[0], *rest)
