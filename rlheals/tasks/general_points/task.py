"""GeneralPoints as a `Task`: combine the values of a hand of cards to a target."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.tasks.general_points.loop import GeneralPointsEpisode
from rlheals.tasks.general_points.rules import FACES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlheals.tasks.core import DatasetSizes, PromptFormat, TaskData
    from rlheals.tasks.general_points.spec import GeneralPointsSpec as GeneralPointsSpec

FORMATS = ("compact", "paper")


class GeneralPoints:
    """See `rlheals.tasks.core.Task`."""

    name = "general_points"

    def __init__(self, spec: GeneralPointsSpec) -> None:
        self.spec = spec

    def format(self, name: str) -> PromptFormat:
        """The prompt format called ``name``; raises `UserError` naming the known ones."""
        from rlheals.tasks.general_points.compact import CompactFormat
        from rlheals.tasks.general_points.paper_format import PaperFormat

        if name not in FORMATS:
            raise UserError(f"prompt_format {name!r} is unknown to general_points; use one of: {', '.join(FORMATS)}.")
        if name == "paper":
            return PaperFormat()
        unstated = (set(self.spec.training_rule) | set(self.spec.ood_rule)) - set(FACES)
        if unstated:
            raise UserError(
                f"task rules give a value to {min(unstated)}, but prompts of the compact format state only those of J, "
                "Q and K; remove it from task.training_rule and task.ood_rule, or use prompt_format: paper."
            )
        return CompactFormat()

    def build(self, prompt_format: str, sizes: DatasetSizes, seed: int) -> TaskData:
        """All tables of the study; a pure function of its arguments and ``spec``.

        Training rows use hands under the training rule whose value multiset is not held out and whose ordered hand is
        not reserved. Probe conditions: ``id`` are reserved hands; ``id_heldout`` hands whose value multiset is held
        out; ``ood`` and ``ood_heldout`` the same two kinds of value multisets under the other rule, drawn with at
        least one face card. Hands of ``select``, ``confirm`` and the loss sets are all different within a condition.

        Raises:
            UserError: impossible task (no solvable hand), too few hands for ``sizes``, or a leak of held-out hands.
        """
        from rlheals.tasks.general_points.dataset import build

        return build(self.spec, self.format(prompt_format), sizes, seed)

    def episode(self, item: str, prompt_format: str, attempts: int, feedback: str) -> GeneralPointsEpisode:
        """A graded episode for ``item``, the JSON payload stored in the probe and RL tables.

        Raises:
            UserError: ``item`` is not such a payload.
        """
        try:
            payload = json.loads(item)
            cards, rule = [str(card) for card in payload["cards"]], payload["rule"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"item {item!r} is not a general_points hand; rebuild the dataset stage.") from error
        if rule not in ("id", "ood"):
            raise UserError(f"item {item!r} names rule {rule!r}, not id or ood; rebuild the dataset stage.")
        return self.play(cards, rule, self.format(prompt_format), attempts, feedback)

    def play(
        self,
        cards: Sequence[str],
        rule: str,
        prompt_format: PromptFormat,
        attempts: int | None = None,
        feedback: str | None = None,
    ) -> GeneralPointsEpisode:
        """An episode for ``cards`` under the ``id`` or ``ood`` rule; what is None comes from the spec."""
        return GeneralPointsEpisode(
            cards,
            self.spec.rule(rule),
            self.spec.rule("id"),
            prompt_format,
            self.spec.attempts if attempts is None else attempts,
            self.spec.feedback if feedback is None else feedback,
            self.spec.fidelity,
        )

    def vocabulary(self) -> list[str]:
        """Every word of the compact format, special tokens first."""
        from rlheals.tasks.general_points.pretraining import vocabulary

        return vocabulary()

    def special_words(self) -> dict[str, str]:
        """The vocabulary's special words by role."""
        from rlheals.tasks.general_points.pretraining import special_words

        return special_words()

    def pretraining_rows(self, mixture: Mapping[str, float], rng: Any, count: int) -> list[list[tuple[str, bool]]]:
        """``count`` rows of the tiny base's synthetic mixture; see `pretraining.pretraining_rows`."""
        from rlheals.tasks.general_points.pretraining import pretraining_rows

        return pretraining_rows(mixture, rng, count, self.spec)
