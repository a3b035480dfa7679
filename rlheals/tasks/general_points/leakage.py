"""Prove that nothing held out reached a training row, and count what a reader of the results should know."""

from __future__ import annotations

from typing import Any

import polars as pl

from rlheals.errors import UserError
from rlheals.tasks.core import CONDITIONS

HELD_OUT_CONDITIONS = ("id_heldout", "ood_heldout")


def leakage_report(
    hands: pl.DataFrame, sft: pl.DataFrame, rl_prompts: pl.DataFrame, probes: pl.DataFrame, loss_sets: pl.DataFrame
) -> dict[str, Any]:
    """Counts, overlaps (all must be 0) and information for ``leakage.json``.

    Raises:
        UserError: an overlap is not 0; names it.
    """
    training = {"sft": sft, "rl_prompts": rl_prompts}
    overlaps = _overlaps(hands, training, probes, loss_sets)
    leaks = [f"{name} ({count})" for name, count in overlaps.items() if count]
    if leaks:
        raise UserError(f"held-out hands leak into training rows: {', '.join(leaks)}; do not use this dataset.")
    return {
        "counts": _counts(training, probes, loss_sets),
        "overlaps": overlaps,
        "information": {"share_of_ood_probe_hands_whose_symbols_occur_in_training": _seen_symbols(training, probes)},
    }


def _overlaps(
    hands: pl.DataFrame, training: dict[str, pl.DataFrame], probes: pl.DataFrame, loss_sets: pl.DataFrame
) -> dict[str, int]:
    held_out = set(hands.filter("held_out")["hand_key"])
    held_out |= set(probes.filter(pl.col("condition").is_in(HELD_OUT_CONDITIONS))["hand_key"])
    unseen = set(probes.filter(pl.col("condition") == "id")["hand_id"])
    unseen |= set(loss_sets.filter(pl.col("series") == "test_id")["hand_id"])
    found: dict[str, int] = {}
    for name, table in training.items():
        found[f"held-out value multisets in {name}"] = len(held_out & set(table["hand_key"]))
        found[f"id probe and test_id loss hands in {name}"] = len(unseen & set(table["hand_id"]))
    for condition in CONDITIONS:
        rows = probes.filter(pl.col("condition") == condition)
        parts = [set(rows.filter(pl.col("split") == split)["hand_id"]) for split in ("select", "confirm")]
        found[f"{condition} hands in both select and confirm"] = len(parts[0] & parts[1])
    for series, condition in (("test_id", "id"), ("ood", "ood")):
        probed = set(probes.filter(pl.col("condition") == condition)["hand_id"])
        found[f"{condition} probe hands in {series} loss rows"] = len(
            probed & set(loss_sets.filter(pl.col("series") == series)["hand_id"])
        )
    return found


def _counts(training: dict[str, pl.DataFrame], probes: pl.DataFrame, loss_sets: pl.DataFrame) -> dict[str, int]:
    counts = {f"{name} rows": table.height for name, table in training.items()}
    counts |= {f"{name} different hands": table["hand_id"].n_unique() for name, table in training.items()}
    for condition, split, rows in probes.group_by("condition", "split").len().sort("condition", "split").iter_rows():
        counts[f"{condition} {split} hands"] = rows
    counts |= {
        f"{series} loss rows": rows for series, rows in loss_sets.group_by("series").len().sort("series").iter_rows()
    }
    return counts


def _seen_symbols(training: dict[str, pl.DataFrame], probes: pl.DataFrame) -> dict[str, float]:
    """Per out-of-distribution condition: share of its ordered hands that occur, under the other rule, in training."""
    seen = {hand for table in training.values() for hand in table["hand_id"]}
    shares = {}
    for condition in ("ood", "ood_heldout"):
        asked = probes.filter(pl.col("condition") == condition)["hand_id"].to_list()
        shares[condition] = round(sum(hand in seen for hand in asked) / len(asked), 6) if asked else 0.0
    return shares
