"""The parts of a report. A new module here that defines ``SECTION`` is a new part; nothing else names it."""

from __future__ import annotations

import importlib
import pkgutil

from rlheals.reporting.sections.core import Content as Content
from rlheals.reporting.sections.core import Figure as Figure
from rlheals.reporting.sections.core import Section as Section


def all_sections() -> list[Section]:
    """Every section of this package in reading order."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if isinstance(getattr(module, "SECTION", None), Section):
            found.append(module.SECTION)
    return sorted(found, key=lambda section: (section.order, section.key))
