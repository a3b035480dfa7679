"""How far the leading directions turned against noise: the rule, planted changes, and noise itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.linalg import subspace_angles

from rlheals.reporting.schemas import SCHEMAS
from rlheals.spectra.diagnose import Caches, diagnose
from rlheals.spectra.reader import Weights
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore
from rlheals.spectra.turn import AS, LESS, MORE, TURNS, UNDEFINED, leading_angles, with_turn
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BELOW, INSIDE, ABOVE = 0.5, 1.5, 2.5
"""Angles against the band from 1 to 2."""
Side = dict[str, Any]


def tables(left: Side, right: Side, p_value: float | None = 0.5) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One matrix of 8 × 6 with these rows; a larger k and the trailing vectors say the opposite."""
    plain = {
        "pair": "a → b",
        "tensor": "w",
        "quantity": "angle_mean",
        "part": "top",
        "noise_low": 1.0,
        "noise_high": 2.0,
    }
    rows: list[Side] = []
    for side, given in (("left", left), ("right", right)):
        rows += [{**plain, "side": side, "k": 2, **given}]
        rows += [{**plain, "side": side, "k": 4, "value": ABOVE}, {**plain, "side": side, "k": 1, "part": "bottom"}]
    verdict = {"pair": "a → b", "tensor": "w", "rows": 8, "columns": 6, "p_value": p_value, "turn": "stale"}
    return (
        pl.DataFrame([verdict], schema=SCHEMAS["spectra_verdicts"]),
        pl.DataFrame(rows, schema=SCHEMAS["spectra"]),
    )


@pytest.mark.parametrize(
    ("left", "right", "turn"),
    [
        (BELOW, BELOW, LESS),
        (BELOW, INSIDE, AS),
        (INSIDE, INSIDE, AS),
        (INSIDE, ABOVE, MORE),
        (ABOVE, BELOW, MORE),
        (ABOVE, ABOVE, MORE),
        (float("nan"), BELOW, LESS),
        (None, None, UNDEFINED),
        (1.0, 2.0, AS),
    ],
)
def test_the_rule(left: float | None, right: float | None, turn: str) -> None:
    verdicts, spectra = tables({"value": left}, {"value": right})
    found = with_turn(verdicts, spectra)
    assert found["turn"].to_list() == [turn]
    assert found.columns == verdicts.columns


def test_a_side_without_a_band_or_without_room_does_not_count() -> None:
    none: Side = {"value": BELOW, "noise_low": None, "noise_high": None}
    assert with_turn(*tables(none, none))["turn"].to_list() == [UNDEFINED]
    assert with_turn(*tables(none, {"value": ABOVE}))["turn"].to_list() == [MORE]
    verdicts, spectra = tables({"value": ABOVE}, {"value": BELOW})
    # With k = 8 the left vectors fill all of 8 dimensions, where angles are zero by definition; 9 columns leave room.
    filled = spectra.with_columns(pl.lit(8, pl.Int64).alias("k")).filter(pl.col("value") != INSIDE)
    filled = filled.unique(["side"], keep="first", maintain_order=True)
    assert with_turn(verdicts.with_columns(columns=pl.lit(9, pl.Int64)), filled)["turn"].to_list() == [LESS]


def test_a_matrix_that_was_not_tested_has_not_turned() -> None:
    assert with_turn(*tables({"value": ABOVE}, {"value": ABOVE}, p_value=None))["turn"].to_list() == [UNDEFINED]


NORM = 0.05
"""Norm of each planted change over that of the weight."""
Q, OUT, DOWN = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
PLANTED = {Q: LESS, OUT: MORE, DOWN: AS}
SHAPE: dict[str, Any] = {"layers": 1, "hidden": 32, "intermediate": 48, "seed": 3, "shard_bytes": 2**20}


def planted(name: str, tensor: Tensor) -> Tensor:
    """Among the trailing vectors only; of the leading left vectors only; Gaussian."""
    if name not in PLANTED:
        return tensor
    generator = torch.Generator().manual_seed(11)
    left, values, right = torch.linalg.svd(tensor.double(), full_matrices=False)
    half = len(values) // 2
    if name == Q:
        inner = torch.randn(half, half, generator=generator, dtype=torch.float64)
        change = left[:, half:] @ inner @ right[half:]
    elif name == OUT:
        # The leading left vectors (k is 4) move towards the next ones; their right partners move less.
        change = left[:, 4:8] @ right[:4]
    else:
        change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (tensor.double() + NORM * float(tensor.norm()) * change / change.norm()).float()


def mean_angle(base: np.ndarray, other: np.ndarray, k: int, side: str) -> float:
    spans = [np.linalg.svd(w)[0][:, :k] if side == "left" else np.linalg.svd(w)[2][:k].T for w in (base, other)]
    return float(subspace_angles(*spans).mean())


def test_planted_changes_get_their_turn(tmp_path: Path) -> None:
    """Against SciPy's angles, and bands of 200 draws of our own."""
    base, tuned = (
        write_checkpoint(tmp_path / "base", **SHAPE),
        write_checkpoint(tmp_path / "tuned", **SHAPE, change=planted),
    )
    caches = Caches(FactorStore(tmp_path / "factors", 2**30), ResultCache(tmp_path))
    settings = DiagnoseSettings(ks=(0.125, 0.5), nulls=20, gauge=False)
    found = diagnose(base, [tuned], settings, caches, function=False)
    turns = dict(found.verdicts.select("tensor", "turn").iter_rows())
    assert {name: turns.pop(name) for name in PLANTED} == PLANTED
    assert set(turns.values()) == {UNDEFINED}
    verdicts = dict(found.verdicts.select("tensor", "verdict").iter_rows())
    assert verdicts[Q] == "structured rotation", "the verdict alone would suggest that much turned"
    rows = {(row["tensor"], row["side"]): row for row in leading_angles(found.spectra).to_dicts()}
    generator = np.random.default_rng(0)
    with Weights(base) as before, Weights(tuned) as after:
        for name, turn in PLANTED.items():
            weight, other = (each.tensor(name).double().numpy() for each in (before, after))
            norm = np.linalg.norm(other - weight)
            k = rows[name, "left"]["k"]
            assert k == 4
            draws = [noise * norm / np.linalg.norm(noise) for noise in generator.normal(size=(200, *weight.shape))]
            sides = []
            for side in ("left", "right"):
                value = mean_angle(weight, other, k, side)
                assert rows[name, side]["value"] == pytest.approx(value, rel=1e-4, abs=1e-6)
                low, high = np.quantile([mean_angle(weight, weight + draw, k, side) for draw in draws], [0.025, 0.975])
                sides.append(LESS if value < low else MORE if value > high else AS)
            expected = MORE if MORE in sides else LESS if sides == [LESS, LESS] else AS
            assert turn == expected, (name, sides)


def test_noise_turns_as_noise(tmp_path: Path) -> None:
    """28 matrices with Gaussian changes: by chance at most 5 % above and 2.5 % below."""

    def noisy(name: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return tensor + 0.05 * float(tensor.std()) * torch.randn(tensor.shape, generator=generator)

    shape = {**SHAPE, "layers": 4, "hidden": 16, "intermediate": 24}
    base, tuned = (
        write_checkpoint(tmp_path / "base", **shape),
        write_checkpoint(tmp_path / "tuned", **shape, change=noisy),
    )
    caches = Caches(FactorStore(tmp_path / "factors", 2**30), ResultCache(tmp_path))
    settings = DiagnoseSettings(ks=(0.25,), nulls=20, gauge=False)
    turns = diagnose(base, [tuned], settings, caches, function=False).verdicts["turn"]
    counts = {turn: int((turns == turn).sum()) for turn in TURNS}
    assert sum(counts.values()) == 28
    # Binomial tails at those rates: 6 or more above and 5 or more below have a probability below 0.3 % each.
    assert counts[MORE] <= 5, counts
    assert counts[LESS] <= 4, counts
