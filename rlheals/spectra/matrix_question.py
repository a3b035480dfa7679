"""One matrix of one pair: everything that is measured on it, with its null bands and its verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from rlheals.spectra.angles import SIDES, resolve_k
from rlheals.spectra.drift import Measure, MeasureSettings, series
from rlheals.spectra.factorise import singular_values
from rlheals.spectra.noise import seed_of
from rlheals.spectra.norms import frobenius
from rlheals.spectra.nulls import random_subspace_bands, same_norm_bands
from rlheals.spectra.random_law import looks_untrained, norm_fits
from rlheals.spectra.results import Finding
from rlheals.spectra.rounding import rounding_of
from rlheals.spectra.verdict import judge, unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from rlheals.models.topology import Matrix
    from rlheals.spectra.drift import Key
    from rlheals.spectra.factors import FactorView
    from rlheals.spectra.nulls import Band
    from rlheals.spectra.reader import Weights
    from rlheals.spectra.results import ResultCache
    from rlheals.spectra.rounding import Rounding
    from rlheals.spectra.settings import DiagnoseSettings
    from rlheals.spectra.store import FactorStore

COLUMNS: dict[str, type[pl.DataType]] = {
    "quantity": pl.String,
    "side": pl.String,
    "part": pl.String,
    "k": pl.Int64,
    "index": pl.Int64,
    "value": pl.Float64,
    "random_low": pl.Float64,
    "random_high": pl.Float64,
    "noise_low": pl.Float64,
    "noise_high": pl.Float64,
}
"""The columns of schema ``spectra`` that a matrix decides; the others say which matrix of which pair it is."""


@dataclass(frozen=True)
class MatrixQuestion:
    """What happened to ``matrix`` between two open models?"""

    matrix: Matrix
    reference: Weights
    target: Weights
    settings: DiagnoseSettings
    store: FactorStore

    @property
    def same(self) -> bool:
        """Whether the two tensors are bit-identical."""
        return len(set(self._digests())) == 1

    def decides(self) -> list[Any]:
        """What the answer depends on, as JSON."""
        return [
            "matrix",
            self._digests(),
            [repr(k) for k in self.settings.ks],
            self.settings.parts,
            self.settings.nulls,
            self.settings.seed,
            self.reference.topology.initializer_range,
            self.matrix.inputs_first,
            self.settings.device,
        ]

    def unchanged(self, results: ResultCache) -> Finding:
        """The answer for bit-identical tensors, known without decomposing anything.

        Only where their norm is the initialiser's are singular values taken, to warn of weights never trained.
        """
        shape = self.reference.shapes[self.matrix.name]
        facts = {
            **asdict(unchanged("bit-identical")),
            "driver": "",
            "reconstruction_error": None,
            "orthonormality_error": None,
            "untrained": self._untrained_both(results),
        }
        return Finding(as_table(zeros(self._measure_settings(), min(shape)), {}, {}), facts)

    def answer(self) -> Finding:
        """Decompose both tensors (or read their factors), measure, draw the nulls and judge."""
        rounding = self._rounding()
        base, tuned = self._factors(self.reference), self._factors(self.target)
        change = self._change()
        settings = self._measure_settings()
        norm = frobenius(change)
        measures = series(base, tuned, change, settings).measures()
        del change
        stable_rank = next(each.value for each in measures if each.quantity == "stable_rank_of_change")
        spectral = norm / math.sqrt(stable_rank) if stable_rank else 0.0
        noise = same_norm_bands(
            base,
            norm,
            settings,
            self.settings.nulls,
            self._seed(),
            spectral=spectral,
            device=self.settings.device,
        )
        random = random_subspace_bands(base.shape, settings, [each.key for each in measures])
        table = as_table(measures, random, noise)
        if self.matrix.inputs_first:
            table = outputs_left(table)
        facts = {
            **asdict(judge(measures, base, rounding)),
            "driver": ", ".join(dict.fromkeys([base.driver, tuned.driver])),
            "reconstruction_error": max(base.reconstruction_error, tuned.reconstruction_error),
            "orthonormality_error": max(base.orthonormality_error, tuned.orthonormality_error),
            "untrained": self._untrained(base, tuned),
        }
        return Finding(table, facts)

    def _digests(self) -> list[str]:
        return [weights.digest(self.matrix.name) for weights in (self.reference, self.target)]

    def _seed(self) -> int:
        """Of the null draws: from the bytes, so that the same question has the same answer wherever it is asked."""
        return seed_of(self.settings.seed, *self._digests())

    def _measure_settings(self) -> MeasureSettings:
        return MeasureSettings(ks=self.settings.ks, parts=self.settings.parts)

    def _factors(self, weights: Weights) -> FactorView:
        return self.store.factors(partial(weights.tensor, self.matrix.name), weights.digest(self.matrix.name))

    def _change(self) -> Tensor:
        """(m, n) tuned − base in float32; two such tensors are held at most."""
        change = self.target.tensor(self.matrix.name).to(torch.float32)
        return change.sub_(self.reference.tensor(self.matrix.name))

    def _rounding(self) -> Rounding:
        """What storing the reference in a coarser type explains of the change."""
        sides = (weights.blocks(self.matrix.name) for weights in (self.reference, self.target))
        return rounding_of(zip(*sides, strict=True))

    def _untrained_both(self, results: ResultCache) -> dict[str, str]:
        """The warning for both sides, which hold the same bytes."""
        name, weights = self.matrix.name, self.reference
        shape, spread = weights.shapes[name], weights.topology.initializer_range
        assert len(shape) == 2
        if not norm_fits(frobenius(weights.tensor(name)), shape, spread):
            return {}

        def answer() -> Finding:
            law = looks_untrained(singular_values(weights.tensor(name), self.settings.device), shape, spread)
            return Finding(pl.DataFrame(), {} if law is None else {"reference": law.text, "target": law.text})

        return results.finding(["random law", weights.digest(name), spread], answer).facts

    def _untrained(self, base: FactorView, tuned: FactorView) -> dict[str, str]:
        """Warnings for the spectra that their initialiser's random law explains."""
        spread = self.reference.topology.initializer_range
        laws = {
            side: looks_untrained(view.values, view.shape, spread)
            for side, view in (("reference", base), ("target", tuned))
        }
        return {side: law.text for side, law in laws.items() if law is not None}


def zeros(settings: MeasureSettings, rank: int) -> list[Measure]:
    """The summary measures of a matrix that did not change: all zero by definition."""
    found = [Measure(name, "", "", None, None, 0.0) for name in ("relative_change", "energy_change")]
    for part in settings.parts:
        for k in sorted({resolve_k(k, rank) for k in settings.ks}):
            for side in SIDES:
                names = ("angle_mean", "angle_max", "angle_min", "angle_rms_sine")
                found += [Measure(name, side, part, k, None, 0.0) for name in names]
    return found


def outputs_left(table: pl.DataFrame) -> pl.DataFrame:
    """The table of a matrix that is stored as (inputs, outputs): left is the side of the outputs in it, too."""
    return table.with_columns(pl.col("side").replace({"left": "right", "right": "left"}))


def as_table(measures: Sequence[Measure], random: Mapping[Key, Band], noise: Mapping[Key, Band]) -> pl.DataFrame:
    """Measures with their bands as a table of `COLUMNS`; a band is null where a null is not defined."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for each in measures:
        for name in ("quantity", "side", "part", "k", "index", "value"):
            columns[name].append(getattr(each, name))
        for name, bands in (("random", random), ("noise", noise)):
            band = bands.get(each.key)
            columns[f"{name}_low"].append(None if band is None else band.low)
            columns[f"{name}_high"].append(None if band is None else band.high)
    return pl.DataFrame(columns, schema=COLUMNS)
