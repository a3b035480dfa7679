"""One look for all figures: sizes, a colour-blind-safe palette, and the words on the axes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
WIDTH, HEIGHT = 620, 330
INK, MUTED, GRID = "#1f2328", "#57606a", "#e6e8eb"
LABEL_GAP = 17
"""Least distance of two direct labels, in pixels."""


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is drawn.

    Attributes:
        label: its name in the figure.
        color: line colour, from Okabe and Ito's palette.
        ink: a darker shade of it that is readable as text on white.
        dash: stroke dash, so that the series differ without colour as well.
        shape: point shape.
    """

    label: str
    color: str
    ink: str
    dash: tuple[int, int] = (1, 0)
    shape: str = "circle"


CONDITIONS = {
    "id": Look("ID", "#0072b2", "#005a8e"),
    "id_heldout": Look("ID, held-out hands", "#56b4e9", "#2a7fb0", (6, 3), "square"),
    "ood": Look("OOD", "#d55e00", "#ad4c00"),
    "ood_heldout": Look("OOD, held-out hands", "#e69f00", "#946600", (6, 3), "square"),
}
LOSSES = {
    "train_id": Look("train (ID)", "#0072b2", "#005a8e"),
    "test_id": Look("test (ID)", "#009e73", "#00724f", (6, 3), "square"),
    "ood": Look("OOD", "#d55e00", "#ad4c00"),
}
CRITERIA = {
    "select_ood_accuracy": "OOD accuracy on select",
    "ood_loss": "lowest OOD loss",
    "test_id_loss": "lowest test (ID) loss",
    "train_id_loss": "lowest train (ID) loss",
    "last": "last rung",
}
BEFORE = "sft"
ARMS = {
    BEFORE: Look("before RL", "#57606a", "#424a53"),
    "ppo": Look("PPO", "#d55e00", "#ad4c00"),
    "reward_only": Look("reward, no KL", "#0072b2", "#005a8e", (6, 3), "square"),
    "kl_only": Look("KL, no reward", "#009e73", "#00724f", (2, 2), "triangle-up"),
    "reinforce": Look("REINFORCE", "#cc79a7", "#9c4f7b", (8, 2), "diamond"),
    "grpo": Look("GRPO", "#e69f00", "#946600", (4, 2), "cross"),
}
"""The arms of RL, and what they are compared with."""
METRICS = {
    "solved_rate": "solved (share of episodes)",
    "format_error_rate": "unreadable (share of turns)",
    "kl_reference": "KL to the reference (nats)",
    "entropy": "entropy (nats)",
}
"""Training curves of RL that the report draws."""
CHOICES = {"max_ood": "SFT_MaxOOD", "end": "SFT_End"}


def config() -> dict[str, Any]:
    """Vega-Lite config shared by all charts."""
    return {
        "background": "white",
        "font": FONT,
        "padding": {"left": 8, "right": 12, "top": 8, "bottom": 8},
        "view": {"stroke": None},
        "title": {
            "anchor": "start",
            "frame": "group",
            "fontSize": 17,
            "fontWeight": 600,
            "color": INK,
            "subtitleFontSize": 13,
            "subtitleColor": MUTED,
            "subtitlePadding": 5,
            "offset": 16,
        },
        "axis": {
            "labelFontSize": 13,
            "titleFontSize": 14,
            "titleFontWeight": "normal",
            "titleColor": INK,
            "labelColor": INK,
            "titlePadding": 10,
            "gridColor": GRID,
            "domainColor": "#8c959f",
            "tickColor": "#8c959f",
        },
        "legend": {"labelFontSize": 13, "titleFontSize": 13, "titleFontWeight": "normal", "symbolSize": 90},
        "text": {"fontSize": 13, "color": INK},
    }


def spread(positions: list[float], gap: float, floor: float = -inf) -> list[float]:
    """Move numbers apart until neighbours are ``gap`` apart, keeping their order and, above ``floor``, their centre.

    >>> spread([0.0, 1.0, 10.0], 4.0)
    [-1.5, 2.5, 10.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        groups.append((positions[index], [index]))
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            (centre_a, a), (centre_b, b) = groups[-2], groups[-1]
            centre = (centre_a * len(a) + centre_b * len(b)) / (len(a) + len(b))
            groups[-2:] = [(centre, a + b)]
    moved = list(positions)
    for centre, members in groups:
        for rank, index in enumerate(members):
            moved[index] = centre + (rank - (len(members) - 1) / 2) * gap
    lowest = floor
    for index in order:
        moved[index] = lowest = max(moved[index], lowest)
        lowest += gap
    return moved


def _top(group: tuple[float, list[int]], gap: float) -> float:
    return group[0] + (len(group[1]) - 1) / 2 * gap


def _bottom(group: tuple[float, list[int]], gap: float) -> float:
    return group[0] - (len(group[1]) - 1) / 2 * gap
