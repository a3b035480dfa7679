"""Grade an answer: total, exact and bounded. Text is never executed.

`verify` accepts any string. Answers longer than `MAX_CHARS` are format errors; the work on shorter ones is linear in
their length up to the size of the hand. Whether an answer is solved depends on its formula only, as in the paper's
text mode; whether the echoed cards and numbers are right is reported in ``fields_ok``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.tasks.general_points.compact_verifier import verify_compact
from rlheals.tasks.general_points.paper_verifier import verify_paper
from rlheals.tasks.general_points.rewards import (
    EMPTY,
    FORMAT,
    MAX_CHARS,
    PREFIX,
    SOLVED,
    TRUNCATED,
    UNUSED_NUMBER,
    WRONG_ARITHMETIC,
    WRONG_NUMBER,
    WRONG_VALUE,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.tasks.general_points.rules import Rule

__all__ = [
    "EMPTY",
    "FORMAT",
    "MAX_CHARS",
    "PREFIX",
    "SOLVED",
    "TRUNCATED",
    "UNUSED_NUMBER",
    "WRONG_ARITHMETIC",
    "WRONG_NUMBER",
    "WRONG_VALUE",
    "Verdict",
    "verify",
]

FIDELITIES = ("exact", "official")


def verify(text: str, cards: Sequence[str], rule: Rule, form: str, fidelity: str = "exact") -> Verdict:
    """Grade ``text`` as an answer for ``cards`` under ``rule``.

    Args:
        text: any string.
        cards: the hand's symbols, in the order of the prompt.
        rule: values and target.
        form: ``compact`` or ``paper``, the name of the prompt format.
        fidelity: ``exact`` for rational arithmetic; ``official`` for the released code's float equality, accumulated
            violations and intolerance of white space (paper form only, compact text is always graded exactly).

    Raises:
        UserError: unknown ``form`` or ``fidelity``; never because of ``text``.
    """
    if fidelity not in FIDELITIES:
        raise UserError(f"task.fidelity is {fidelity!r}; use one of: {', '.join(FIDELITIES)}.")
    if form == "compact":
        return verify_compact(text, cards, rule)
    if form == "paper":
        return verify_paper(text, cards, rule, official=fidelity == "official")
    raise UserError(f"prompt format {form!r} has no verifier; use compact or paper.")
