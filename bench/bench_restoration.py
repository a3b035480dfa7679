"""Edit work of a restoration cell against the released way: two decompositions of every tensor for every cell.

Run: python -m bench.bench_restoration [--threads 2] [--repeats 3]

The released way decomposes reference and target with `torch.linalg.svd` in float32, puts the bases together and
multiplies out; here the thin form is timed, which is the cheaper one. Ours reads the columns it needs from a factor
store on disk (its files in the page cache, as they are in a grid) and the two tensors from memory; "ours" is everything
`apply_edit` does: reading, edit, defect, norm of the change. All cells of a shape run on the same pair of matrices in
one process, alternating, and the best of ``--repeats`` counts, in processor seconds, which other processes disturb less
than the clock. Factorising for the store is done once for all cells and printed apart. "one product" is U diag(σ) Vᵀ
multiplied out, below which no change of full rank can be; a change of a share of the rank needs that share of it. "over
its products" is a cell's time over that of the products it cannot do without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from rlheals.restoration.edit import FULL, Edit, Scope, head
from rlheals.restoration.live import LiveModel
from rlheals.restoration.operators import MatrixView, Pair, apply_edit
from rlheals.spectra.store import FactorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

LIVE = [(28, 128), (28, 512), (12, 2048)]
SHAPES = [(128, 128), (128, 384), (1024, 1024), (4096, 1024)]
LARGEST = 1 << 40
PLAIN = "without re-orthonormalisation"
ORTHONORMAL = "re-orthonormalised"
GOALS = {PLAIN: 60.0, ORTHONORMAL: 3.0}
PRODUCTS = {
    "values, all": 1.0,
    "values, head 0.2": 0.2,
    "directions, all": 1.0,
    "directions, head 0.2, official": 0.4,
}
"""How many products of full rank a cell without re-orthonormalisation must multiply out; the others none."""
SCOPE = Scope()


def cells() -> dict[str, tuple[str, Edit]]:
    """Cells by label, with the group whose goal they have."""
    make = partial(Edit, reference="base", target="sft_end", scope=SCOPE)
    return {
        "swap": (PLAIN, make("swap", "all")),
        "interpolate": (PLAIN, make("interpolate", "all", dose=0.5)),
        "values, all": (PLAIN, make("values", "sigma", window=FULL)),
        "values, head 0.2": (PLAIN, make("values", "sigma", window=head(0.2))),
        "directions, all": (PLAIN, make("directions", "uv", window=FULL)),
        "directions, head 0.2, official": (PLAIN, make("directions", "uv", window=head(0.2), official=True)),
        "directions, head 0.2": (ORTHONORMAL, make("directions", "uv", window=head(0.2))),
        "directions, head 0.5": (ORTHONORMAL, make("directions", "uv", window=head(0.5))),
        "directions, head 0.8": (ORTHONORMAL, make("directions", "uv", window=head(0.8))),
        "directions, U only, head 0.2": (ORTHONORMAL, make("directions", "u", window=head(0.2))),
        "rotate by half, head 0.2": (ORTHONORMAL, make("rotate", "uv", window=head(0.2), dose=0.5)),
    }


def released(reference: Tensor, target: Tensor, k: int) -> Tensor:
    """One tensor of one cell as the released scripts do it."""
    base_left, _, base_right = torch.linalg.svd(reference, full_matrices=False)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    left = torch.cat([base_left[:, :k], left[:, k:]], dim=1)
    right = torch.cat([base_right[:k], right[k:]])
    return (left * values) @ right


def models(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A reference with a decaying spectrum, and a target a fifth of its norm away."""
    draw = torch.Generator().manual_seed(rows + columns)
    reference = torch.randn(rows, columns, generator=draw) * torch.linspace(1.0, 0.1, columns)
    change = torch.randn(rows, columns, generator=draw)
    return reference, reference + 0.2 * change * (reference.norm() / change.norm())


def best_seconds(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best processor seconds of each action over alternating runs, after one warm run each."""
    best = dict.fromkeys(actions, float("inf"))
    for turn in range(repeats + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            if turn:
                best[name] = min(best[name], time.process_time() - begin)
    return best


def stored_pair(store: FactorStore, reference: Tensor, target: Tensor) -> Pair:
    """Both matrices with their factors on disk."""
    views = []
    for name, tensor in (("reference", reference), ("target", target)):
        factors = store.factors(lambda tensor=tensor: tensor, f"{name}{tuple(tensor.shape)}")
        views.append(MatrixView(lambda tensor=tensor: tensor, lambda factors=factors: factors))
    return Pair(*views)


def measure(rows: int, columns: int, repeats: int, folder: Path) -> tuple[Table, dict[str, list[float]]]:
    """The table of one shape, and the ratios by group."""
    reference, target = models(rows, columns)
    store = FactorStore(folder, LARGEST)
    begin = time.process_time()
    pair = stored_pair(store, reference, target)
    once = time.process_time() - begin
    known = cells()
    k = round(0.2 * min(rows, columns))
    actions: dict[str, Callable[[], object]] = {"released": lambda: released(reference, target, k)}
    left, right = torch.randn(rows, min(rows, columns)), torch.randn(min(rows, columns), columns)
    actions["one product"] = lambda: left @ right
    actions |= {label: partial(apply_edit, edit, pair, name="weight") for label, (_, edit) in known.items()}
    seconds = best_seconds(actions, repeats if rows * columns > 1 << 18 else 10 * repeats)
    table = Table(
        title=f"{rows} × {columns}: released {1e3 * seconds['released']:.1f} ms a cell, ours factorises once, "
        f"{1e3 * once:.0f} ms ({store.factorised} matrices)"
    )
    for column in ("cell", "group", "ms", "over its products", "released / ours", "goal"):
        table.add_column(column, justify="left" if column in ("cell", "group") else "right")
    floor = seconds["one product"]
    table.add_row("one product", "", f"{1e3 * floor:.2f}", "", f"{seconds['released'] / floor:.1f}", "")
    ratios: dict[str, list[float]] = {group: [] for group in GOALS}
    for label, (group, _) in known.items():
        ratio = seconds["released"] / seconds[label]
        ratios[group].append(ratio)
        reached = "reached" if ratio >= GOALS[group] else "missed"
        over = f"{seconds[label] / (PRODUCTS[label] * floor):.1f}" if label in PRODUCTS else ""
        table.add_row(label, group, f"{1e3 * seconds[label]:.2f}", over, f"{ratio:.1f}", f"{GOALS[group]:g} {reached}")
    return table, ratios


class Held:
    """An engine as far as `LiveModel` knows one: a module whose weights can be swapped."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def swap(self, state: Mapping[str, Tensor]) -> None:
        """Take all weights."""
        self.model.load_state_dict(dict(state))


def live_table(repeats: int) -> Table:
    """Apply and revert on a live model, checksums included, against one copy of the touched weights."""
    table = Table(title="apply + revert on a live model")
    for column in ("matrices", "copy ms", "apply + revert ms", "ratio", "goal"):
        table.add_column(column, justify="right")
    for count, size in LIVE:
        model = torch.nn.ModuleList([torch.nn.Linear(size, size, bias=False) for _ in range(count)])
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        edits = {name: tensor + 0.01 for name, tensor in state.items()}
        room = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        live = LiveModel(Held(model), state)

        def copy(edits: dict[str, Tensor] = edits, room: dict[str, Tensor] = room) -> None:
            for name, tensor in edits.items():
                room[name].copy_(tensor)

        def cell(live: LiveModel = live, edits: dict[str, Tensor] = edits) -> None:
            live.apply(edits)
            live.revert()

        few = count * size**2 > 1 << 20
        seconds = best_seconds({"copy": copy, "cell": cell}, repeats * (5 if few else 200))
        ratio = seconds["cell"] / seconds["copy"]
        milliseconds = [f"{1e3 * seconds[name]:.2f}" for name in ("copy", "cell")]
        table.add_row(f"{count} × {size}²", *milliseconds, f"{ratio:.1f}", f"3 {'reached' if ratio <= 3 else 'missed'}")
    return table


def main() -> None:
    """Print one table a shape, and the least and the middle ratio of each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    summary = Table(title=f"released / ours on {arguments.threads} thread(s)")
    for column in ("shape", "group", "least", "median", "goal"):
        summary.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for rows, columns in SHAPES:
            table, ratios = measure(rows, columns, arguments.repeats, Path(folder))
            console.print(table)
            for group, found in ratios.items():
                middle = sorted(found)[len(found) // 2]
                summary.add_row(f"{rows} × {columns}", group, f"{min(found):.1f}", f"{middle:.1f}", f"{GOALS[group]:g}")
    console.print(summary)
    console.print(live_table(arguments.repeats))


if __name__ == "__main__":
    main()
