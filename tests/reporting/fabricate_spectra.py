"""Made-up but valid outputs of the ``spectra`` stage, for tests without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rlheals.publish import publish
from rlheals.reporting.drift import BEYOND, FILES, RL, SFT, Drift
from rlheals.reporting.schemas import SCHEMAS, write_table

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (192, 64),
    "up_proj": (192, 64),
    "down_proj": (64, 192),
}
PAIRS = ("base → sft_max_ood", SFT, RL, "base → sft_end", "base → rl", BEYOND)
STEPS = (0, 5, 10, 20, 40, 80, 160, 320)
NORM = {PAIRS[0]: 0.08, SFT: 0.2, RL: 0.02, PAIRS[3]: 0.24, PAIRS[4]: 0.245, BEYOND: 0.21}
NONE = {"random_low": None, "random_high": None, "noise_low": None, "noise_high": None}


@dataclass(frozen=True)
class Picture:
    """What the made-up study shows; numbers are multiples of what noise gives unless they say otherwise."""

    sigma: float = 0.5
    angle: float = 2.0
    energy: float = 0.001  # relative
    ends: float = 1.0  # factor of the change of the outer ranks
    rl_angle: float = 1.0  # factor of the SFT angle
    gauge_share: float = 0.1
    shift: float = 3.0
    undone: float = 0.3  # share of the hidden-state shift that RL takes back
    layers: int = 3
    noise: bool = True
    turn: str = "more than noise"
    verdicts: dict[str, str] = field(default_factory=dict)


def make_drift(
    picture: Picture = Picture(),
    runs: tuple[tuple[str, int], ...] = (("tiny", 0),),
    profile: str = "mini",
    pairs: tuple[str, ...] = PAIRS,
) -> Drift:
    """Tables of all ``runs`` in memory."""
    found: dict[str, list[dict]] = {name: [] for name in FILES}
    for model, seed in runs:
        rng = np.random.default_rng([seed, len(model)])
        columns = {"profile": profile, "model": model, "seed": seed}
        for pair in pairs:
            for layer in range(picture.layers):
                for module, shape in SHAPES.items():
                    where = {**columns, "pair": pair, "layer": layer, "module": module}
                    where["tensor"] = f"model.layers.{layer}.{module}.weight"
                    found["spectra"] += _matrix(where, shape, picture, rng)
                    found["spectra_verdicts"].append(_verdict(where, shape, picture))
                found["gauge"] += _gauge({**columns, "pair": pair, "layer": layer}, picture, rng)
            found["function_drift"] += _function({**columns, "pair": pair}, picture, rng)
        found["spectra_ladder"] += _ladder(columns, picture, rng)
    tables = {name: pl.DataFrame(rows, schema=SCHEMAS[name], orient="row") for name, rows in found.items()}
    return Drift(
        *(tables[name] for name in ("spectra", "spectra_verdicts", "gauge", "function_drift", "spectra_ladder"))
    )


def make_spectra(root: Path, params: Params, picture: Picture = Picture()) -> None:
    """Write the output of ``spectra`` for every declared run."""
    for model in params.models:
        for seed in params.seeds:
            drift = make_drift(picture, ((model, seed),), params.profile)
            tables = {
                "spectra": drift.spectra,
                "spectra_verdicts": drift.verdicts,
                "gauge": drift.gauge,
                "function_drift": drift.function,
                "spectra_ladder": drift.ladder,
            }
            with publish(root / "data" / params.profile / "spectra" / model / str(seed)) as out:
                for name, file in FILES.items():
                    write_table(tables[name], name, out / file)


def _noise(picture, middle, half):
    return {"noise_low": middle - half, "noise_high": middle + half} if picture.noise else {}


def _matrix(where, shape, picture, rng):
    rank = min(shape)
    norm = NORM[where["pair"]]
    plain = {**where, "side": "", "part": "", "k": None, "index": None, **NONE}
    before = 2.0 * np.linspace(1.3, 0.3, rank)
    change = 0.03 * norm * picture.sigma * rng.normal(size=rank)
    outer = max(1, round(0.1 * rank))
    change[:outer] *= picture.ends
    change[-outer:] *= picture.ends
    rows = []
    for index in range(rank):
        curve = {"sigma_before": before[index], "sigma_after": before[index] + change[index]}
        rows += [{**plain, "quantity": name, "index": index, "value": value} for name, value in curve.items()]
        rows.append(
            {**plain, "quantity": "sigma_change", "index": index, "value": change[index]}
            | _noise(picture, 0.0, 0.06 * norm)
        )
    scale = 0.1 * (1 + 0.05 * rng.normal())
    rows += [
        {**plain, "quantity": "sigma_change_norm", "value": picture.sigma * scale} | _noise(picture, 0.1, 0.012),
        {**plain, "quantity": "energy_change", "value": picture.energy} | _noise(picture, norm**2 / 2, 0.002),
        {**plain, "quantity": "relative_change", "value": norm},
    ]
    for side, dimension in (("left", shape[0]), ("right", shape[1])):
        for k in (round(0.25 * rank), rank):
            rows += _angles({**where, "side": side, "part": "top", "k": k}, dimension, norm, picture, rng)
    return rows


def _angles(where, dimension, norm, picture, rng):
    k, rl = where["k"], picture.rl_angle if where["pair"] == RL else 1.0
    full = k == dimension
    expected = 0.0 if full else 0.9 * norm
    curve = np.zeros(k) if full else np.linspace(0.1, 1.9, k) * expected * picture.angle * rl
    curve = np.minimum(curve * (1 + 0.03 * rng.normal(size=k)), np.pi / 2)
    forced = max(0, 2 * k - dimension)
    curve[:forced] = 0.0
    rows = []
    for index, value in enumerate(curve):
        middle = np.pi / 2 * (1 - 0.6 * np.exp(-(index + 1) / k))
        rows.append(
            {**where, "quantity": "angle", "index": index, "value": value}
            | {"random_low": 0.95 * middle, "random_high": min(1.03 * middle, np.pi / 2), **_noise_none()}
            | _noise(picture, np.linspace(0.1, 1.9, k)[index] * expected, 0.2 * expected * norm)
        )
    mean = float(curve.mean())
    rows.append(
        {**where, "quantity": "angle_mean", "index": None, "value": mean, "random_low": 1.1, "random_high": 1.3}
        | _noise_none()
        | _noise(picture, expected * (1 - forced / k), 0.1 * expected)
    )
    return rows


def _noise_none():
    return {"noise_low": None, "noise_high": None}


def _verdict(where, shape, picture):
    default = "indistinguishable from same-norm noise" if where["pair"] == RL else "structured rotation"
    return {
        **where,
        "rows": shape[0],
        "columns": shape[1],
        "verdict": picture.verdicts.get(where["module"], default),
        "test": "largest singular value of the change against a Gaussian matrix of its norm: 3.1 times",
        "p_value": 1e-6,
        "p_holm": 2e-5,
        "relative_change": NORM[where["pair"]] * (1 + 0.3 * (where["module"] == "v_proj")),
        "stretch_share": 0.03,
        "turn": picture.turn,
        "warning": "",
        "driver": "gesdd",
        "reconstruction_error": 2e-15,
        "orthonormality_error": 4e-15,
    }


def _gauge(where, picture, rng):
    rows = []
    norm = NORM[where["pair"]]
    for block, heads in (("value_output", (0, 1)), ("query_key", (0, 1)), ("mlp", (None,))):
        for head in heads:
            share = float(np.clip(picture.gauge_share + 0.01 * rng.normal(), 0, 1))
            values = {
                "raw_change": (norm, norm),
                "product_change": (1.3 * norm, 1.4 * norm),
                "aligned_change": (norm * np.sqrt(1 - share), 0.93 * norm),
                "gauge_share": (share, 0.13),
            }
            for quantity, (value, middle) in values.items():
                row = {**where, "block": block, "head": head, "quantity": quantity, "value": value, **_noise_none()}
                rows.append(row | _noise(picture, middle, 0.02 * middle))
    return rows


def _function(where, picture, rng):
    rows = []
    kept = 1 - picture.undone if where["pair"] == BEYOND else 1.0
    norm = NORM[SFT] if where["pair"] == BEYOND else NORM[where["pair"]]
    for condition in ("id", "ood"):
        plain = {**where, "condition": condition, "tokens": 2000, **_noise_none()}
        rows.append(
            {**plain, "layer": -1, "quantity": "kl_base_tuned", "value": 0.4 * norm} | _noise(picture, 0.05, 0.02)
        )
        for layer in range(picture.layers + 1):
            middle = norm * (1 + layer)
            value = picture.shift * middle * kept
            rows.append(
                {**plain, "layer": layer, "quantity": "pca_shift", "value": value}
                | _noise(picture, middle, 0.2 * middle)
            )
            cka = 1 - 0.05 * norm * layer * (1 + 0.02 * rng.normal())
            rows.append({**plain, "layer": layer, "quantity": "cka", "value": cka} | _noise(picture, 0.995, 0.004))
    return rows


def _ladder(columns, picture, rng):
    rows = []
    for step in STEPS:
        grown = 0.24 * np.log1p(step / 5) / np.log1p(64)
        for layer in range(picture.layers):
            for module, shape in SHAPES.items():
                where = {**columns, "checkpoint_step": step, "reference": "base", "layer": layer, "module": module}
                plain = {**where, "side": "", "part": "", "k": None, **_noise_none()}
                sigma = picture.sigma * 0.1 * (1 + 0.1 * rng.normal()) if step else None
                row = {**plain, "quantity": "sigma_change_norm", "value": sigma}
                rows.append(row | (_noise(picture, 0.1, 0.012) if step else {}))
                for side in ("left", "right"):
                    for k in (round(0.25 * min(shape)), min(shape)):
                        value = picture.angle * 0.9 * grown * (1 + 0.1 * layer)
                        row = {**plain, "side": side, "part": "top", "k": k, "quantity": "angle_mean", "value": value}
                        rows.append(row | _noise(picture, 0.9 * grown, 0.1 * grown))
    return rows
