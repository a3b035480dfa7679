"""What turned in the weights, and whether the function noticed."""

from __future__ import annotations

from math import degrees
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting.drift import RL, SFT, Drift, against_noise, angles, load_drift, pair_label
from rlheals.reporting.figures.drift_map import LADDER, MARKS, drift_ladder, drift_map, ladder_rows
from rlheals.reporting.figures.gauge import function_drift, gauge_drift
from rlheals.reporting.figures.spectra import angle_curves, has_angle_curves, singular_values
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.verdict_words import TURNS, WORDS, warning_lines
from rlheals.reporting.words import percent

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study

TURNED = ("structured rotation", "magnitude change")
BAND = "the middle 95 % of what Gaussian noise with the norm of the real change gives"


def build(study: Study) -> Content | None:
    """Spectra, angles, map, ladder, gauge and function drift; None when the stage has not run for this profile."""
    drift = load_drift(study)
    if drift is None:
        return None
    drawn = figures(drift)
    return Content(
        figures=drawn,
        context=context(drift) | {"names": list(drawn)},
        findings=[_finding(drift, model) for model in study.params.models],
        tables={
            "spectra_verdicts.csv": verdict_table(drift),
            "spectra_summary.csv": summary(drift),
            "function_drift.csv": _rounded(drift.function),
        },
        metrics=_metrics(drift),
    )


def figures(drift: Drift) -> dict[str, Figure]:
    """All figures that these tables have rows for."""
    found = {}
    found["drift_map"] = Figure(
        drift_map(drift),
        "Left: size of the change of every matrix with its verdict. Right: mean angle of its top subspaces over the "
        "middle of the noise band, ▲ above and ▼ below the band on both sides of the matrix.",
    )
    if _has(drift.spectra, "sigma_change", drift):
        found["singular_values"] = Figure(
            singular_values(drift),
            "Singular values before and after, and their change. Values that nearly coincide are what any small change "
            f"of the weights gives; the change says more beside its band: {BAND}.",
        )
    if has_angle_curves(drift):
        found["angle_curves"] = Figure(
            angle_curves(drift),
            "Principal angles between the spaces of the top singular vectors before and after. Sand: where two "
            f"unrelated spaces of this size would lie. Coloured bands: {BAND}. A curve inside its coloured band turned "
            "as noise turns; a curve in the sand has nothing left of the old space. Spaces that fill their whole "
            "space have angles of zero by definition and are not drawn.",
        )
    for quantity in LADDER:
        if len(ladder_rows(drift, quantity)):
            found[f"drift_ladder_{quantity}"] = Figure(drift_ladder(drift, quantity), _ladder_caption(quantity, drift))
    if len(drift.gauge.filter(pl.col("pair").is_in(drift.shown))):
        found["gauge_drift"] = Figure(
            gauge_drift(drift),
            "Some of what turns does nothing: a rotation inside a head or a permutation of neurons can be undone "
            "without changing any output. Circles: change of the weights as stored. Squares: what is left after the "
            "best such undoing. Diamonds: change of the products that the function depends on. Grey, where there is a "
            f"band: {BAND}, treated the same way; alignment removes a part of noise as well.",
        )
    if len(drift.function.filter(pl.col("pair").is_in(drift.shown))):
        found["function_drift"] = Figure(
            function_drift(drift),
            "What the change of the weights did to next-token distributions and to hidden states on the probe prompts. "
            f"Bands and bars: {BAND}, added to the weights of the reference.",
        )
    return found


def context(drift: Drift) -> dict[str, Any]:
    """What the template shows besides figures."""
    counts = drift.verdicts.group_by("model", "seed", "pair", "verdict").len()
    runs = []
    for model, seed in drift.verdicts.select("model", "seed").unique(maintain_order=True).iter_rows():
        own = counts.filter((pl.col("model") == model) & (pl.col("seed") == seed))
        runs.append({"model": model, "seed": seed, "rows": [_pair_row(own, drift, pair) for pair in drift.pairs]})
    return {
        "runs": runs,
        "marks": [WORDS[verdict] for verdict in MARKS],
        "warnings": warning_lines(drift.verdicts),
        "errors": drift.verdicts.select(pl.col("reconstruction_error").max(), pl.col("orthonormality_error").max()).row(
            0, named=True
        ),
        "embeddings": _embeddings(drift),
    }


def verdict_table(drift: Drift) -> pl.DataFrame:
    """Verdicts as a small table, numbers at six digits."""
    return _rounded(drift.verdicts.drop("driver", "reconstruction_error", "orthonormality_error"))


def summary(drift: Drift) -> pl.DataFrame:
    """Numbers of whole matrices, without curves, that figures and claims use; numbers at six digits."""
    wanted = (
        "sigma_change_norm",
        "energy_change",
        "rotation_share",
        "intruders",
        "stable_rank_of_change",
        "weyl_ratio",
    )
    keep = ["model", "seed", "pair", "layer", "module", "quantity", "side", "k"]
    numbers = ["value", "random_low", "random_high", "noise_low", "noise_high"]
    whole = drift.spectra.filter(pl.col("quantity").is_in(list(wanted)) & pl.col("index").is_null())
    turned = angles(drift, "angle_mean")
    return _rounded(pl.concat([table.select(*keep, *numbers) for table in (whole, turned)]))


def _has(spectra: pl.DataFrame, quantity: str, drift: Drift) -> bool:
    return bool(((spectra["quantity"] == quantity) & spectra["pair"].is_in(drift.shown)).any())


def _ladder_caption(quantity: str, drift: Drift) -> str:
    if quantity == "angle":
        what = "How far the top subspaces have turned away from the base, mean of both sides"
    else:
        what = "How much of the weight change shows in the singular values (0: a pure turn)"
    diagnosed = set(drift.ladder["model"]) == {""}
    place = (
        " Checkpoints stand at the number their name ends with, or at their place in the list where not all names have "
        "one and these rise."
    )
    ends = "from the lowest to the highest end over the layers"
    return f"{what}. Grey: {BAND} at that step, {ends}.{place if diagnosed else ''}"


def _pair_row(counts: pl.DataFrame, drift: Drift, pair: str) -> dict[str, Any]:
    """How many matrices of one pair got each verdict, and how far they moved."""
    own = counts.filter(pl.col("pair") == pair)
    found = dict(own.select("verdict", "len").iter_rows())
    run = own.select("model", "seed").row(0) if len(own) else ("", 0)
    verdicts = drift.verdicts.filter(
        (pl.col("pair") == pair) & (pl.col("model") == run[0]) & (pl.col("seed") == run[1])
    )
    angle = angles(drift, "angle_mean", [pair]).filter((pl.col("model") == run[0]) & (pl.col("seed") == run[1]))
    ratio = against_noise(angle)["ratio"].median()
    return {
        "pair": pair_label(pair),
        "matrices": len(verdicts),
        "counts": [found.get(verdict, 0) for verdict in MARKS],
        "turns": [int((verdicts["turn"] == turn).sum()) for turn in TURNS],
        "change": percent(_number(verdicts["relative_change"].median())),
        "angle": _degrees(angle["value"].median()),
        "ratio": f"{ratio:.2f}×" if isinstance(ratio, float) else "–",
    }


def _embeddings(drift: Drift) -> list[dict[str, Any]]:
    """Angle between the top subspaces of embedding and head, before and after, where they were analysed."""
    start = "embedding_head_angle_mean_"
    rows = drift.spectra.filter(pl.col("quantity").str.starts_with(start) & pl.col("index").is_null())
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows.to_dicts():
        key = tuple(row[name] for name in ("model", "seed", "pair", "k"))
        band = " to ".join(_degrees(row[end]) for end in ("random_low", "random_high"))
        empty = {**row, "pair": pair_label(row["pair"]), "before": "–", "after": "–", "random": band}
        found.setdefault(key, empty)[row["quantity"].removeprefix(start)] = _degrees(row["value"])
    return list(found.values())


def _finding(drift: Drift, model: str) -> str:
    """How many matrices turned in SFT and in RL, and how far against noise, for one model."""
    parts = []
    for pair in [pair for pair in (SFT, RL) if pair in drift.pairs]:
        own = drift.verdicts.filter((pl.col("pair") == pair) & (pl.col("model") == model))
        turned = int(own["verdict"].is_in(list(TURNED)).sum())
        rows = angles(drift, "angle_mean", [pair]).filter(pl.col("model") == model)
        ratio = against_noise(rows)["ratio"].median()
        beside = f", top subspaces {ratio:.2f} times as far as noise turns them" if isinstance(ratio, float) else ""
        parts.append(f"{pair_label(pair)}: {turned} of {len(own)} matrices changed other than by noise{beside}")
    seeds = drift.verdicts.filter(pl.col("model") == model)["seed"].n_unique()
    return f"Weights of model {model}{f' ({seeds} seeds together)' if seeds > 1 else ''}: {'; '.join(parts)}."


def _metrics(drift: Drift) -> RunMetrics:
    found: RunMetrics = {}
    for pair, name in ((SFT, "sft"), (RL, "rl")):
        rows = drift.verdicts.filter(pl.col("pair") == pair)
        for (model, seed), own in rows.group_by("model", "seed", maintain_order=True):
            mine = found.setdefault((str(model), int(seed)), {})
            mine[f"{name}_matrices_turned"] = int(own["verdict"].is_in(list(TURNED)).sum())
            mine[f"{name}_relative_change"] = _number(own["relative_change"].median())
    return found


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _degrees(radians: object) -> str:
    return f"{degrees(radians):.2f}°" if isinstance(radians, float) else "–"


def _rounded(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.selectors.float().round_sig_figs(6))


SECTION = Section("spectra", "What turned in the weights", 38, build)
