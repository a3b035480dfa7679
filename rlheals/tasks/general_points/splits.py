"""Which hands may appear where: held-out value multisets, reserved ordered hands, and the draws of each condition."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rlheals.errors import UserError
from rlheals.tasks.general_points.hands import Draw, draw_hands, symbols_of
from rlheals.tasks.general_points.solver import solvable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rlheals.tasks.core import PromptFormat
    from rlheals.tasks.general_points.rules import Rule
    from rlheals.tasks.general_points.spec import GeneralPointsSpec

# Fixed, so that a longer table begins with the rows of a shorter one and formats share their hands.
_BATCH = 4096
_MOST_DRAWS = 400_000
_DRAWS_PER_ROW = 50
# Without one solvable hand among so many, the task is called impossible.
_HOPELESS_DRAWS = 2 * _BATCH
# Position fixes the random stream of a table, so append only.
STREAMS = ("sft", "rl_prompts", "id", "id_heldout", "ood", "ood_heldout")


@dataclass(frozen=True, slots=True)
class Hand:
    """One dealt hand: ordered symbols, and the ascending values they have under the rule it is played by."""

    cards: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def hand_id(self) -> str:
        """The ordered cards, such as ``A 4 10 K``."""
        return " ".join(self.cards)

    @property
    def hand_key(self) -> str:
        """The value multiset, such as ``1,4,10,10``."""
        return key_of(self.values)


def key_of(values: Sequence[int]) -> str:
    """Value multiset as text, ascending."""
    return ",".join(map(str, sorted(values)))


def share(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone (sha256), uniform over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@dataclass
class Splits:
    """The rules of one study for who may see what; all answers are functions of (spec, format, seed).

    A value multiset or an ordered hand falls on one side by the hash of (seed, text), so every table and every format
    agrees on it without sharing state.
    """

    spec: GeneralPointsSpec
    prompt_format: PromptFormat
    seed: int
    excluded: dict[str, int] = field(default_factory=dict)
    """Draws of each stream dropped only because the format cannot express a solution."""
    _solvable: dict[tuple[int, ...], bool] = field(default_factory=dict)
    _solutions: dict[tuple[int, ...], object] = field(default_factory=dict)

    def is_held_out(self, key: str) -> bool:
        """Whether a value multiset is kept out of all training rows."""
        return share(f"{self.seed}:held_out:{key}") < self.spec.held_out

    def is_reserved(self, hand_id: str) -> bool:
        """Whether an ordered hand is kept for in-distribution probes."""
        return share(f"{self.seed}:reserved:{hand_id}") < self.spec.reserved

    def is_solvable(self, values: tuple[int, ...]) -> bool:
        """Whether ascending ``values`` reach the target."""
        known = self._solvable.get(values)
        if known is None:
            known = self._solvable[values] = solvable(values, self.spec.target)
        return known

    def solution(self, values: tuple[int, ...]) -> object | None:
        """The format's canonical solution of ascending ``values``; None when it cannot express one."""
        if values not in self._solutions:
            self._solutions[values] = self.prompt_format.canonical_solution(values, self.spec.target)
        return self._solutions[values]

    @cached_property
    def accepts(self) -> dict[str, Callable[[Hand], bool]]:
        """Stream → which solvable hands belong to it."""

        def training(hand: Hand) -> bool:
            return not self.is_held_out(hand.hand_key) and not self.is_reserved(hand.hand_id)

        def unseen(hand: Hand) -> bool:
            return not self.is_held_out(hand.hand_key) and self.is_reserved(hand.hand_id)

        def held_out(hand: Hand) -> bool:
            return self.is_held_out(hand.hand_key)

        def shared(hand: Hand) -> bool:
            return not self.is_held_out(hand.hand_key)

        return dict(zip(STREAMS, (training, training, unseen, held_out, shared, held_out), strict=True))

    def rule(self, stream: str) -> Rule:
        """The rule of a stream's prompts."""
        return self.spec.rule(rule_name(stream))

    def hands(self, stream: str, wanted: int, *, distinct: bool, key: str) -> list[Hand]:
        """``wanted`` hands of a stream, independent draws or (``distinct``) different ordered hands.

        Args:
            stream: one of `STREAMS`.
            wanted: how many.
            distinct: keep only the first draw of an ordered hand.
            key: params key to blame when there are too few.

        Raises:
            UserError: no hand is solvable, or there are too few hands of this kind.
        """
        found: dict[Hand, None] | list[Hand] = {} if distinct else []
        # Independent draws never run out, so only their acceptance rate can be hopeless.
        most_draws = _MOST_DRAWS if distinct else max(_MOST_DRAWS, _DRAWS_PER_ROW * wanted)
        accept, drawn, any_solvable = self.accepts[stream], 0, False
        self.excluded[stream] = 0
        for hand in self._draws(stream):
            drawn += 1
            if len(found) == wanted:
                return list(found)
            if drawn > most_draws or (drawn > _HOPELESS_DRAWS and not any_solvable):
                break
            if not self.is_solvable(hand.values):
                continue
            any_solvable = True
            if not accept(hand):
                continue
            if self.solution(hand.values) is None:
                self.excluded[stream] += 1
            elif isinstance(found, dict):
                found[hand] = None
            else:
                found.append(hand)
        if not any_solvable:
            raise impossible(self.spec)
        raise UserError(
            f"{key} asks for {wanted}{' different' if distinct else ''} {stream} hands, but only {len(found)} turned "
            f"up in {most_draws} draws; lower {key}, or change task.held_out, task.reserved or task.cards."
        )

    def _draws(self, stream: str) -> Iterator[Hand]:
        spec, rule = self.spec, self.rule(stream)
        draw = Draw(spec.cards, spec.deck, spec.replacement, faces=rule_name(stream) == "ood")
        rng = np.random.default_rng([self.seed, STREAMS.index(stream)])
        while True:
            for cards in symbols_of(draw_hands(rng, _BATCH, draw), draw):
                yield Hand(cards, tuple(sorted(rule.values(cards))))


def rule_name(stream: str) -> str:
    """``ood`` for the out-of-distribution conditions, ``id`` for the rest."""
    return "ood" if stream.startswith("ood") else "id"


def impossible(spec: GeneralPointsSpec) -> UserError:
    """The error of a task without any solvable hand."""
    return UserError(
        f"task.target is {spec.target}, which no hand of {spec.cards} cards reaches under these rules; "
        "choose another target."
    )
