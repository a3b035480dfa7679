"""The RL branches: what they give back, from where, at which price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting.branches import load_branches
from rlheals.reporting.figures import recovery_curve, recovery_gain, rl_advantages, rl_losses, rl_training
from rlheals.reporting.figures.style import ARMS
from rlheals.reporting.registered import ALPHA
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.words import interval, p_value, percent, points
from rlheals.training.ppo.manipulation import RewardChange, reward_changes

if TYPE_CHECKING:
    from rlheals.reporting.branches import Branches
    from rlheals.reporting.tables import Study

LOUD = ("error", "warning")
"""Levels of the doctor's findings that the page shows."""


def build(study: Study) -> Content | None:
    """Recovery curve, gains and costs, windows, training; None when RL has not run for this profile."""
    branches = load_branches(study)
    if branches is None:
        return None
    rewards = _rewards(branches)
    runs = [_run(branches, model, seed, rewards) for model, seed in study.runs]
    return Content(
        figures=_figures(study, branches),
        context={
            "runs": runs,
            "updates": branches.last,
            "main": ARMS[branches.main].label,
            "findings": _doctor(branches),
            "tested": _tested(rewards),
            "many": len(study.runs) > 1,
        },
        findings=[_finding(branches, runs, model) for model in study.params.models],
        tables={
            "recovery.csv": branches.recovery,
            "recovery.parquet": branches.recovery,
            "recovery_window.parquet": branches.windows,
            "rl_losses.parquet": branches.losses,
            "rl_training.parquet": branches.training,
            "doctor.parquet": branches.doctor,
        },
        metrics=_metrics(branches),
    )


def _figures(study: Study, branches: Branches) -> dict[str, Figure]:
    main = ARMS[branches.main].label
    return {
        "recovery_curve": Figure(
            recovery_curve(branches.final, branches.final_windows, study.summary, study.choices),
            f"OOD hands solved at the first try: the SFT ladder, and after {branches.last} RL updates from each start.",
        ),
        "recovery_gain": Figure(
            recovery_gain(branches.final),
            "Left: change of OOD accuracy by RL. Right: what the same branch does to ID accuracy. Every RL checkpoint "
            "answers the hands of its start, so differences are paired.",
        ),
        "rl_losses": Figure(
            rl_losses(branches.losses, branches.last, branches.main),
            f"Loss on given right answers before and after RL ({main}). Healing that shows in answers need not show "
            "here: RL raises the probability of its own right answers, not of these.",
        ),
        "rl_training": Figure(
            rl_training(branches.training),
            "Episodes during RL are sampled on in-distribution training prompts; the probes are greedy unless "
            "inference.temperature says otherwise.",
        ),
        "rl_advantages": Figure(
            rl_advantages(branches.advantages, branches.training, branches.main, study.params.seeds[0]),
            f"A heap below zero are the failures, one above it the successes ({main}); a thin tail at one side means "
            "that few episodes decide the update.",
        ),
    }


Rewards = dict[tuple[str, int, str, int], RewardChange]
"""What a branch did to its own reward, by model, seed, arm and start; branches that cannot be judged are absent."""


def _rewards(branches: Branches) -> Rewards:
    names = ("model", "seed", "arm", "checkpoint_step")
    return {tuple(key[name] for name in names): found for key, found in reward_changes(branches.training)}  # type: ignore[misc]


def _tested(rewards: Rewards) -> dict[str, int]:
    """How many branches raised their own reward, beyond chance, and how many made it worse."""
    found = list(rewards.values())
    return {
        "judged": len(found),
        "raised": sum(each.solved.rises for each in found),
        "worse": sum(each.solved.falls for each in found),
    }


def _run(branches: Branches, model: str, seed: int, rewards: Rewards) -> dict[str, Any]:
    """All branches of one run, a line each, and the window of the main arm."""
    own = branches.final.filter((pl.col("model") == model) & (pl.col("seed") == seed))
    cells = {(row["arm"], row["checkpoint_step"], row["condition"]): row for row in own.to_dicts()}
    lines = [
        {
            "arm": ARMS[arm].label,
            "start": start,
            "ood": cells[arm, start, "ood"],
            "id": cells[arm, start, "id"],
            "reward": rewards.get((model, seed, arm, start)),
        }
        for arm in ARMS
        for start in sorted({step for name, step, _ in cells if name == arm})
    ]
    mine = (pl.col("model") == model) & (pl.col("seed") == seed) & (pl.col("condition") == "ood")
    window = branches.final_windows.filter(mine).row(0, named=True)
    best = cells[branches.main, window["best_step"], "ood"]
    cost = cells[branches.main, window["best_step"], "id"]
    about = {"model": model, "seed": seed, "window": window, "best": best, "cost": cost}
    return {**about, "lines": lines, "sentence": _window_sentence(window)}


def _window_sentence(window: dict[str, Any]) -> str:
    """Where the window lies, or that there is none to speak of."""
    if window["opens"] is None:
        return "there is no recovery window: no start gains OOD accuracy"
    share = f"{percent(window['found_share'], 0)} of the resamples have a window"
    if window["best_p_holm"] >= ALPHA:
        return (
            f"there is no recovery window to speak of: the largest gain, {points(window['best_difference'])} points "
            f"from step {window['best_step']}, is within noise (corrected p {p_value(window['best_p_holm'])}; {share})"
        )
    opens = _edge(window, "opens", "at or before the first start, " if window["opens_before_first"] else "")
    closes = _edge(window, "closes", "at or behind the last start, " if window["closes_after_last"] else "")
    return f"the recovery window opens {opens} and closes {closes} ({share})"


def _edge(window: dict[str, Any], name: str, beyond: str) -> str:
    low, high = window[f"{name}_low"], window[f"{name}_high"]
    return f"{beyond or 'at '}step {window[name]:.0f} [{low:.0f}, {high:.0f}]"


def _finding(branches: Branches, runs: list[dict[str, Any]], model: str) -> str:
    """The largest gain of the main arm in every run, with its price, and the window."""
    parts = []
    own = [run for run in runs if run["model"] == model]
    for run in own:
        best, cost = run["best"], run["cost"]
        where = f"seed {run['seed']}: " if len(own) > 1 else ""
        lost = best["recovered"] is not None
        share = f" ({percent(best['recovered'], 0)} of what SFT lost since SFT_MaxOOD)" if lost else ""
        parts.append(
            f"{where}OOD {points(best['difference'])} points {_brackets(best)} at best, from step "
            f"{best['checkpoint_step']}{share}, ID {points(cost['difference'])} {_brackets(cost)}; {run['sentence']}"
        )
    label = ARMS[branches.main].label
    return f"RL ({label}, {branches.last} updates) on model {model}: {'. '.join(parts)}."


def _brackets(row: dict[str, Any]) -> str:
    return interval(row["difference_low"], row["difference_high"])


def _doctor(branches: Branches) -> list[dict[str, Any]]:
    """The doctor's loud findings, one row a branch and check, with the first update and how often."""
    rows = branches.doctor.filter(pl.col("level").is_in(LOUD)).sort("update")
    keys = ["model", "seed", "arm", "checkpoint_step", "check", "level"]
    table = rows.group_by(keys, maintain_order=True).agg(
        pl.len().alias("times"), pl.col("update", "value", "limit", "cause", "parameter").first()
    )
    labels = {key: look.label for key, look in ARMS.items()}
    return (
        table.sort("level", "model", "seed", "arm", "checkpoint_step")
        .with_columns(pl.col("arm").replace(labels))
        .to_dicts()
    )


def _metrics(branches: Branches) -> RunMetrics:
    found: RunMetrics = {}
    for window in branches.final_windows.filter(pl.col("condition") == "ood").to_dicts():
        found[window["model"], window["seed"]] = {
            "rl_best_start": window["best_step"],
            "rl_ood_gain_best": window["best_difference"],
            "rl_window_opens": window["opens"],
            "rl_window_closes": window["closes"],
        }
    return found


SECTION = Section("recovery", "What RL gives back", 35, build)
