"""Card symbols, and the rules that give them values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FACES = ("J", "Q", "K")
STANDARD_RANKS = ("A", *(str(number) for number in range(2, 11)), *FACES)
# Number cards 11 to 13 let a learner meet those values without meeting the rule that gives them to faces.
BROAD_RANKS = ("A", *(str(number) for number in range(2, 14)), *FACES)
DECKS = {"standard": STANDARD_RANKS, "broad": BROAD_RANKS}
_PLAIN_VALUES = {"A": 1, **{str(number): number for number in range(2, 14)}}


@dataclass(frozen=True)
class Rule:
    """What the symbols count and what the formula must reach.

    Attributes:
        mapping: value of J, Q and K, and of any other symbol that departs from its plain value (A is 1).
        target: the number to reach.
    """

    mapping: Mapping[str, int]
    target: int
    _values: dict[str, int] = field(init=False, repr=False, compare=False)
    _words: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = _PLAIN_VALUES | dict(self.mapping)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_words", {symbol: str(value) for symbol, value in values.items()})

    def __hash__(self) -> int:
        return hash((frozenset(self.mapping.items()), self.target))

    @classmethod
    def faces_as_10(cls, target: int = 24) -> Rule:
        """The training rule of the paper: J, Q and K count as 10."""
        return cls(dict.fromkeys(FACES, 10), target)

    @classmethod
    def faces_as_11_12_13(cls, target: int = 24) -> Rule:
        """The out-of-distribution rule of the paper: J, Q and K count as 11, 12 and 13."""
        return cls(dict(zip(FACES, (11, 12, 13), strict=True)), target)

    def values(self, cards: Iterable[str]) -> tuple[int, ...]:
        """Value of each card, in order.

        Raises:
            UserError: a symbol that is no card, or a face card without a value.
        """
        try:
            return tuple([self._values[card] for card in cards])
        except KeyError as error:
            raise UserError(f"card {error} has no value under this rule; use {' '.join(BROAD_RANKS)}.") from None

    def value_words(self, cards: Iterable[str]) -> list[str]:
        """Value of each card as text, in order; `values` checks the symbols."""
        return [self._words[card] for card in cards]

    def description(self) -> str:
        """The face-card sentence of a prompt, in the paper's wording (section "GeneralPoints").

        >>> Rule.faces_as_10().description()
        "'J', 'Q', and 'K' count as '10'."
        >>> Rule.faces_as_11_12_13().description()
        "'J', 'Q', and 'K' count as '11', '12', and '13', respectively."
        """
        words = self.value_words(FACES)
        faces = "'J', 'Q', and 'K' count as "
        sentence = f"'{words[0]}'." if len(set(words)) == 1 else "'{}', '{}', and '{}', respectively.".format(*words)
        others = [f" '{symbol}' counts as '{value}'." for symbol, value in self.mapping.items() if symbol not in FACES]
        return faces + sentence + "".join(others)
