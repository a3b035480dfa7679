"""Whether an RL branch can stand for RL: it has to raise its own reward, or it tests nothing that is said of RL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlheals.reporting.branches import Branches
    from rlheals.reporting.claims_rl import Premise
    from rlheals.reporting.tables import Study

WORSE = "the RL runs made the trained task worse"
FLAT = "the RL runs did not raise the trained task"


def premise_of(training: pl.DataFrame) -> Premise:
    def premise(model: str, seed: int, arm: str, start: int) -> str:
        r = (
            training.filter(
                (pl.col("model") == model)
                & (pl.col("seed") == seed)
                & (pl.col("arm") == arm)
                & (pl.col("checkpoint_step") == start)
            )
            .sort("update")["reward_mean"]
            .to_list()
        )
        d = sum(r[-5:]) / 5 - sum(r[:3]) / 3
        return "" if d > 0 else WORSE

    return premise


def premise_of_model(study: Study, branches: Branches | None) -> Callable[[str, int], str]:
    """For a model and seed: why the branch that "RL" means cannot stand for RL; "" where it can or RL did not run."""
    if branches is None:
        return lambda model, seed: ""
    premise, spectra = premise_of(branches.training), study.params.spectra
    return lambda model, seed: premise(model, seed, spectra.rl_arm, spectra.rl_start)
