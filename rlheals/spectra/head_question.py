"""The embedding against the head of one model, before and after: do their leading subspaces drift apart?

The source names this as a hypothesis and does not test it. Tied weights have no such angle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlheals.spectra.drift import MeasureSettings, embedding_head_angles
from rlheals.spectra.matrix_question import as_table
from rlheals.spectra.nulls import embedding_head_bands
from rlheals.spectra.results import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.models.topology import Matrix
    from rlheals.spectra.drift import Key, Measure
    from rlheals.spectra.factors import FactorView
    from rlheals.spectra.nulls import Band
    from rlheals.spectra.reader import Weights
    from rlheals.spectra.settings import DiagnoseSettings
    from rlheals.spectra.store import FactorStore

EMBEDDING, HEAD = "embed_tokens", "lm_head"
HEADS = f"{EMBEDDING}:{HEAD}"
"""Module and tensor of the rows."""


def has_both(matrices: Sequence[Matrix]) -> bool:
    """Whether an embedding and a head of its own are among the analysed matrices."""
    return {"embedding", "head"} <= {matrix.kind for matrix in matrices}


@dataclass(frozen=True)
class HeadQuestion:
    """How do the two lie to each other in both models?"""

    reference: Weights
    target: Weights
    settings: DiagnoseSettings
    store: FactorStore

    def decides(self) -> list[Any]:
        """What the answer depends on, as JSON."""
        digests = [weights.digest(name) for weights in (self.reference, self.target) for name in _names(weights)]
        return ["embedding and head", digests, [repr(k) for k in self.settings.ks], self.store.device]

    def answer(self) -> Finding:
        """Angles of both models, of the top-k right singular vectors."""
        measures: list[Measure] = []
        bands: dict[Key, Band] = {}
        settings = MeasureSettings(ks=self.settings.ks)
        for weights, suffix in ((self.reference, "before"), (self.target, "after")):
            embedding, head = (self._factors(weights, name) for name in _names(weights))
            measures += embedding_head_angles(embedding, head, settings, suffix)
            bands |= embedding_head_bands(embedding.shape[1], min(embedding.rank, head.rank), settings, suffix)
        return Finding(as_table(measures, bands, {}), {})

    def _factors(self, weights: Weights, name: str) -> FactorView:
        return self.store.factors(partial(weights.tensor, name), weights.digest(name))


def _names(weights: Weights) -> tuple[str, str]:
    """Tensors of the embedding and of the head."""
    kinds = {matrix.kind: matrix.name for matrix in weights.topology.matrices}
    return kinds["embedding"], kinds["head"]
