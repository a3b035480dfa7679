"""Figures: every public function turns tables into one Altair chart."""

from __future__ import annotations

from rlheals.reporting.figures.advantages import rl_advantages as rl_advantages
from rlheals.reporting.figures.charts import base_training as base_training
from rlheals.reporting.figures.charts import format_errors as format_errors
from rlheals.reporting.figures.charts import ladder_accuracy as ladder_accuracy
from rlheals.reporting.figures.charts import losses as losses
from rlheals.reporting.figures.charts import shortcut as shortcut
from rlheals.reporting.figures.dots import regret as regret
from rlheals.reporting.figures.dots import retries as retries
from rlheals.reporting.figures.dots import retry_table as retry_table
from rlheals.reporting.figures.recovery import recovery_curve as recovery_curve
from rlheals.reporting.figures.recovery import recovery_gain as recovery_gain
from rlheals.reporting.figures.recovery import rl_losses as rl_losses
from rlheals.reporting.figures.recovery import rl_training as rl_training
