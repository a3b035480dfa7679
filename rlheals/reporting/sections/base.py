"""Pretraining of the tiny base, when there was one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.reporting.figures import base_training
from rlheals.reporting.sections.core import Content, Figure, Section

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study


def build(study: Study) -> Content | None:
    """The loss curve of pretraining; None when every base was loaded from a folder."""
    table = study.table("base", "training.parquet", "training")
    if table is None or table.is_empty():
        return None
    caption = "Loss of the training batches on the synthetic pretraining mixture, before any fine-tuning."
    return Content(figures={"base_training": Figure(base_training(table), caption)})


SECTION = Section("base", "The base model", 60, build)
