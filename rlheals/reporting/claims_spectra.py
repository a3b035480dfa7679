"""The paper's claims about weights and hidden states, fixed before the confirmatory run, and their rules.

They are a family of their own: Holm's correction runs over their tests only, so that adding them leaves the corrected
p-values of the other families as they were fixed.

Two kinds of rule. A claim *against noise* has a sign test: if the change of every matrix were Gaussian noise of the
real change's norm, independent from matrix to matrix, a measure would lie above the middle of its noise band in about
half of the matrices, so the number above it is about binomial (see `NOT_EXACT`). A claim *about size* is a measurement
of given weights, without sampling and without a p-value: it is decided by a margin, and the interval is the range of
95 % of the matrices.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import nan
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy.stats import binom, binomtest

from rlheals.reporting.claims import Claim, Evidence
from rlheals.reporting.drift import BEYOND, RL, RUN, SFT, against_noise, angles, pair_label
from rlheals.reporting.readings import Rule, questions, read, voided
from rlheals.reporting.registered import registered_table
from rlheals.reporting.words import percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from rlheals.reporting.drift import Drift
    from rlheals.reporting.tables import Choice, Study

ENERGY = 0.01
"""Preserved energy: the paper's largest singular-value change, 0.005, is at most 0.8 % of the values it plots."""
END = 0.1
"""The head and the tail of a spectrum are its first and its last tenth of ranks."""
CONCENTRATED = 0.5
"""Concentrated at the ends means that both together carry more of the squared change than all that lies between."""
SAME = 0.1
"""Two angle profiles are the same when they differ by less than a tenth of the angle, about a line's width in the
paper's figure."""
REMOVABLE = 0.5
"""A rotation is a gauge when alignment removes most of the squared change."""
SOURCE = "Jin et al., RL Fine-Tuning Heals OOD Forgetting in SFT (arXiv 2509.12235)"
DRAFT = "Jin et al., RL Is Neither a Panacea Nor a Mirage (arXiv 2508.16546)"

_SIGN = (
    "against noise: exact sign test over the matrices that changed; the interval of the median ratio is the one that "
    "inverts the test"
)
_RANGE = "about size, no p-value: the interval is where 95 % of the {} lie"
_BELOW = "the median ratio is below 1 and the corrected p-value is below 0.05"
_ABOVE = "the median ratio is above 1 and the corrected p-value is below 0.05"
_SIGMA = "norm of the singular values' change over the middle of its band under noise of the same norm, minus 1; median"
_TURN = (
    "mean principal angle of the top subspaces (the measured k closest to a fifth of the rank, both sides) over the "
    "middle of its band under noise of the same norm, minus 1; median over matrices"
)

CLAIMS = (
    Claim(
        key="sigma_stable_sft",
        statement="SFT after SFT_MaxOOD leaves singular values more stable than noise of the same norm would.",
        estimand=f"{_SIGMA} over matrices, SFT_MaxOOD to SFT_End",
        test=_SIGN,
        holds_when=_BELOW,
        fails_when="the interval of the median ratio begins at or above 1",
        source=f"{DRAFT}, figure of singular values; that the measure is noise is ours",
    ),
    Claim(
        key="sigma_stable_rl",
        statement="RL leaves singular values more stable than noise of the same norm would.",
        estimand=f"{_SIGMA} over matrices, SFT_End to RL",
        test=_SIGN,
        holds_when=_BELOW,
        fails_when="the interval of the median ratio begins at or above 1",
        source=f"{DRAFT}, the same figure",
    ),
    Claim(
        key="directions_turn_sft",
        statement="SFT after SFT_MaxOOD turns the top singular subspaces more than noise of the same norm would.",
        estimand=f"{_TURN}, SFT_MaxOOD to SFT_End",
        test=_SIGN,
        holds_when=_ABOVE,
        fails_when="the interval of the median ratio ends at or below 1",
        source=f"{SOURCE}, rotation of singular vectors; that the measure is noise is ours",
    ),
    Claim(
        key="directions_turn_rl",
        statement="RL turns the top singular subspaces more than noise of the same norm would.",
        estimand=f"{_TURN}, SFT_End to RL",
        test=_SIGN,
        holds_when=_ABOVE,
        fails_when="the interval of the median ratio ends at or below 1",
        source=f"{SOURCE}, rotation of singular vectors",
    ),
    Claim(
        key="energy_preserved",
        statement="SFT after SFT_MaxOOD and RL preserve the energy of every matrix.",
        estimand="size of the relative change of the Frobenius norm, the larger of the two steps; median over matrices",
        test=_RANGE.format("matrices"),
        holds_when="the upper end of the range is below 1 %",
        fails_when="the median is 1 % or more",
        source=f"{DRAFT}, energy of the weights; the margin is ours",
    ),
    Claim(
        key="no_extremes",
        statement="The change of the singular values does not sit at the head and tail of the spectrum.",
        estimand="share of the squared change in the first and last tenth of ranks, both steps; median over matrices",
        test=_RANGE.format("matrices"),
        holds_when="the upper end of the range is below one half",
        fails_when="the median is one half or more",
        source=f"{DRAFT}, section on singular values; its abstract says the opposite",
    ),
    Claim(
        key="same_profile",
        statement="SFT and RL turn the top singular subspaces by the same profile of angles.",
        estimand="mean distance of the two angle curves over the mean angle of SFT; median over matrices and sides",
        test=_RANGE.format("matrices and sides"),
        holds_when="the upper end of the range is below 10 %",
        fails_when="the median is 10 % or more",
        source=f"{DRAFT}, figure of principal angles, where both curves coincide (as unrelated matrices would)",
    ),
    Claim(
        key="hidden_states_shift",
        statement="SFT after SFT_MaxOOD shifts the hidden states more than noise of the same norm would.",
        estimand="shift of the mean hidden state along the principal components of SFT_MaxOOD's, over the middle of "
        "its noise band, minus 1; median over hidden states and conditions",
        test="about size, no p-value: hidden states of one model are not independent; the interval is where 95 % of "
        "them lie",
        holds_when="the shift lies above its noise band in 95 % of the hidden states and conditions",
        fails_when="the median is at or below the middle of the noise band",
        source=f"{SOURCE}, principal components of hidden states; that the measure is noise is ours",
    ),
    Claim(
        key="rl_moves_back",
        statement="RL moves the hidden states back toward SFT_MaxOOD.",
        estimand="1 minus the shift from SFT_MaxOOD to RL over the shift from SFT_MaxOOD to SFT_End; median over "
        "hidden states and conditions",
        test=_RANGE.format("hidden states and conditions"),
        holds_when="the lower end of the range is above zero",
        fails_when="the median is zero or less",
        source=f"{SOURCE}, principal components of hidden states",
    ),
    Claim(
        key="rotation_is_gauge",
        statement="What turned after SFT_MaxOOD is mostly a rotation that leaves the function as it is.",
        estimand="share of the squared change that function-preserving alignment removes, SFT_MaxOOD to SFT_End; "
        "median over layers, blocks and heads",
        test=_RANGE.format("layers, blocks and heads"),
        holds_when="the lower end of the range is one half or more",
        fails_when="the median is below one half",
        source=f"{DRAFT}, theory appendix; the margin is ours",
    ),
)
AGAINST_NOISE = ("sigma_stable_sft", "sigma_stable_rl", "directions_turn_sft", "directions_turn_rl")
"""Claims with a test; the others have no p-value and no part in the correction."""
RULES = {
    "sigma_stable_sft": Rule(-1),
    "sigma_stable_rl": Rule(-1),
    "directions_turn_sft": Rule(),
    "directions_turn_rl": Rule(),
    "energy_preserved": Rule(-1, ENERGY, ENERGY),
    "no_extremes": Rule(-1, CONCENTRATED, CONCENTRATED),
    "same_profile": Rule(-1, SAME, SAME),
    "hidden_states_shift": Rule(),
    "rl_moves_back": Rule(),
    "rotation_is_gauge": Rule(1, REMOVABLE, REMOVABLE),
}
"""Where the mean over seeds of the medians must lie; the registered boundaries, without a margin beyond them."""
ABOUT_RL = ("sigma_stable_rl", "directions_turn_rl", "same_profile", "rl_moves_back")
"""Claims about what RL does: they need an RL run that raised its own reward."""
APPROXIMATE = "approximate, as the middle of the noise band stands for its median"
NOT_EXACT = (
    "The sign tests registered for the claims against noise are not exact: they take the middle of a 20-draw band for "
    "the median of noise, and the tables hold the ends of the bands, not the draws, so that the rank of a value among "
    "its draws cannot be had from them. The reading over seeds has the same middle in its estimates."
)


def readings(table: pl.DataFrame, premise: Callable[[str, int], str]) -> pl.DataFrame:
    """The corrected reading of the table that `evaluate` makes; see `rlheals.reporting.readings`.

    Args:
        table: verdicts of the registered rule.
        premise: for a model and seed, why its RL run cannot stand for RL; empty where it can.
    """
    found = []
    for asked in questions(table, RULES):
        if asked.claim in ABOUT_RL:
            asked = voided(asked, partial(premise, asked.model))
        if asked.claim in AGAINST_NOISE:
            asked = replace(asked, remark=APPROXIMATE)
        found.append(asked)
    return read(found)


def evaluate(study: Study, drift: Drift) -> pl.DataFrame:
    """Evidence and verdict of every claim in every run; Holm's correction runs over the rows that have a test.

    Returns:
        The columns of `rlheals.reporting.claims.evaluate`; p_value and p_holm are NaN where there is no test.
    """
    rules: dict[str, Callable[[Drift], Evidence]] = {
        "sigma_stable_sft": lambda own: _stable(own, SFT),
        "sigma_stable_rl": lambda own: _stable(own, RL),
        "directions_turn_sft": lambda own: _turned(own, SFT),
        "directions_turn_rl": lambda own: _turned(own, RL),
        "energy_preserved": _energy,
        "no_extremes": _ends,
        "same_profile": _profile,
        "hidden_states_shift": _shift,
        "rl_moves_back": _back,
        "rotation_is_gauge": _gauge,
    }
    own = {choice: _of_run(drift, choice) for choice in study.choices}
    found = [(claim.key, choice, rules[claim.key](own[choice])) for claim in CLAIMS for choice in study.choices]
    tested = registered_table([row for row in found if row[0] in AGAINST_NOISE])
    # A margin decides alone: with p = 0 the shared rule asks for nothing but the margin.
    decided = [(key, choice, replace(evidence, p_value=0.0)) for key, choice, evidence in found]
    sized = registered_table([row for row in decided if row[0] not in AGAINST_NOISE])
    return pl.concat([tested, sized.with_columns(p_value=pl.lit(nan), p_holm=pl.lit(nan))])


def sign_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of a median: the order statistics that the two-sided sign test does not reject.

    With fewer than six values no interval of that level exists and the ends are infinite.
    """
    ordered, tail = np.sort(values), (1 - level) / 2
    place = int(binom.ppf(tail, len(ordered), 0.5))
    if binom.cdf(place, len(ordered), 0.5) > tail:
        place -= 1
    if place < 0:
        return -np.inf, np.inf
    return float(ordered[place]), float(ordered[-1 - place])


def _of_run(drift: Drift, choice: Choice) -> Drift:
    """Tables of one run."""
    mine = (pl.col("model") == choice.model) & (pl.col("seed") == choice.seed)
    return replace(
        drift,
        spectra=drift.spectra.filter(mine),
        verdicts=drift.verdicts.filter(mine),
        gauge=drift.gauge.filter(mine),
        function=drift.function.filter(mine),
        ladder=drift.ladder.filter(mine),
    )


def _stable(drift: Drift, pair: str) -> Evidence:
    rows = against_noise(_rows(drift, "sigma_change_norm", [pair]))
    return _against_noise(rows, pair, -1, "singular values' change")


def _turned(drift: Drift, pair: str) -> Evidence:
    rows = against_noise(angles(drift, "angle_mean", [pair]))
    # Both sides of a matrix turn by the same noise: one number a matrix keeps the test's matrices independent.
    keys = [*RUN, "layer", "module"]
    numbers = [pl.col(name).mean() for name in ("ratio", "value", "noise_low", "noise_high")]
    return _against_noise(rows.group_by(keys, maintain_order=True).agg(numbers), pair, 1, "top-subspace angle")


def _against_noise(rows: pl.DataFrame, pair: str, sign: int, what: str) -> Evidence:
    """Sign test of the ratios against 1; ``sign`` is the claimed side."""
    ratios = rows["ratio"].to_numpy()
    if not len(ratios):
        return _nothing(f"no noise bands for {pair_label(pair)}")
    above, below = int((ratios > 1).sum()), int((ratios < 1).sum())
    p_value = binomtest(above, above + below).pvalue if above + below else 1.0
    low, high = sign_interval(ratios)
    median = float(np.median(ratios))
    outside = rows.filter(pl.col("value") > pl.col("noise_high") if sign > 0 else pl.col("value") < pl.col("noise_low"))
    note = (
        f"{pair_label(pair)}: {what} is {median:.2f} times noise's in the middle of {len(ratios)} matrices, "
        f"{'above' if sign > 0 else 'below'} the 95 % band in {len(outside)}"
    )
    refutes = high <= 1 if sign > 0 else low >= 1
    return Evidence(median - 1, low - 1, high - 1, float(p_value), sign * (median - 1) > 0, refutes, note)


def _energy(drift: Drift) -> Evidence:
    rows = _rows(drift, "energy_change", [SFT, RL])
    largest = rows.group_by("layer", "module").agg(pl.col("value").abs().max())
    medians = [(pair_label(p), _middle(rows, p, "value"), _middle_of_band(rows, p)) for p in (SFT, RL)]
    parts = [f"{name} {percent(value, 2)} (noise {percent(noise, 2)})" for name, value, noise in medians]
    return _sized(largest["value"].to_numpy(), f"median change {', '.join(parts)}", below=ENERGY)


def _ends(drift: Drift) -> Evidence:
    rows = _rows(drift, "sigma_change", [SFT, RL])
    rank = pl.col("index").max().over("pair", "layer", "module") + 1
    size = pl.max_horizontal((END * rank).round(), 1)
    outer = (pl.col("index") < size) | (pl.col("index") >= rank - size)
    low, high = pl.col("noise_low"), pl.col("noise_high")
    noise = ((low + high) / 2) ** 2 + ((high - low) / 4) ** 2  # mean and about one standard deviation, squared
    squared = rows.with_columns(outer.alias("outer"), (pl.col("value") ** 2).alias("energy"), noise.alias("noise"))
    shares = squared.group_by("pair", "layer", "module", maintain_order=True).agg(
        (pl.col(name).filter("outer").sum() / pl.col(name).sum()).alias(name) for name in ("energy", "noise")
    )
    shares = shares.filter(pl.col("energy").is_not_nan())
    expected = shares["noise"].median()
    note = f"noise of the same norm has {percent(expected if isinstance(expected, float) else nan)} there"
    return _sized(shares["energy"].to_numpy(), note, below=CONCENTRATED)


def _profile(drift: Drift) -> Evidence:
    keys = ["layer", "module", "side", "k", "index"]
    rows = angles(drift, "angle", [SFT, RL])
    both = [rows.filter(pl.col("pair") == pair).select(*keys, "value", "random_low") for pair in (SFT, RL)]
    joined = both[0].join(both[1], on=keys, suffix="_rl")
    found = joined.group_by("layer", "module", "side", maintain_order=True).agg(
        ((pl.col("value") - pl.col("value_rl")).abs().mean() / pl.col("value").mean()).alias("distance"),
        (pl.col("value").mean() >= pl.col("random_low").mean()).alias("random"),
    )
    found = found.filter(pl.col("distance").is_finite())
    like_random = int(found["random"].fill_null(False).sum())
    sft, rl = (np.degrees(_mean(table)) for table in both)
    note = (
        f"mean angle {sft:.2f}° by SFT, {rl:.2f}° by RL; SFT turned as far as independent random subspaces lie in "
        f"{like_random} of {len(found)}"
    )
    return _sized(found["distance"].to_numpy(), note, below=SAME)


def _shift(drift: Drift) -> Evidence:
    rows = against_noise(_shifts(drift, SFT))
    if rows.is_empty():
        return _nothing("no noise bands of hidden states")
    above = rows["value"].to_numpy() > rows["noise_high"].to_numpy()
    note = f"above the 95 % band in {int(above.sum())} of {len(rows)} hidden states and conditions"
    ratios = rows["ratio"].to_numpy() - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    median = float(np.median(ratios))
    return Evidence(median, float(low), float(high), nan, bool(above.mean() >= 0.95), median <= 0, note)


def _back(drift: Drift) -> Evidence:
    keys = ["condition", "layer"]
    before, after = (_shifts(drift, pair).select(*keys, "value") for pair in (SFT, BEYOND))
    joined = before.join(after, on=keys, suffix="_rl").filter(pl.col("value") > 0)
    undone = (1 - joined["value_rl"] / joined["value"]).to_numpy()
    note = f"closer to SFT_MaxOOD after RL in {int((undone > 0).sum())} of {len(undone)} hidden states and conditions"
    return _sized(undone, note, above=0.0)


def _gauge(drift: Drift) -> Evidence:
    rows = drift.gauge.filter((pl.col("quantity") == "gauge_share") & (pl.col("pair") == SFT))
    blocks = rows.group_by("block", maintain_order=True).agg(pl.col("value").median()).iter_rows()
    names = {"value_output": "value and output", "query_key": "query and key", "mlp": "MLP"}
    parts = ", ".join(f"{names.get(block, block)} {percent(value, 0)}" for block, value in blocks)
    note = f"{parts}; noise of the same norm {percent(_middle_of_band(rows, SFT), 0)}"
    return _sized(rows["value"].to_numpy(), note, at_least=REMOVABLE)


def _sized(
    values: NDArray[np.float64],
    note: str,
    *,
    below: float | None = None,
    above: float | None = None,
    at_least: float | None = None,
) -> Evidence:
    """Median and 95 % range of measured sizes against one margin."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return _nothing("nothing was measured")
    low, high = (float(end) for end in np.quantile(finite, [0.025, 0.975]))
    median = float(np.median(finite))
    if below is not None:
        return Evidence(median, low, high, nan, high < below, median >= below, note)
    if above is not None:
        return Evidence(median, low, high, nan, low > above, median <= above, note)
    assert at_least is not None  # one of the three margins is given
    return Evidence(median, low, high, nan, low >= at_least, median < at_least, note)


def _rows(drift: Drift, quantity: str, pairs: Sequence[str]) -> pl.DataFrame:
    return drift.spectra.filter((pl.col("quantity") == quantity) & pl.col("pair").is_in(list(pairs)))


def _shifts(drift: Drift, pair: str) -> pl.DataFrame:
    """Shifts of the hidden states after each block; state 0 is the embedding, before anything is computed."""
    return drift.function.filter((pl.col("quantity") == "pca_shift") & (pl.col("pair") == pair) & (pl.col("layer") > 0))


def _middle(rows: pl.DataFrame, pair: str, column: str) -> float:
    found = rows.filter(pl.col("pair") == pair)[column].median()
    return found if isinstance(found, float) else nan


def _middle_of_band(rows: pl.DataFrame, pair: str) -> float:
    middle = ((pl.col("noise_low") + pl.col("noise_high")) / 2).alias("middle")
    return _middle(rows.with_columns(middle), pair, "middle")


def _mean(rows: pl.DataFrame) -> float:
    found = rows["value"].mean()
    return found if isinstance(found, float) else nan


def _nothing(note: str) -> Evidence:
    return Evidence(nan, nan, nan, 1.0, False, False, note)
