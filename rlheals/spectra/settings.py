"""What a diagnosis compares, and how; free of torch, so that the command line can say no at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rlheals.errors import UserError

Part = Literal["top", "bottom", "band"]
RUNG_NULLS = 5
"""Most draws behind a band of a rung; with few draws the band is wider by what they leave unknown."""
GAUGE_NULLS = 8
"""Most draws behind a band of a layer's gauge, each of which aligns every head of it."""
FUNCTION_NULLS = 5
"""Most noise models behind a band of function drift, each of which is run on all texts."""


@dataclass(frozen=True)
class DiagnoseSettings:
    """Which matrices, and what is measured on each pair of them.

    Attributes:
        modules: such as ``q_proj``; None for every matrix of a block.
        layers: numbers of blocks; None for all.
        embeddings: the embedding and the head too; they are the largest matrices of most models.
        ks: sizes of the compared subspaces, each a count (int) or a share of the rank (float).
        parts: ``top``, ``bottom`` and ``band`` (the middle) of the spectrum.
        nulls: draws behind each null band.
        seed: of the draws.
        gauge: whether function-preserving freedom is taken out (needs whole blocks).
        device: where decompositions are made, ``cpu`` or ``cuda``.
    """

    modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    embeddings: bool = False
    ks: tuple[float | int, ...] = (0.125, 0.25, 0.5)
    parts: tuple[Part, ...] = ("top", "bottom", "band")
    nulls: int = 20
    seed: int = 0
    gauge: bool = True
    device: str = "cpu"

    def of(self, pair: Pair) -> DiagnoseSettings:
        """The settings for one pair: a rung gets its leading subspaces and fewer draws only."""
        if not pair.rung:
            return self
        return replace(self, nulls=min(self.nulls, RUNG_NULLS), parts=("top",), gauge=False)


@dataclass(frozen=True)
class Pair:
    """Two models by name; ``rung`` marks one of many steps of a ladder, of which a summary is enough."""

    reference: str
    target: str
    rung: bool = False

    @property
    def name(self) -> str:
        """The column ``pair``."""
        return f"{self.reference} → {self.target}"


def parse_ks(text: str) -> tuple[float | int, ...]:
    """Sizes such as ``0.125,0.25,64``: a number with a point is a share of the rank, one without is a count.

    Raises:
        UserError: no number, or one outside its range.

    >>> parse_ks("0.25,64")
    (0.25, 64)
    """
    ks: list[float | int] = []
    for part in text.split(","):
        try:
            k: float | int = float(part) if "." in part else int(part)
        except ValueError:
            k = 0
        if k <= 0 or (isinstance(k, float) and k > 1):
            raise UserError(
                f"--k {text}: {part.strip() or 'nothing'} is neither a share of the rank such as 0.25 (at most 1.0) "
                "nor a number of vectors such as 64."
            )
        ks.append(k)
    return tuple({(type(k), k): k for k in ks}.values())  # 1 is one vector, 1.0 is all of them
