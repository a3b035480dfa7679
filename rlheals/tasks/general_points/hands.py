"""Draw and enumerate hands of cards, many at a time.

A card is an integer ``rank * 4 + suit``; ranks count through the deck's symbols, suits through H, S, D, C. With
replacement, ranks and suits are independent and uniform (as in the paper's code); without, a hand is dealt from one
deck, so no card occurs twice. Suits never matter to the text task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, product
from typing import TYPE_CHECKING

import numpy as np

from rlheals.tasks.general_points.rules import DECKS, FACES, Rule
from rlheals.tasks.general_points.solver import solvable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SUITS = ("H", "S", "D", "C")
# Up to here the solvability of every ordered hand is kept in one dense array (65 536 entries for the broad deck).
_DENSE_CARDS = 4


@dataclass(frozen=True)
class Draw:
    """How hands are drawn.

    Attributes:
        cards: cards in a hand.
        deck: ``standard`` (A to K) or ``broad`` (number cards 1 to 13 and J, Q, K).
        replacement: draw every card from the full deck.
        faces: draw one card from J, Q, K and the rest from the deck, in random order, as the paper does out of
            distribution; such a hand has at least one face card.
    """

    cards: int = 4
    deck: str = "standard"
    replacement: bool = True
    faces: bool = False

    @property
    def symbols(self) -> tuple[str, ...]:
        """The deck's rank symbols."""
        return DECKS[self.deck]


def draw_hands(rng: np.random.Generator, count: int, draw: Draw) -> NDArray[np.uint8]:
    """``count`` hands as a (count, cards) array of card numbers, independent and identically distributed."""
    if draw.replacement:
        return _independent(rng, count, draw)
    kept = np.empty((0, draw.cards), np.uint8)
    while len(kept) < count:
        # Rejecting hands with a repeated card is exact; even six cards of 52 are kept three times in four.
        hands = _independent(rng, 2 * (count - len(kept)) + 16, draw)
        ordered = np.sort(hands, axis=1)
        kept = np.concatenate([kept, hands[(np.diff(ordered, axis=1) > 0).all(axis=1)]])
    return kept[:count]


def _independent(rng: np.random.Generator, count: int, draw: Draw) -> NDArray[np.uint8]:
    ranks, suits = len(draw.symbols), len(SUITS)
    hands = rng.integers(0, ranks * suits, size=(count, draw.cards), dtype=np.uint8)
    if draw.faces:
        # The other cards are exchangeable, so one swap is as good as a shuffle.
        place = rng.integers(0, draw.cards, size=count)
        hands[np.arange(count), place] = rng.integers(
            (ranks - len(FACES)) * suits, ranks * suits, size=count, dtype=np.uint8
        )
    return hands


def draw_solvable(rng: np.random.Generator, count: int, draw: Draw, rule: Rule) -> NDArray[np.uint8]:
    """About ``count`` draws with the unsolvable ones removed: a (kept, cards) array with kept ≤ count."""
    hands = draw_hands(rng, count, draw)
    return hands[solvable_mask(hands // len(SUITS), draw, rule)]


def solvable_mask(ranks: NDArray[np.uint8], draw: Draw, rule: Rule) -> NDArray[np.bool_]:
    """Which rows of a (hands, cards) array of ranks are solvable under ``rule``: a boolean array (hands,)."""
    base = len(draw.symbols)
    codes = ranks[:, 0].astype(np.int32)
    for column in range(1, ranks.shape[1]):
        codes *= base
        codes += ranks[:, column]
    if draw.cards <= _DENSE_CARDS:
        return _dense_table(draw.symbols, draw.cards, rule)[codes]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    values = np.array(rule.values(draw.symbols))
    known = [solvable(values[ranks[row]].tolist(), rule.target) for row in first]
    return np.array(known, bool)[inverse.reshape(-1)]


@lru_cache(maxsize=16)
def _dense_table(symbols: tuple[str, ...], cards: int, rule: Rule) -> NDArray[np.bool_]:
    """Solvability of every ordered hand, indexed by its ranks read as digits in base ``len(symbols)``."""
    values = rule.values(symbols)
    hands = product(values, repeat=cards)
    known = {multiset: solvable(multiset, rule.target) for multiset in value_multisets([values], cards)}
    return np.fromiter((known[tuple(sorted(hand))] for hand in hands), bool, len(symbols) ** cards)


def symbols_of(hands: NDArray[np.uint8], draw: Draw) -> list[tuple[str, ...]]:
    """The rank symbols of each hand, in order; suits are dropped."""
    names = np.array(draw.symbols, dtype=object)
    return [tuple(row) for row in names[hands // len(SUITS)].tolist()]


def with_suits(hand: NDArray[np.uint8], draw: Draw) -> list[str]:
    """Symbols with their suit in front, such as ``H10``."""
    return [SUITS[card % len(SUITS)] + draw.symbols[card // len(SUITS)] for card in hand.tolist()]


def ordered_hands(draw: Draw) -> Iterator[tuple[str, ...]]:
    """Every ordered hand of symbols that can be drawn; there are ``len(symbols) ** cards`` without conditions."""
    for hand in product(draw.symbols, repeat=draw.cards):
        if draw.faces and not any(card in FACES for card in hand):
            continue
        if draw.replacement or max(hand.count(card) for card in hand) <= len(SUITS):
            yield hand


def value_multisets(values: list[tuple[int, ...]], cards: int) -> Iterator[tuple[int, ...]]:
    """Every ascending multiset of ``cards`` values out of the union of ``values``."""
    yield from combinations_with_replacement(sorted(set().union(*values)), cards)
