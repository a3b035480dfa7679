"""Made-up but valid outputs of the ``restore`` stage, for tests without a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rlheals.publish import publish
from rlheals.reporting.schemas import SCHEMAS, write_table
from rlheals.stats import holm, mcnemar_pairs, paired_difference, wilson

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

UNEDITED = {"base": 0.5, "sft_max_ood": 0.92, "sft_end": 0.1, "rl": 0.4}
STARTS = {5: 0.76, 10: 0.92, 40: 0.62, 160: 0.15}
ID = {"base": 0.1, "sft_max_ood": 0.9, "sft_end": 0.96, "rl": 0.97}
CONTROLS = ("noise", "random_rotation", "interpolate")


@dataclass(frozen=True)
class Picture:
    """OOD accuracy of what the claims look at; 0.1 is SFT_End, 0.92 SFT_MaxOOD, 0.4 RL."""

    top: float = 0.75
    full: float = 0.85
    values: float = 0.1
    early: float = 0.55
    late: float = 0.15
    impose: float = 0.12
    rl: float = 0.4
    # Of controls, by edit; what is not named stays at the unedited target.
    controls: dict[str, dict[str, float]] = field(default_factory=lambda: {"top": {"interpolate": 0.4}})
    draws: int = 1
    slope: float = 0.8  # of the repaired rungs
    confirm_starts: bool = False
    contrasts: bool = True


@dataclass(frozen=True)
class Made:
    """A cell before it is asked."""

    key: str
    ood: float
    group: str = "heads"
    operator: str = "directions"
    basis: str = "uv"
    reference: str = "base"
    target: str = "sft_end"
    layers: str = "all"
    modules: str = "all"
    window: tuple[float, float] = (0.0, 1.0)
    dose: float = 1.0
    contrast: bool = False
    identity: float = 0.93  # ID accuracy
    control_of: str = ""
    draw: int = 0

    @property
    def cell_id(self):
        return f"{self.operator}_{self.basis}_{self.reference}-to-{self.target}_{self.key}"


def grid(picture: Picture) -> list[Made]:
    cells = [
        Made("top", picture.top, window=(0.0, 0.2), contrast=picture.contrasts),
        Made("full", picture.full, contrast=picture.contrasts),
        Made("values", picture.values, "values", "values", "sigma", contrast=picture.contrasts),
        Made("early", picture.early, "blocks", layers="0", contrast=picture.contrasts),
        Made("late", picture.late, "blocks", layers="3", contrast=picture.contrasts),
        Made("swap", 0.5, "swap", "swap", "all", contrast=picture.contrasts, identity=0.1),
        Made("impose", picture.impose, "impose", reference="sft_end", target="rl", contrast=picture.contrasts),
        Made("reverse", 0.35, "impose", reference="rl", target="sft_end"),
        Made("embeddings", 0.12, "embeddings", "swap", "all", layers="", modules="embed_tokens,lm_head"),
        Made("attention", 0.3, "modules", modules="q_proj,k_proj,v_proj,o_proj"),
    ]
    for reference, factor in (("base", 1.0), ("sft_max_ood", 0.8)):
        made = replace(Made("", 0.0), reference=reference)
        cells += [
            replace(made, key=f"head{share}", ood=0.1 + factor * gain, window=(0.0, share), identity=0.5 + share / 2.2)
            for share, gain in ((0.1, 0.05), (0.4, 0.7), (0.6, 0.72))
        ]
        cells.append(replace(made, key="tail", ood=0.1, window=(0.8, 1.0), group="tails"))
        cells += [
            replace(made, key=f"layer{layers}", ood=0.1 + factor * gain, group=group, layers=layers)
            for layers, gain, group in (
                ("1", 0.3, "blocks"),
                ("2", 0.1, "blocks"),
                ("0-1", 0.6, "cumulative"),
                ("0-2", 0.7, "cumulative"),
            )
        ]
        cells += [
            replace(made, key=f"u{w}", ood=0.3, group="sides", basis="u", window=(0.0, w), identity=0.7)
            for w in (0.2, 1.0)
        ]
        cells += [
            replace(
                made,
                key=f"i{dose}",
                ood=0.1 + dose / 2,
                operator="interpolate",
                basis="all",
                dose=dose,
                identity=1 - dose / 6,
            )
            for dose in (0.25, 0.5)
        ]
    cells.append(replace(made, key="outside", ood=0.2, group="drift", operator="remove_outside", window=(0.0, 0.2)))
    mean = float(np.mean(list(STARTS.values())))
    cells += [
        Made(
            f"start{step}",
            float(np.clip(0.6 + picture.slope * (before - mean), 0.02, 0.98)),
            "starts",
            target=f"sft_{step}",
            window=(0.0, 0.2),
        )
        for step, before in STARTS.items()
    ]
    return cells


def make_restoration(root: Path, params: Params, picture: Picture | None = None, hands: int = 300) -> None:
    """Write the output of ``restore`` for every declared run."""
    for model in params.models:
        for seed in params.seeds:
            columns = {"profile": params.profile, "model": model, "seed": seed}
            cells, answers = make_tables(columns, picture or Picture(), hands)
            with publish(root / "data" / params.profile / "restore" / model / str(seed)) as out:
                write_table(cells, "cells", out / "cells.parquet")
                write_table(answers, "answers", out / "answers.parquet")


def make_tables(columns, picture=None, hands=300):
    """Tables ``cells`` and ``answers`` of one run."""
    picture = picture or Picture()
    rng = np.random.default_rng([columns["seed"], 5])
    cells = grid(picture)
    select = _Hands(rng, hands // 2, "select", picture)
    confirm = _Hands(rng, hands, "confirm", picture)
    chosen = [c for c in cells if c.contrast or c.key in ("head0.4", "layer0-1")]
    chosen += [c for c in cells if c.group == "starts" and picture.confirm_starts]
    controls = [control for cell in chosen for control in controls_of(cell, picture)]
    trip = replace(Made("trip", 0.1), operator="round_trip", basis="all", group="control", reference="sft_end")
    rows = [_row(columns, cell, select) for cell in cells]
    rows += [_row(columns, cell, confirm) for cell in [*chosen, *controls, trip]]
    own = [row for row in rows if row["split"] == "confirm" and row["group"] != "control"]
    for row, p_value in zip(own, holm([row["p_value"] for row in own]), strict=True):
        beside = [c.cell_id for c in controls if c.control_of == row["cell_id"]]
        row["p_holm"] = p_value
        if beside:
            best = max(beside, key=lambda name: confirm.solved[name, "ood"].mean())
            row |= {
                "best_control": best,
                "p_control": mcnemar_pairs(confirm.solved[row["cell_id"], "ood"], confirm.solved[best, "ood"]),
            }
    return pl.DataFrame(rows, schema=SCHEMAS["cells"], orient="row"), confirm.answers(columns)


def controls_of(cell, picture):
    level = picture.rl if cell.target == "rl" else UNEDITED.get(cell.target, 0.5)
    known = picture.controls.get(cell.key, {})
    return [
        replace(
            cell,
            key=f"{cell.key}-control{draw}",
            operator=operator,
            basis="uv" if operator == "random_rotation" else "all",
            ood=known.get(operator, level),
            group="control",
            contrast=False,
            control_of=cell.cell_id,
            draw=draw,
        )
        for operator in CONTROLS
        for draw in range(1 if operator == "interpolate" else picture.draws)
    ]


class _Hands:
    """Hands of one split, whose difficulty all cells share."""

    def __init__(self, rng, count, split, picture):
        self.rng, self.count, self.split = rng, count, split
        self.luck = {condition: rng.random(count) for condition in ("id", "ood")}
        self.solved = {}
        starts = {f"sft_{step}": rate for step, rate in STARTS.items()}
        for name, rate in (UNEDITED | {"rl": picture.rl} | starts).items():
            self.play(f"unedited-{name}", rate, ID.get(name, 0.9))

    def play(self, cell_id, ood, identity):
        for condition, rate in (("ood", ood), ("id", identity)):
            luck = 0.8 * self.luck[condition] + 0.2 * self.rng.random(self.count)
            self.solved[cell_id, condition] = luck <= np.quantile(luck, rate) if rate else luck < 0

    def answers(self, columns):
        same = {**columns, "stage": "edit", "checkpoint_step": 320, "split": self.split, "attempt": 1}
        same |= {"response": "words", "verdict": "", "reward": 0.0, "solved_under_training_rule": False}
        same |= {"format_error": False, "fields_ok": True, "tokens": 30, "engine": "transformers", "sampling": "greedy"}
        parts = [
            pl.DataFrame({"solved": solved}).with_columns(
                solved_first_try="solved",
                cell_id=pl.lit(cell_id),
                condition=pl.lit(condition),
                hand_id=pl.format("{} {}", pl.lit(condition), pl.int_range(pl.len())),
            )
            for (cell_id, condition), solved in self.solved.items()
        ]
        table = pl.concat(parts).with_columns(**{name: pl.lit(value) for name, value in same.items()})
        return table.select(pl.col(name).cast(dtype) for name, dtype in SCHEMAS["answers"].items())


def _row(columns, cell, hands):
    hands.play(cell.cell_id, cell.ood, cell.identity)
    row = {**columns, "cell_id": cell.cell_id, "split": hands.split, "n": hands.count, "matrices": 28}
    row |= {name: getattr(cell, name) for name in ("group", "operator", "basis", "reference", "target", "layers")}
    row |= {name: getattr(cell, name) for name in ("modules", "dose", "control_of", "draw", "contrast")}
    row |= {"rank_from": cell.window[0], "rank_to": cell.window[1], "official": False, "orthogonality_defect": 0.03}
    row |= {"change_norm": 0.2, "best_control": "", "format_error_rate": 0.01, "seconds": 1.5, "bytes": 10**6}
    for condition in ("id", "ood"):
        solved = hands.solved[cell.cell_id, condition]
        before = hands.solved[f"unedited-{cell.target}", condition]
        result = paired_difference(solved, before)
        low, high = wilson(int(solved.sum()), hands.count)
        row |= {f"{condition}_accuracy": float(solved.mean()), f"{condition}_low": low, f"{condition}_high": high}
        row |= {f"{condition}_before": float(before.mean()), f"{condition}_difference": result.estimate}
        row |= {f"{condition}_difference_low": result.low, f"{condition}_difference_high": result.high}
        row["p_value"] = result.p_value
    peak = float(hands.solved["unedited-sft_max_ood", "ood"].mean())
    lost = peak - row["ood_before"]
    return row | {"ood_peak": peak, "recovery": row["ood_difference"] / lost if lost > 0 else None}
