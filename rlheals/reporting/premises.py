"""Whether an RL branch can stand for RL: it has to raise its own reward, or it tests nothing that is said of RL.

The check is `rlheals.training.ppo.manipulation`, which the doctor uses, too. A claim asks for more than the doctor lets
pass: a start that solves nearly everything has nothing to raise, so a branch from it is no fault, and no test either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.training.ppo.manipulation import SATURATED, reward_change

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from rlheals.reporting.branches import Branches
    from rlheals.reporting.claims_rl import Premise
    from rlheals.reporting.tables import Study

WORSE = "the RL runs made the trained task worse"
FLAT = "the RL runs did not raise the trained task"
FULL = f"the RL runs had little left to raise (the start solves over {100 * SATURATED:g} %) and did not raise it"
UNKNOWN = "the RL runs are too short to tell whether they raise the trained task"


def premise_of(training: pl.DataFrame) -> Premise:
    """The check of the manipulation for every branch of schema ``rl_training``."""
    keys = ["model", "seed", "arm", "checkpoint_step"]
    found = {
        (str(model), int(seed), str(arm), int(start)): _failure(rows)
        for (model, seed, arm, start), rows in training.group_by(keys, maintain_order=True)
    }
    return lambda model, seed, arm, start: found[model, seed, arm, start]


def premise_of_model(study: Study, branches: Branches | None) -> Callable[[str, int], str]:
    """For a model and seed: why the branch that "RL" means cannot stand for RL; "" where it can or RL did not run."""
    if branches is None:
        return lambda model, seed: ""
    premise, spectra = premise_of(branches.training), study.params.spectra
    return lambda model, seed: premise(model, seed, spectra.rl_arm, spectra.rl_start)


def _failure(rows: pl.DataFrame) -> str:
    """Why one branch cannot test a claim about RL; empty where its share of solved training hands rises.

    A share that is lower at the end made the task worse, by however little; only a rise has to be beyond chance.
    """
    found = reward_change(rows)
    if found is None:
        return UNKNOWN
    if found.solved.rises:
        return ""
    if found.change < 0:
        return WORSE
    return FULL if found.before > SATURATED else FLAT
