"""Multi-turn verification: an answer is graded, a wrong one is answered with feedback, and the game goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.tasks.core import PromptFormat, Turn
from rlheals.tasks.general_points.compact_verifier import formula_words, parse_steps
from rlheals.tasks.general_points.paper_verifier import longest_known_prefix, read_formula
from rlheals.tasks.general_points.rewards import ATTEMPT_LIMIT, FORMAT, PREFIX, TRUNCATED, WRONG_VALUE, Verdict
from rlheals.tasks.general_points.solver import reaches
from rlheals.tasks.general_points.verifier import verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.tasks.general_points.rules import Rule

FEEDBACK_MODES = ("leaking", "neutral", "none")


class GeneralPointsEpisode:
    """One hand, up to ``attempts`` graded answers.

    Args:
        cards: the hand's symbols.
        rule: the rule stated in the prompt.
        training_rule: the rule `Turn.solved_under_training_rule` is judged by.
        prompt_format: wording of prompt and feedback; its name selects the verifier's form.
        attempts: graded answers allowed.
        feedback: what a failed attempt is told. ``leaking`` names the offending numbers or the right beginning, as
            the paper's environment does; ``neutral`` only the kind of mistake; ``none`` only that it failed.
        fidelity: see `verifier.verify`.

    Raises:
        UserError: unknown feedback mode, no attempts, or a card without a value.
    """

    def __init__(
        self,
        cards: Sequence[str],
        rule: Rule,
        training_rule: Rule,
        prompt_format: PromptFormat,
        attempts: int = 5,
        feedback: str = "neutral",
        fidelity: str = "exact",
    ) -> None:
        if feedback not in FEEDBACK_MODES:
            raise UserError(f"task.feedback is {feedback!r}; use one of: {', '.join(FEEDBACK_MODES)}.")
        if attempts < 1:
            raise UserError(f"an episode of {attempts} attempts cannot be played; allow at least 1.")
        self.cards, self.rule, self.training_rule = tuple(cards), rule, training_rule
        self.values = rule.values(cards)
        self._format, self._attempts, self._mode, self._fidelity = prompt_format, attempts, feedback, fidelity
        self._done = False

    @property
    def prompt(self) -> str:
        """Text of the first user turn."""
        return self._format.prompt(self.cards, self.rule)

    @property
    def limit_reward(self) -> float:
        """Extra reward of an episode that fails to the end.

        The released environment asks for one more answer after the last graded attempt and gives -1 for it ungraded.
        No answer is wasted on that here: under official fidelity a trainer adds this number to the return instead.
        """
        return ATTEMPT_LIMIT if self._fidelity == "official" else 0.0

    def step(self, response: str) -> Turn:
        """Grade ``response``; never raises on any text. Raises `RuntimeError` once the episode is done."""
        if self._done:
            raise RuntimeError("the episode is done; make a new one")
        graded = self._verify(response, self.rule)
        under_training_rule = (
            graded.solved if self.rule == self.training_rule else self._verify(response, self.training_rule).solved
        )
        self._attempts -= 1
        self._done = graded.solved or self._attempts == 0
        return Turn(
            verdict=graded.code,
            reward=graded.reward,
            solved=graded.solved,
            solved_under_training_rule=under_training_rule,
            format_error=graded.format_error,
            fields_ok=graded.fields_ok,
            done=self._done,
            feedback=None if self._done else self._feedback(response, graded),
        )

    def _verify(self, response: str, rule: Rule) -> Verdict:
        return verify(response, self.cards, rule, self._format.name, self._fidelity)

    def _feedback(self, response: str, graded: Verdict) -> str:
        detail = self._leak(response, graded) if self._mode == "leaking" else ()
        # A player cannot act on the difference, and the compact vocabulary has one word for both.
        code = FORMAT if graded.code == TRUNCATED else graded.code
        return self._format.feedback(code, detail, self._mode)

    def _leak(self, response: str, graded: Verdict) -> Sequence[str]:
        """The offending numbers, or the longest beginning of the formula from which the target can be reached."""
        if graded.code not in (WRONG_VALUE, PREFIX):
            return graded.detail
        if self._format.name == "compact":
            return right_steps(response, self.values, self.rule.target)
        formula = read_formula(response, official=self._fidelity == "official") or ""
        prefix = longest_known_prefix(formula, self.values, self.rule.target)
        return (prefix,) if prefix else ()


def right_steps(response: str, values: Sequence[int], target: int) -> list[str]:
    """Words ``a op b c`` of the leading steps of a compact answer after which ``target`` can still be reached.

    The answer's steps are valid, as after the verdict ``wrong_value``.
    """
    pool = [(value, 1) for value in values]
    words: list[str] = []
    formula = formula_words(response)
    for place, (a, _, b, c) in enumerate(parse_steps(formula) or []):
        pool.remove(a)
        pool.remove(b)
        pool.append(c)
        if not reaches(tuple(pool), (target, 1)):
            break
        step = formula[6 * place : 6 * place + 5]
        words += [*step[:3], step[4]]
    return words
