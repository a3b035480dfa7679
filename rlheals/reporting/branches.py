"""The tables of the RL branches of a study, checked against what params declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from rlheals.errors import UserError

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study

STAGE = "probe_rl"
FILES = {
    "recovery": "recovery.parquet",
    "recovery_window": "recovery_window.parquet",
    "rl_losses": "losses.parquet",
    "rl_training": "rl_training.parquet",
    "advantages": "advantages.parquet",
    "doctor": "doctor.parquet",
    "answers": "answers.parquet",
}


@dataclass(frozen=True, slots=True)
class Branches:
    """What ``probe_rl`` wrote for all runs; every table has all kept updates.

    Attributes:
        recovery: schema ``recovery``.
        windows: schema ``recovery_window``.
        losses: schema ``rl_losses``.
        training: schema ``rl_training``.
        advantages: schema ``advantages``.
        doctor: schema ``doctor``.
        answers: schema ``answers``.
        last: the last update, at which branches are compared.
        main: the arm that the figures of one arm show.
    """

    recovery: pl.DataFrame
    windows: pl.DataFrame
    losses: pl.DataFrame
    training: pl.DataFrame
    advantages: pl.DataFrame
    doctor: pl.DataFrame
    answers: pl.DataFrame
    last: int
    main: str

    @property
    def final(self) -> pl.DataFrame:
        """Rows of ``recovery`` after the last update."""
        return self.recovery.filter(pl.col("update") == self.last)

    @property
    def final_windows(self) -> pl.DataFrame:
        """Windows of the main arm after the last update."""
        return self.windows.filter((pl.col("update") == self.last) & (pl.col("arm") == self.main))


def load_branches(study: Study) -> Branches | None:
    """Read the tables of ``probe_rl``; None when the stage has not run for this profile.

    Raises:
        UserError: a run is missing or undeclared, a file is corrupted or of another schema, or the branches are not
            those that ``ppo`` in params declares.
    """
    found = study.tables(STAGE, FILES)
    if found is None:
        return None
    settings = study.params.ppo
    _check_branches(study, found["recovery"])
    return Branches(
        recovery=found["recovery"],
        windows=found["recovery_window"],
        losses=found["rl_losses"],
        training=found["rl_training"],
        advantages=found["advantages"],
        doctor=found["doctor"],
        answers=found["answers"],
        last=settings.checkpoints[-1],
        main="ppo" if "ppo" in settings.arms else settings.arms[0],
    )


def _check_branches(study: Study, recovery: pl.DataFrame) -> None:
    """Raise unless every run has exactly the declared branches and updates."""
    settings = study.params.ppo
    declared = {(arm, start, u) for arm in settings.arms for start in settings.starts for u in settings.checkpoints}
    for model, seed in study.runs:
        own = recovery.filter((pl.col("model") == model) & (pl.col("seed") == seed))
        odd = set(own.select("arm", "checkpoint_step", "update").iter_rows()) ^ declared
        if odd:
            arm, start, update = min(odd)
            raise UserError(
                f"{study.directory(STAGE, model, seed)} and ppo in params.yaml disagree about arm {arm} from step "
                f"{start}, update {update}; run `dvc repro`."
            )
