"""Made-up but valid outputs of ``dataset``, ``base``, ``probe_sft`` and ``probe_rl``, for tests without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl

from rlheals.evaluation.recovery import recovery_table, recovery_windows
from rlheals.params import Params
from rlheals.publish import publish
from rlheals.reporting.schemas import SCHEMAS, write_table
from rlheals.stats import difference_from_counts, pair_counts, wilson

REPOSITORY = Path(__file__).parents[2]
CONDITIONS = ("id", "id_heldout", "ood", "ood_heldout")
# True solve rates by rung; shaped like forgetting: OOD rises, then falls, while ID stays.
LADDER = {
    0: (0.00, 0.00, 0.00, 0.00),
    5: (0.78, 0.74, 0.76, 0.75),
    10: (0.86, 0.80, 0.92, 0.90),
    20: (0.90, 0.76, 0.80, 0.79),
    40: (0.93, 0.66, 0.62, 0.63),
    80: (0.94, 0.62, 0.28, 0.27),
    160: (0.95, 0.52, 0.15, 0.14),
    320: (0.97, 0.44, 0.07, 0.05),
}
# Share of the unsolved OOD hands that RL wins, or (negative) of the solved ones that it loses, by arm and start.
GAINS = {
    "ppo": {5: 0.0, 10: -0.1, 40: 0.5, 160: 0.02, 320: 0.0},
    "reward_only": {5: 0.0, 10: -0.3, 40: 0.1, 160: 0.0, 320: 0.0},
    "kl_only": {5: 0.0, 10: 0.0, 40: 0.6, 160: 0.1, 320: 0.05},
}
LOSSES = {"train_id": (0.23, 0.006), "test_id": (0.23, 0.008), "ood": (0.24, 0.32)}


def make_params(
    seeds: list[int] | None = None,
    models: list[str] | None = None,
    profile: str = "mini",
    arms: tuple[str, ...] = ("ppo",),
) -> Params:
    """Params of the mini preset with another set of runs and the ladder and starts of this module."""
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load((REPOSITORY / "rlheals/presets/mini.yaml").read_text())
    raw["profile"], raw["seeds"] = profile, seeds or [0]
    raw["models"] = models or ["tiny"]
    for name in raw["models"]:
        raw["model"].setdefault(name, raw["model"]["tiny"])
    raw["sft"] |= {"checkpoints": list(LADDER), "steps": max(LADDER)}
    raw["ppo"] |= {"starts": list(GAINS["ppo"]), "arms": list(arms), "updates": 24, "checkpoints": [12, 24]}
    raw["spectra"] |= {"rl_arm": arms[0], "rl_start": 40}
    return Params.model_validate(raw)


def make_project(root: Path, params: Params, hands: int = 300, ladder: dict[int, tuple[float, ...]] = LADDER) -> None:
    """Write all stage outputs of every declared run below ``root``."""
    for model in params.models:
        for seed in params.seeds:
            make_run(root, params.profile, model, seed, hands, ladder)


def make_run(
    root: Path, profile: str, model: str, seed: int, hands: int = 300, ladder: dict[int, tuple[float, ...]] = LADDER
) -> None:
    """Write the outputs of one run."""
    rng = np.random.default_rng([seed, len(model)])
    columns = {"profile": profile, "model": model, "seed": seed}
    data = root / "data" / profile
    peak = max(ladder, key=lambda step: ladder[step][2])
    if seed == 2 and 20 in ladder:  # one seed with another peak, as real ones have
        ladder = ladder | {10: ladder[20], 20: ladder[10]}
        peak = 20
    answers, solved = _answers(columns, ladder, hands, rng, {peak, max(ladder)})
    with publish(data / "probe_sft" / model / str(seed)) as out:
        write_table(answers, "answers", out / "answers.parquet")
        write_table(_summary(columns, answers), "probe_summary", out / "probe_summary.parquet")
        write_table(_losses(columns, ladder, rng), "losses", out / "losses.parquet")
        write_table(_selection(columns, solved, peak, max(ladder)), "selection", out / "selection.parquet")
        (out / "selection.json").write_text(json.dumps({"max_ood": peak, "end": max(ladder)}))
    with publish(data / "dataset" / model / str(seed)) as out:
        (out / "leakage.json").write_text(json.dumps({"sft_rows_checked": 20480, "shared": {"id": 0, "ood": 0}}))
    with publish(data / "base" / model / str(seed)) as out:
        write_table(_training(columns, rng), "training", out / "training.parquet")


def _answers(columns, ladder, hands, rng, retried):
    """Answers of every rung; the chosen ones get up to five attempts on confirm."""
    rows, solved = [], {}
    difficulty = {(c, s): rng.random(hands) for c in CONDITIONS for s in ("select", "confirm")}
    for step, rates in ladder.items():
        for condition, rate in zip(CONDITIONS, rates, strict=True):
            rate = float(np.clip(rate + (rng.normal(0, 0.03) if rate else 0.0), 0, 1))
            for split in ("select", "confirm"):
                # A hand's difficulty is shared by all rungs, so that outcomes are correlated as real ones are.
                luck = 0.7 * difficulty[condition, split] + 0.3 * rng.random(hands)
                first = luck < np.quantile(luck, rate) if rate else np.zeros(hands, dtype=bool)
                if split == "confirm":
                    solved[step, condition] = first
                for hand in range(hands):
                    tries = 5 if split == "confirm" and step in retried and not first[hand] else 1
                    for attempt in range(1, tries + 1):
                        won = bool(first[hand]) if attempt == 1 else bool(attempt == 5 and hand % 97 == 0)
                        rows.append(
                            _answer(columns, step, condition, split, hand, attempt, won, bool(first[hand]), rng)
                        )
    return pl.DataFrame(rows, schema=SCHEMAS["answers"], orient="row"), solved


def _answer(columns, step, condition, split, hand, attempt, won, first, rng):
    unreadable = step == 0 or (not won and rng.random() < 0.02)
    old_rule = condition.startswith("ood") and not won and not unreadable and rng.random() < min(step / 400, 0.8)
    verdict = "solved" if won else "no_formula" if unreadable else "wrong_number"
    return {
        **columns,
        "stage": "sft" if step else "base",
        "checkpoint_step": step,
        "cell_id": "",
        "condition": condition,
        "split": split,
        "hand_id": f"{condition} {split} {hand}",
        "attempt": attempt,
        "response": "words",
        "verdict": verdict,
        "reward": 5.0 if won else -1.0,
        "solved": won,
        "solved_first_try": first,
        "solved_under_training_rule": won if condition.startswith("id") else old_rule,
        "format_error": unreadable,
        "fields_ok": won or not (old_rule or unreadable),
        "tokens": 30,
        "engine": "transformers",
        "sampling": "greedy",
    }


def _summary(columns, answers):
    rows = []
    keys = ["stage", "checkpoint_step", "condition", "split"]
    for (stage, step, condition, split), group in answers.group_by(keys, maintain_order=True):
        first = group.filter(pl.col("attempt") == 1)
        n = len(first)
        for attempts in (1,) if group["attempt"].max() == 1 else (1, 5):
            k = int(first["solved"].sum() if attempts == 1 else group["solved"].sum())
            failed = n - int(first["solved"].sum())
            low, high = wilson(k, n)
            rows.append(
                {**columns, "stage": stage, "checkpoint_step": step, "cell_id": "", "condition": condition}
                | {"split": split, "attempts": attempts, "n": n, "solved": k, "accuracy": k / n}
                | {"wilson_low": low, "wilson_high": high, "format_error_rate": first["format_error"].mean()}
                | {"training_rule_rate": first["solved_under_training_rule"].mean()}
                | {"fields_ok_rate": first["fields_ok"].mean(), "mean_reward": first["reward"].mean()}
                | {"solved_later_given_first_failed": (k - (n - failed)) / failed if attempts > 1 and failed else None}
            )
    return pl.DataFrame(rows, schema=SCHEMAS["probe_summary"], orient="row")


def _losses(columns, ladder, rng):
    rows = []
    for series, (start, end) in LOSSES.items():
        for step in range(0, max(ladder) + 1, 10):
            share = np.log1p(step / 5) / np.log1p(max(ladder) / 5)
            dip = 0.22 * np.exp(-(((step - 20) / 15) ** 2)) if series == "ood" else 0.0
            value = float(start ** (1 - share) * end**share - dip) * float(np.exp(rng.normal(0, 0.03)))
            rows.append({**columns, "series": series, "step": step, "tokens": 7424, "nll_per_token": abs(value)})
    return pl.DataFrame(rows, schema=SCHEMAS["losses"], orient="row")


def _selection(columns, solved, peak, end):
    picks = {
        "select_ood_accuracy": peak,
        "ood_loss": 20 if peak != 20 else 40,
        "test_id_loss": end,
        "train_id_loss": end,
        "last": end,
    }
    rows = []
    for criterion, step in picks.items():
        step = step if (step, "ood") in solved else end
        result = difference_from_counts(pair_counts(solved[peak, "ood"], solved[step, "ood"]))
        rows.append(
            {**columns, "criterion": criterion, "checkpoint_step": step}
            | {"ood_accuracy_confirm": float(solved[step, "ood"].mean()), "best_step_confirm": peak}
            | {"regret": result.estimate, "regret_low": result.low, "regret_high": result.high}
            | {"p_value": result.p_value, "n": result.counts.n}
        )
    return pl.DataFrame(rows, schema=SCHEMAS["selection"], orient="row")


def _training(columns, rng):
    rows = []
    for step in range(10, 1610, 10):
        loss = 4.6 * np.exp(-step / 350) + 0.25 + 0.05 * rng.random()
        rows.append(
            {**columns, "stage": "base", "step": step, "loss": float(loss), "learning_rate": 2e-3}
            | {"gradient_norm": 1.0, "tokens": 64 * 30 * step}
        )
    return pl.DataFrame(rows, schema=SCHEMAS["training"], orient="row")


def make_branches(root: Path, params: Params, gains: dict[str, dict[int, float]] = GAINS) -> None:
    """Write the output of ``probe_rl`` for every declared run, whose ``probe_sft`` must be there."""
    for model in params.models:
        for seed in params.seeds:
            _make_branches(root, params, model, seed, gains)


def _make_branches(root, params, model, seed, gains):
    rng = np.random.default_rng([seed, 77])
    ladder = root / "data" / params.profile / "probe_sft" / model / str(seed)
    before = pl.read_parquet(ladder / "answers.parquet")
    max_ood = json.loads((ladder / "selection.json").read_text())["max_ood"]
    columns = {"profile": params.profile, "model": model, "seed": seed}
    keys = [(arm, start, u) for arm in params.ppo.arms for start in params.ppo.starts for u in params.ppo.checkpoints]
    answers = pl.concat([_after(before, arm, start, u, gains[arm][start], rng) for arm, start, u in keys])
    branches = [(arm, start) for arm in params.ppo.arms for start in params.ppo.starts]
    tables = {
        "answers": answers,
        "recovery": recovery_table(answers, before, max_ood),
        "recovery_window": recovery_windows(answers, before, 200, seed),
        "rl_training": pl.DataFrame(
            [_update(columns, arm, start, u, rng) for arm, start in branches for u in range(1, 25)],
            schema=SCHEMAS["rl_training"],
        ),
        "advantages": pl.DataFrame(
            [
                {**columns, "checkpoint_step": start, "arm": arm, "update": 1}
                | {"bin_left": left, "bin_right": left + 1, "count": 64}
                for arm, start in branches
                for left in (-1.0, 0.0)
            ],
            schema=SCHEMAS["advantages"],
        ),
        "doctor": pl.DataFrame(
            [
                {**columns, "checkpoint_step": 5, "arm": "ppo", "update": u, "check": "format", "level": "error"}
                | {"value": 0.99, "limit": 0.5, "cause": "no answer can be read", "parameter": "ppo.starts"}
                for u in (3, 4)
            ],
            schema=SCHEMAS["doctor"],
        ),
    }
    losses = pl.DataFrame(
        [
            {**columns, "checkpoint_step": start, "arm": arm, "update": u, "series": series, "tokens": 7424}
            | {"nll_per_token": float(np.exp(rng.normal(-2, 0.5)))}
            for arm, start in branches
            for u in (0, *params.ppo.checkpoints)
            for series in LOSSES
        ],
        schema=SCHEMAS["rl_losses"],
    )
    with publish(root / "data" / params.profile / "probe_rl" / model / str(seed)) as out:
        for name, table in tables.items():
            write_table(table, name, out / f"{name}.parquet")
        write_table(losses, "rl_losses", out / "losses.parquet")


def _after(before, arm, start, update, gain, rng):
    """First confirm answers of the start with some outcomes changed; ID hands lose or win a fifth as many."""
    rows = before.filter(
        (pl.col("checkpoint_step") == start) & (pl.col("split") == "confirm") & (pl.col("attempt") == 1)
    )
    solved = rows["solved"].to_numpy().copy()
    share = np.where(rows["condition"].str.starts_with("ood").to_numpy(), abs(gain), abs(gain) / 5)
    flipped = (rng.random(len(rows)) < share) & (solved if gain < 0 else ~solved)
    outcome = pl.Series(solved ^ flipped)
    return rows.with_columns(
        stage=pl.lit("rl"), cell_id=pl.lit(f"{arm}/{update}"), solved=outcome, solved_first_try=outcome
    )


def _update(columns, arm, start, update, rng):
    row = dict.fromkeys(SCHEMAS["rl_training"], 0.0)
    row |= {**columns, "checkpoint_step": start, "arm": arm, "update": update, "episodes": 128, "turns": 128}
    row |= {"tokens": 3800, "solved_rate": 0.5 + update / 100, "reward_mean": 0.1, "format_error_rate": 0.02}
    row |= {"learning_rate": 2e-4 if update > 2 else 0.0}  # two updates of warm-up, as the trainer has
    row |= {
        "kl_reference": None if arm == "reward_only" else 0.2 * rng.random(),
        "entropy": float(np.exp(-update / 20)),
    }
    return row
