"""The synthetic mixture the tiny base model is pretrained on.

The base must be able to play under any face-card convention and yet not know the task's exact layout, as a real
base model does. So rules are random, and in the task-shaped rows every separator word is drawn independently:
circuits become robust to the layout, and greedy accuracy in the exact layout stays near zero until SFT.

Row kinds (shares are the ``base.mixture`` params):

- ``read``: a rule and 4–14 cards, to be written as numbers;
- ``solve``: two hands of plain numbers, each solved;
- ``play``: a rule and a hand in another layout, read and solved;
- ``play_words``: the task's layout with independently drawn separators;
- ``retry``: the same with a wrong first response, feedback, and the right response, so that revision can work.

A row is a list of (text, trained) segments; the loss is on the trained ones.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.tasks.general_points.compact import (
    CARDS,
    CLOSE,
    FORMULA,
    LARGEST,
    NUMBER,
    OPEN,
    Chain,
    CompactFormat,
    chain_text,
    cheapest_chain,
)
from rlheals.tasks.general_points.rules import FACES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from rlheals.tasks.general_points.task import GeneralPointsSpec

Segment = tuple[str, bool]
Row = list[Segment]

PAD, BOS, EOS, UNKNOWN, ARROW = "<pad>", "<bos>", "<eos>", "<unk>", "->"
REASONS = ("format", "empty", "wrong_number", "unused_number", "wrong_value", "wrong_arithmetic")
FILLERS = tuple(f"w{i}" for i in range(24))
_LARGEST_VALUE = 13
_CARD_SYMBOLS = ("A", *(str(value) for value in range(2, _LARGEST_VALUE + 1)), *FACES)
# Shares of the three ways to write a separator slot of a task-shaped row.
_PLAIN, _EXACT = 0.35, 0.25
_PLAIN_WORDS = {OPEN: "hand", CARDS: "with", NUMBER: "is", FORMULA: "so", CLOSE: ".", ",": ";"}


def vocabulary() -> list[str]:
    """Every word of the compact format, special tokens first."""
    numbers = [str(number) for number in range(LARGEST + 1)]
    layout = [
        OPEN,
        CLOSE,
        CARDS,
        NUMBER,
        FORMULA,
        ":",
        ",",
        "task",
        "rule",
        "no",
        *_PLAIN_WORDS.values(),
        "cards",
        "numbers",
    ]
    return [PAD, BOS, EOS, UNKNOWN, ARROW, *numbers, "A", *FACES, *"+-*/=", *layout, *REASONS, *FILLERS]


def special_words() -> dict[str, str]:
    """The special words of the vocabulary by role."""
    return {"pad": PAD, "bos": BOS, "eos": EOS, "unknown": UNKNOWN}


def pretraining_rows(
    mixture: Mapping[str, float], rng: np.random.Generator, count: int, spec: GeneralPointsSpec
) -> list[Row]:
    """``count`` rows of the mixture; a pure function of its arguments and the state of ``rng``.

    Raises:
        UserError: ``mixture`` names an unknown row kind, its shares do not sum to 1, or no hand has a solution that
            the compact format can write.
    """
    if not _solvable(spec.cards, spec.target):
        raise UserError(
            f"task.target is {spec.target}, which no hand of {spec.cards} cards reaches with whole-number steps up to "
            f"{LARGEST}, so the compact format has nothing to train on; choose another target."
        )
    unknown = set(mixture) - set(_KINDS)
    if unknown:
        raise UserError(f"base.mixture.{min(unknown)} is not a row kind; use {', '.join(_KINDS)}.")
    if abs(sum(mixture.values()) - 1) > 1e-6:
        raise UserError(f"base.mixture sums to {sum(mixture.values()):g}, not 1; change the shares.")
    drawn = rng.choice(len(mixture), size=count, p=list(mixture.values()))
    kinds = list(mixture)
    return [_KINDS[kinds[index]](rng, spec) for index in drawn]


@cache
def _solvable(cards: int, target: int) -> tuple[tuple[int, ...], ...]:
    """Value multisets 1..13 with a whole-number solution."""
    every = combinations_with_replacement(range(1, _LARGEST_VALUE + 1), cards)
    return tuple(values for values in every if cheapest_chain(values, target) is not None)


def _random_rule(rng: np.random.Generator) -> dict[str, int]:
    """Any face-card convention with values 1..13."""
    return {face: int(value) for face, value in zip(FACES, rng.integers(1, _LARGEST_VALUE + 1, 3), strict=True)}


def _rule_text(rule: Mapping[str, int]) -> str:
    return "rule " + " ".join(f"{face} {value}" for face, value in rule.items())


def _value(card: str, rule: Mapping[str, int]) -> int:
    return rule[card] if card in rule else 1 if card == "A" else int(card)


def _random_cards(rng: np.random.Generator, count: int) -> list[str]:
    return [_CARD_SYMBOLS[i] for i in rng.integers(0, len(_CARD_SYMBOLS), count)]


def _hand(rng: np.random.Generator, spec: GeneralPointsSpec) -> tuple[dict[str, int], list[str], list[int], Chain]:
    """A random rule and a hand that is solvable under it: (rule, cards, values, canonical chain)."""
    while True:
        rule, cards = _random_rule(rng), _random_cards(rng, spec.cards)
        values = [_value(card, rule) for card in cards]
        chain = cheapest_chain(tuple(sorted(values)), spec.target)
        if chain is not None:
            return rule, cards, values, chain


def _read(rng: np.random.Generator, spec: GeneralPointsSpec) -> Row:
    rule, cards = _random_rule(rng), _random_cards(rng, int(rng.integers(4, 15)))
    numbers = " ".join(str(_value(card, rule)) for card in cards)
    return [(f"{BOS} {_rule_text(rule)} cards {' '.join(cards)} {ARROW}", False), (f"{numbers} {EOS}", True)]


def _solve(rng: np.random.Generator, spec: GeneralPointsSpec) -> Row:
    solvable = _solvable(spec.cards, spec.target)
    row: Row = []
    for start in (f"{BOS} ", ""):
        values = rng.permutation(solvable[rng.integers(len(solvable))]).tolist()
        chain = cheapest_chain(tuple(sorted(values)), spec.target)
        assert chain is not None
        numbers = " ".join(map(str, values))
        row += [(f"{start}{numbers} {ARROW}", False), (f"{chain_text(chain)} {EOS}", True)]
    return row


def _play(rng: np.random.Generator, spec: GeneralPointsSpec) -> Row:
    rule, cards, values, chain = _hand(rng, spec)
    prompt = f"{BOS} {_rule_text(rule)} cards {' '.join(cards)} numbers {ARROW}"
    return [(prompt, False), (f"{' '.join(map(str, values))} : {chain_text(chain)} {EOS}", True)]


def _separator(rng: np.random.Generator, word: str) -> str:
    """``word`` in its plain form, exact form, or replaced by a random filler."""
    draw = rng.random()
    if draw < _PLAIN:
        return _PLAIN_WORDS[word]
    if draw < _PLAIN + _EXACT:
        return word
    return FILLERS[rng.integers(len(FILLERS))]


def _shaped_response(rng: np.random.Generator, cards: list[str], values: list[int], chain: Chain) -> str:
    """The task's response layout with every separator drawn independently."""
    words = [_separator(rng, OPEN), _separator(rng, CARDS), *cards]
    words += [_separator(rng, NUMBER), *map(str, values), _separator(rng, FORMULA)]
    for i, (a, operation, b, result) in enumerate(chain):
        words += [*([_separator(rng, ",")] if i else []), str(a), operation, str(b), "=", str(result)]
    return " ".join([*words, _separator(rng, CLOSE)])


def _shaped_prompt(rule: Mapping[str, int], cards: list[str], spec: GeneralPointsSpec) -> str:
    return f'{BOS} task {spec.target} {_rule_text(rule)} "cards" : {" ".join(cards)} {ARROW}'


def _play_words(rng: np.random.Generator, spec: GeneralPointsSpec) -> Row:
    rule, cards, values, chain = _hand(rng, spec)
    response = _shaped_response(rng, cards, values, chain)
    return [(_shaped_prompt(rule, cards, spec), False), (f"{response} {EOS}", True)]


def _retry(rng: np.random.Generator, spec: GeneralPointsSpec) -> Row:
    rule, cards, values, chain = _hand(rng, spec)
    code, wrong, detail = _mistake(rng, cards, values, chain, spec)
    mode = ("none", "neutral", "leaking")[rng.integers(3)]
    feedback = CompactFormat().feedback(code, detail, mode)
    right = _shaped_response(rng, cards, values, chain)
    return [
        (f"{_shaped_prompt(rule, cards, spec)} {wrong} {EOS} {feedback} {ARROW}", False),
        (f"{right} {EOS}", True),
    ]


def _mistake(
    rng: np.random.Generator, cards: list[str], values: list[int], chain: Chain, spec: GeneralPointsSpec
) -> tuple[str, str, list[str]]:
    """A wrong response of one of the kinds models make: (reason code, response, leaked words)."""
    kind = rng.random()
    if kind < 0.5:  # a misread card, the failure that dominates out of distribution
        solvable = _solvable(spec.cards, spec.target)
        misread, position = list(values), int(rng.integers(len(values)))
        misread[position] = int(rng.integers(1, _LARGEST_VALUE + 1))
        other = cheapest_chain(tuple(sorted(misread)), spec.target)
        if other is None or misread[position] in values:
            misread = rng.permutation(solvable[rng.integers(len(solvable))]).tolist()
            other = cheapest_chain(tuple(sorted(misread)), spec.target)
        if other is not None and sorted(misread) != sorted(values):
            foreign = [str(number) for number in misread if number not in values]
            return "wrong_number", _shaped_response(rng, cards, misread, other), foreign
    step = int(rng.integers(len(chain)))
    a, operation, b, result = chain[step]
    if kind < 0.75:  # a false running result
        false = (
            *chain[:step],
            (a, operation, b, (result + 1 + int(rng.integers(9))) % (LARGEST + 1)),
            *chain[step + 1 :],
        )
        return "wrong_arithmetic", _shaped_response(rng, cards, values, false), []
    return (
        "wrong_value",
        _shaped_response(rng, cards, values, _valid_but_wrong(rng, values)),
        [str(w) for w in chain[0]],
    )


def _valid_but_wrong(rng: np.random.Generator, values: list[int]) -> Chain:
    """A chain of true additions and subtractions in random order; it rarely reaches the target."""
    numbers = rng.permutation(values).tolist()
    total, chain = numbers[0], []
    for number in numbers[1:]:
        high, low = max(total, number), min(total, number)
        step = (high, "+", low, high + low) if rng.random() < 0.5 else (high, "-", low, high - low)
        chain.append(step)
        total = step[3]
    return tuple(chain)


_KINDS: dict[str, Callable[[np.random.Generator, GeneralPointsSpec], Row]] = {
    "read": _read,
    "solve": _solve,
    "play": _play,
    "play_words": _play_words,
    "retry": _retry,
}
