"""The 24-points card game of the paper (GeneralPoints, text only)."""

from __future__ import annotations

from rlheals.tasks.core import register
from rlheals.tasks.general_points.spec import GeneralPointsSpec
from rlheals.tasks.general_points.task import GeneralPoints

__all__ = ["GeneralPoints", "GeneralPointsSpec"]

register("general_points", GeneralPointsSpec, GeneralPoints)
