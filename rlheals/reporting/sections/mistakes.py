"""What wrong answers look like: unreadable, or right under the wrong rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.reporting.figures import format_errors, shortcut
from rlheals.reporting.figures.charts import first_tries
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.sections.ladder import accuracy
from rlheals.reporting.words import span

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study


def build(study: Study) -> Content:
    """Format errors and the training-rule shortcut along the ladder."""
    rows = first_tries(study.summary)
    at_end = [accuracy(rows, choice, "ood", choice.end) for choice in study.choices]
    figures = {
        "format_errors": Figure(
            format_errors(study.summary, study.choices),
            "First answers that cannot be read as an answer at all. Early gains in accuracy include learning the "
            "format.",
        ),
        "shortcut": Figure(
            shortcut(study.summary, study.choices),
            "Top: OOD prompts answered with a formula that would be right under the training rule. Bottom: answers "
            "that write down the card values that the prompt's rule asks for.",
        ),
    }
    finding = (
        f"At SFT_End, {span([row['training_rule_rate'] for row in at_end])} of the OOD prompts get an answer that is "
        f"right under the training rule, and {span([row['format_error_rate'] for row in at_end])} an unreadable one."
    )
    return Content(figures=figures, findings=[finding], metrics=_metrics(study))


def _metrics(study: Study) -> RunMetrics:
    rows = first_tries(study.summary)
    return {
        (choice.model, choice.seed): {
            "ood_format_error_end": accuracy(rows, choice, "ood", choice.end)["format_error_rate"],
            "ood_training_rule_end": accuracy(rows, choice, "ood", choice.end)["training_rule_rate"],
        }
        for choice in study.choices
    }


SECTION = Section("mistakes", "What the mistakes are", 40, build)
