"""One schema per table, checked when a table is written and when it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from rlheals.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

_RUN = {"profile": pl.String, "model": pl.String, "seed": pl.Int64}
_RUNG = {**_RUN, "stage": pl.String, "checkpoint_step": pl.Int64, "cell_id": pl.String}
_BRANCH = {**_RUN, "checkpoint_step": pl.Int64, "arm": pl.String}  # the start and the arm of an RL branch

SCHEMAS: dict[str, dict[str, type[pl.DataType] | pl.DataType]] = {
    "hands": {
        "hand_key": pl.String,  # value multiset, ascending, comma-separated
        "values": pl.List(pl.Int64),
        "solvable": pl.Boolean,
        "solutions": pl.Int64,  # distinct solution expressions the solver finds
        "expressible": pl.Boolean,  # the prompt format can write a solution
        "held_out": pl.Boolean,
    },
    "sft": {
        "row_id": pl.Int64,
        "hand_id": pl.String,
        "hand_key": pl.String,
        "prompt": pl.String,
        "completion": pl.String,
    },
    "rl_prompts": {
        "row_id": pl.Int64,
        "hand_id": pl.String,
        "hand_key": pl.String,
        "prompt": pl.String,
        "item": pl.String,
    },
    "probes": {
        "condition": pl.String,
        "split": pl.String,
        "hand_id": pl.String,  # the ordered cards, e.g. "A 4 10 K"
        "hand_key": pl.String,
        "prompt": pl.String,
        "item": pl.String,  # JSON payload for Task.episode
    },
    "loss_sets": {"series": pl.String, "hand_id": pl.String, "prompt": pl.String, "completion": pl.String},
    "answers": {
        **_RUNG,
        "condition": pl.String,
        "split": pl.String,
        "hand_id": pl.String,
        "attempt": pl.Int64,
        "response": pl.String,
        "verdict": pl.String,
        "reward": pl.Float64,
        "solved": pl.Boolean,
        "solved_first_try": pl.Boolean,
        "solved_under_training_rule": pl.Boolean,
        "format_error": pl.Boolean,
        "fields_ok": pl.Boolean,
        "tokens": pl.Int64,
        "engine": pl.String,
        "sampling": pl.String,  # e.g. "greedy" or "temperature=0.6,top_p=0.9,seed=0"
    },
    # One row per rung x condition x split x attempts allowed (1 = first try, 5 = within five).
    "probe_summary": {
        **_RUNG,
        "condition": pl.String,
        "split": pl.String,
        "attempts": pl.Int64,
        "n": pl.Int64,
        "solved": pl.Int64,
        "accuracy": pl.Float64,
        "wilson_low": pl.Float64,
        "wilson_high": pl.Float64,
        "format_error_rate": pl.Float64,  # share of first attempts
        "training_rule_rate": pl.Float64,  # share of first attempts solved under the training rule
        "fields_ok_rate": pl.Float64,
        "mean_reward": pl.Float64,  # of first attempts
        "solved_later_given_first_failed": pl.Float64,  # null when attempts = 1
    },
    "losses": {
        **_RUN,
        "series": pl.String,  # train_id | test_id | ood
        "step": pl.Int64,
        "tokens": pl.Int64,
        "nll_per_token": pl.Float64,
    },
    # Training curves: one row per logged optimiser step of base or sft.
    "training": {
        **_RUN,
        "stage": pl.String,
        "step": pl.Int64,
        "loss": pl.Float64,
        "learning_rate": pl.Float64,
        "gradient_norm": pl.Float64,
        "tokens": pl.Int64,  # of the step; padding counts in base, not in sft
    },
    # How well a rule that looks only at a loss (or at accuracy on `select`) picks the rung with the best OOD accuracy.
    "selection": {
        **_RUN,
        "criterion": pl.String,  # select_ood_accuracy | ood_loss | test_id_loss | train_id_loss | last
        "checkpoint_step": pl.Int64,
        "ood_accuracy_confirm": pl.Float64,
        "best_step_confirm": pl.Int64,
        "regret": pl.Float64,  # accuracy of SFT_MaxOOD (picked on select) minus accuracy of this pick, both on confirm
        "regret_low": pl.Float64,
        "regret_high": pl.Float64,
        "p_value": pl.Float64,  # exact McNemar, paired on hands
        "n": pl.Int64,
    },
    # One row per update of an RL branch; null where an arm has no such number (no critic, no clipping, no reference).
    "rl_training": {
        **_BRANCH,
        "update": pl.Int64,
        "episodes": pl.Int64,
        "turns": pl.Int64,
        "tokens": pl.Int64,  # of responses
        "reward_mean": pl.Float64,  # of episodes
        "reward_std": pl.Float64,
        "solved_rate": pl.Float64,
        "format_error_rate": pl.Float64,  # share of turns
        "kl_reference": pl.Float64,  # nats a token, policy || reference
        "kl_old": pl.Float64,  # nats a token, policy before the update || after
        "entropy": pl.Float64,
        "clip_fraction": pl.Float64,
        "policy_loss": pl.Float64,
        "value_loss": pl.Float64,
        "explained_variance": pl.Float64,
        "grad_norm": pl.Float64,  # mean over the steps of the update, before clipping
        "grad_norm_low": pl.Float64,  # of its steps; null where the trainer tells one number only
        "grad_norm_high": pl.Float64,
        "grad_norm_limit": pl.Float64,  # gradients are clipped to this norm
        "flat_groups": pl.Float64,  # share of groups whose episodes all have one reward; null without groups
        "learning_rate": pl.Float64,
        "ratio_max_deviation_first": pl.Float64,  # largest |ratio - 1| in the first pass of the update
        "engine_ratio_deviation": pl.Float64,  # largest |ratio - 1| of a token, trainer over engine; null if one model
        "advantage_mean": pl.Float64,  # before normalisation, as the other four
        "advantage_std": pl.Float64,
        "advantage_skew": pl.Float64,
        "advantage_kurtosis": pl.Float64,  # excess over a Gaussian's
        "advantage_positive_share": pl.Float64,
        "response_tokens_mean": pl.Float64,
        "seconds_rollout": pl.Float64,
        "seconds_score": pl.Float64,
        "seconds_train": pl.Float64,
    },
    # Histogram of the advantages of each update.
    "advantages": {**_BRANCH, "update": pl.Int64, "bin_left": pl.Float64, "bin_right": pl.Float64, "count": pl.Int64},
    # What the doctor found in a branch's training curves.
    "doctor": {
        **_BRANCH,
        "update": pl.Int64,
        "check": pl.String,
        "level": pl.String,
        "value": pl.Float64,
        "limit": pl.Float64,
        "cause": pl.String,
        "parameter": pl.String,  # the one to change
    },
    # Teacher-forced losses of an RL branch; update 0 is its start.
    "rl_losses": {
        **_BRANCH,
        "update": pl.Int64,
        "series": pl.String,  # train_id | test_id | ood
        "tokens": pl.Int64,
        "nll_per_token": pl.Float64,
    },
    # First tries after RL against those of the start on the same confirm hands: one row per branch, update, condition.
    "recovery": {
        **_BRANCH,
        "update": pl.Int64,
        "condition": pl.String,
        "n": pl.Int64,
        "before": pl.Float64,  # accuracy of the start
        "before_low": pl.Float64,  # 95 % Wilson
        "before_high": pl.Float64,
        "after": pl.Float64,
        "after_low": pl.Float64,
        "after_high": pl.Float64,
        "only_after": pl.Int64,  # hands that only the RL checkpoint solves
        "only_before": pl.Int64,
        "difference": pl.Float64,  # after minus before
        "difference_low": pl.Float64,  # Newcombe's paired interval
        "difference_high": pl.Float64,
        "p_value": pl.Float64,  # exact McNemar
        "peak": pl.Float64,  # accuracy of SFT_MaxOOD on the same hands
        "recovered": pl.Float64,  # difference / (peak - before); null where nothing was lost
        "format_error_before": pl.Float64,
        "format_error_after": pl.Float64,
    },
    # Range of starts from which RL raises OOD accuracy, with percentiles of a bootstrap over hands.
    "recovery_window": {
        **_RUN,
        "arm": pl.String,
        "update": pl.Int64,
        "condition": pl.String,
        "n": pl.Int64,
        "starts": pl.Int64,
        "best_step": pl.Int64,  # the start with the largest gain
        "best_difference": pl.Float64,
        "best_p_holm": pl.Float64,  # its exact McNemar p-value, corrected over the starts
        "opens": pl.Float64,  # first SFT step of the window; null when no start gains
        "opens_low": pl.Float64,
        "opens_high": pl.Float64,
        "opens_before_first": pl.Boolean,  # the first start lies inside, so the window may open earlier
        "closes": pl.Float64,
        "closes_low": pl.Float64,
        "closes_high": pl.Float64,
        "closes_after_last": pl.Boolean,
        "found_share": pl.Float64,  # resamples with a window
        "resamples": pl.Int64,
    },
    # What turned between two models, one row a measured number; curves have an ``index`` (0 is the largest singular
    # value or the smallest angle). Both bands are 95 % prediction intervals; null where a null is not defined.
    "spectra": {
        **_RUN,
        "pair": pl.String,  # "<reference> → <target>"
        "layer": pl.Int64,  # -1 for embedding and head
        "module": pl.String,
        "tensor": pl.String,
        "quantity": pl.String,
        "side": pl.String,  # left | right | ""
        "part": pl.String,  # top | bottom | band | ""
        "k": pl.Int64,
        "index": pl.Int64,
        "value": pl.Float64,  # angles in radians
        "random_low": pl.Float64,  # independent random subspaces
        "random_high": pl.Float64,
        "noise_low": pl.Float64,  # reference plus Gaussian noise of the real change's norm
        "noise_high": pl.Float64,
    },
    "spectra_verdicts": {
        **_RUN,
        "pair": pl.String,
        "layer": pl.Int64,
        "module": pl.String,
        "tensor": pl.String,
        "rows": pl.Int64,
        "columns": pl.Int64,
        "verdict": pl.String,
        "test": pl.String,
        "p_value": pl.Float64,  # null where nothing changed
        "p_holm": pl.Float64,  # over the matrices of the pair
        "relative_change": pl.Float64,  # of the Frobenius norm
        "stretch_share": pl.Float64,
        "turn": pl.String,  # less than noise | as noise | more than noise | "" where there is no band
        "warning": pl.String,
        "driver": pl.String,
        "reconstruction_error": pl.Float64,
        "orthonormality_error": pl.Float64,
    },
    # Change that the model's function can see, beside the change of the weights.
    "gauge": {
        **_RUN,
        "pair": pl.String,
        "layer": pl.Int64,
        "block": pl.String,  # value_output | query_key | mlp
        "head": pl.Int64,
        "quantity": pl.String,
        "value": pl.Float64,
        "noise_low": pl.Float64,
        "noise_high": pl.Float64,
    },
    "function_drift": {
        **_RUN,
        "pair": pl.String,
        "condition": pl.String,
        "layer": pl.Int64,  # 0 is the embedding, then the blocks; -1 for next-token distributions
        "quantity": pl.String,
        "value": pl.Float64,
        "noise_low": pl.Float64,
        "noise_high": pl.Float64,
        "tokens": pl.Int64,
    },
    # Every rung against the base, summary numbers only.
    "spectra_ladder": {
        **_RUN,
        "checkpoint_step": pl.Int64,
        "reference": pl.String,
        "layer": pl.Int64,
        "module": pl.String,
        "quantity": pl.String,
        "side": pl.String,
        "part": pl.String,
        "k": pl.Int64,
        "value": pl.Float64,
        "noise_low": pl.Float64,
        "noise_high": pl.Float64,
    },
    # One weight edit on one split. "before" is the unedited target on the same hands.
    "cells": {
        **_RUN,
        "cell_id": pl.String,
        "split": pl.String,  # select (screened) | confirm
        "group": pl.String,  # the part of the grid it belongs to
        "operator": pl.String,
        "basis": pl.String,  # u | v | uv | sigma | all
        "reference": pl.String,
        "target": pl.String,
        "layers": pl.String,  # e.g. "0-9"; "all"
        "modules": pl.String,
        "rank_from": pl.Float64,  # share of each matrix's rank; above rank_to: from here to the end, and up to rank_to
        "rank_to": pl.Float64,
        "dose": pl.Float64,
        "control_of": pl.String,  # cell_id; "" for an edit of its own
        "draw": pl.Int64,  # of a random control
        "official": pl.Boolean,
        "contrast": pl.Boolean,  # pre-registered
        "matrices": pl.Int64,
        "orthogonality_defect": pl.Float64,  # largest over the matrices, before re-orthonormalisation
        "change_norm": pl.Float64,  # of the edit, relative to the target's weights in scope
        "n": pl.Int64,  # hands a condition
        "id_accuracy": pl.Float64,
        "id_low": pl.Float64,  # 95 % Wilson
        "id_high": pl.Float64,
        "id_before": pl.Float64,
        "id_difference": pl.Float64,
        "id_difference_low": pl.Float64,  # Newcombe's paired interval
        "id_difference_high": pl.Float64,
        "ood_accuracy": pl.Float64,
        "ood_low": pl.Float64,
        "ood_high": pl.Float64,
        "ood_before": pl.Float64,
        "ood_difference": pl.Float64,
        "ood_difference_low": pl.Float64,
        "ood_difference_high": pl.Float64,
        "ood_peak": pl.Float64,  # SFT_MaxOOD on the same hands
        "recovery": pl.Float64,  # ood_difference / (ood_peak - ood_before); null where nothing was lost
        "p_value": pl.Float64,  # exact McNemar against the unedited target, OOD
        "p_holm": pl.Float64,  # over the confirmed cells that are no controls; null elsewhere
        "p_control": pl.Float64,  # exact McNemar against its best control, OOD; null elsewhere
        "best_control": pl.String,
        "format_error_rate": pl.Float64,  # of OOD answers
        "seconds": pl.Float64,
        "bytes": pl.Int64,  # weights that changed
    },
}


ADDED: dict[str, tuple[str, ...]] = {
    "rl_training": ("grad_norm_low", "grad_norm_high", "grad_norm_limit", "flat_groups"),
}
"""Columns that tables of earlier versions lack; they are null in these."""


def check(table: pl.DataFrame, schema: str, where: str | Path = "table") -> pl.DataFrame:
    """Return ``table`` unchanged when its columns, order and types are those of ``schema``.

    Raises:
        UserError: naming ``where`` and the columns that are missing, extra or of another type.
    """
    expected = pl.Schema(SCHEMAS[schema])
    actual = table.schema
    if dict(actual) == dict(expected) and list(actual) == list(expected):
        return table
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected]
    types = [f"{n} is {actual[n]}, not {expected[n]}" for n in expected if n in actual and actual[n] != expected[n]]
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unexpected {', '.join(extra)}"] if extra else []
    parts += types or ([] if parts else ["columns are in another order"])
    raise UserError(f"{where} is not a valid {schema} table: {'; '.join(parts)}.")


def write_table(table: pl.DataFrame, schema: str, path: Path) -> None:
    """Check ``table`` against ``schema`` and write it as parquet."""
    check(table, schema, path).write_parquet(path, compression="zstd", statistics=False)


def read_table(path: Path, schema: str) -> pl.DataFrame:
    """Read a parquet table and check it.

    Raises:
        UserError: the file is missing, unreadable or of another schema.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); delete it and run `dvc repro`.") from error
    lacking = [name for name in ADDED.get(schema, ()) if name not in table.columns]
    if lacking:
        types = SCHEMAS[schema]
        table = table.with_columns(pl.lit(None, types[name]).alias(name) for name in lacking)
        if set(table.columns) == set(types):
            table = table.select(list(types))
    return check(table, schema, path)
