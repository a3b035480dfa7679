"""Matrices without a direction of their own: verdicts for all, nothing invented, no traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from rlheals.spectra.diagnose import Caches, Diagnosis, diagnose
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore
from tests.spectra.synthetic import trained_like, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Change = Callable[[str, Tensor], Tensor]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(folder: Path, change: Change | None = None) -> Path:
    return write_checkpoint(
        folder, layers=1, hidden=32, intermediate=48, seed=0, shard_bytes=1 << 30, vocabulary=40, change=change
    )


def replaced(module: str, by: Callable[[Tensor], Tensor]) -> Change:
    return lambda name, tensor: by(tensor) if module in name else tensor


def drifted(name: str, tensor: Tensor) -> Tensor:
    noise = trained_like(name, tuple(tensor.shape), seed=5)
    return tensor + 0.1 * noise * (tensor.norm() or 1.0) / noise.norm()


def ask(base: Path, tuned: Path, tmp_path: Path) -> Diagnosis:
    caches = Caches(FactorStore(tmp_path / "f", 10**9, "cpu"), ResultCache(tmp_path / "r"))
    return diagnose(base, [tuned], DiagnoseSettings(ks=(0.25,), nulls=2), caches, function=False)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("where", ["base", "tuned", "both"])
def test_a_zero_matrix_has_a_verdict_and_its_block_no_gauge(tmp_path: Path, module: str, where: str) -> None:
    zero = replaced(module, torch.zeros_like)
    base = write(tmp_path / "base", zero if where != "tuned" else None)
    change = {
        "base": drifted,
        "tuned": lambda name, tensor: zero(name, drifted(name, tensor)),
        "both": lambda name, tensor: zero(name, drifted(name, tensor)),
    }[where]
    tuned = write(
        tmp_path / "tuned", lambda name, tensor: change(name, zero(name, tensor) if where == "base" else tensor)
    )
    found = ask(base, tuned, tmp_path)
    assert len(found.verdicts) == len(MODULES)
    verdicts = dict(zip(found.verdicts["module"], found.verdicts["verdict"], strict=True))
    assert (verdicts[module] == "unchanged") is (where == "both")
    assert found.spectra["value"].is_nan().sum() == 0
    block = {"v_proj": "value_output", "o_proj": "value_output", "q_proj": "query_key", "k_proj": "query_key"}
    named = [note for note in found.notes if f"the gauge of {block.get(module, 'mlp')} is undefined" in note]
    assert len(named) == 1
    assert module in named[0]
    assert ("target" in named[0]) is (where == "tuned")
    assert set(found.gauge["block"]) == {"value_output", "query_key", "mlp"} - {block.get(module, "mlp")}


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: torch.eye(*t.shape),
    "rank one": lambda t: t[:, :1] @ t[:1],
    "half rank": lambda t: t[:, : min(t.shape) // 2] @ t[: min(t.shape) // 2],
    "constant": lambda t: torch.full_like(t, 0.01),
    "one row": lambda t: torch.cat([t[:1], torch.zeros_like(t[1:])]),
    "half the rows": lambda t: torch.cat([t[: len(t) // 2], torch.zeros_like(t[len(t) // 2 :])]),
    "tiny": lambda t: t * 1e-36,
    "huge": lambda t: t * 1e15,
    "scaled": lambda t: 3 * t,
    "negated": lambda t: -t,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("module", ["q_proj", "gate_proj", "up_proj", "down_proj"])
def test_degenerate_matrices_go_through(tmp_path: Path, kind: str, module: str) -> None:
    base = write(tmp_path / "base", replaced(module, DEGENERATE[kind]))
    both = write(
        tmp_path / "both", lambda name, tensor: drifted(name, replaced(module, DEGENERATE[kind])(name, tensor))
    )
    plain = write(tmp_path / "plain")
    for before, after in ((base, both), (plain, base)):
        found = ask(before, after, tmp_path)
        assert len(found.verdicts) == len(MODULES)
        assert set(found.gauge["block"]) == {"value_output", "query_key", "mlp"}
        assert found.gauge["value"].is_finite().all()


def test_neurons_of_tiny_weights_are_matched_like_others() -> None:
    from rlheals.spectra.neurons import match_neurons

    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    base = {name: trained_like(name, shape, seed=0) for name, shape in _MLP.items()}
    tuned = {
        "gate_proj": base["gate_proj"][order],
        "up_proj": 2 * base["up_proj"][order],
        "down_proj": base["down_proj"][:, order] / 2,
    }
    for size in (1.0, 1e-36, 1e15):
        sized = ({name: size * tensor for name, tensor in side.items()} for side in (base, tuned))
        assert torch.equal(order[match_neurons(*sized)], torch.arange(48))


_MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
