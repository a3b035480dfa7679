"""References without the directions an edit takes: nothing arbitrary is put back, and what was skipped is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from rlheals import cli
from rlheals.restoration.edit import Edit, Scope
from rlheals.restoration.job import MatrixView, Pair
from rlheals.restoration.operators import apply_edit
from rlheals.restoration.windows import FULL, head, tail
from tests.restoration.folders import same_bits, state
from tests.spectra.planted import noise
from tests.spectra.synthetic import trained_like, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlheals.restoration.edit import Edited as Edited
    from rlheals.restoration.windows import Window

SCOPE = Scope()


def apply(reference: Tensor, target: Tensor, operator: str, basis: str, window: Window = FULL, **options: float):
    edit = Edit(operator, basis, "base", "tuned", SCOPE, window, **options)
    return apply_edit(edit, Pair(MatrixView.of(reference), MatrixView.of(target)), name="w")


TAKES_VECTORS = [
    ("directions", "uv", head(0.3)), ("directions", "u", head(0.3)), ("directions", "v", tail(0.3)),
    ("directions", "all", head(0.3)), ("directions", "uv", FULL), ("directions", "u", FULL),
    ("rotate", "uv", head(0.3)), ("rotate", "u", head(0.3)), ("random_rotation", "uv", head(0.3)),
    ("remove_inside", "uv", head(0.3)), ("remove_outside", "uv", head(0.3)),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "basis", "window"), TAKES_VECTORS)
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_a_zero_reference_gives_nothing_back(operator: str, basis: str, window: Window, shape: tuple[int, int]) -> None:
    target = noise(*shape, 0).float()
    done = apply(torch.zeros(shape), target, operator, basis, window)
    assert same_bits(done.tensor, target)
    assert done.change_norm == 0
    assert done.note == "the reference is zero and has no singular directions, so the tensor was left as it is"


@pytest.mark.parametrize(("operator", "basis"), [("swap", "all"), ("reset", "all"), ("interpolate", "all")])
def test_whole_matrices_go_back_to_zero_all_the_same(operator: str, basis: str) -> None:
    target = noise(24, 40, 0).float()
    dose = {"dose": 0.5} if operator == "interpolate" else {}
    done = apply(torch.zeros(24, 40), target, operator, basis, **dose)
    assert torch.equal(done.tensor, 0.5 * target if dose else torch.zeros(24, 40))
    assert done.note == ""
    values = apply(torch.zeros(24, 40), target, "values", "sigma")
    assert float(values.tensor.norm()) < 1e-5 * float(target.norm())


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize("basis", ["uv", "all"])
def test_only_the_directions_that_a_low_rank_reference_has_are_used(kept: int, basis: str) -> None:
    """A window beyond the reference's rank is the window of its rank, in NumPy's decomposition."""
    reference = (noise(24, kept, 1) @ noise(kept, 40, 2)).float()
    target = noise(24, 40, 0).float()
    wide = apply(reference, target, "directions", basis, head(12))
    narrow = apply(reference, target, "directions", basis, head(kept))
    assert torch.allclose(wide.tensor, narrow.tensor, atol=1e-6)
    assert f"only {kept} of 24 singular directions" in wide.note
    assert narrow.note == ""
    left = np.linalg.svd(reference.double().numpy())[0][:, :kept]
    leading = np.linalg.svd(wide.tensor.double().numpy())[0]
    if basis == "uv":  # the target's leading values under the reference's vectors
        assert np.linalg.svd(left.T @ leading[:, :kept])[1] == pytest.approx(np.ones(kept), abs=1e-4)
    assert np.isfinite(wide.tensor.numpy()).all()


def test_a_window_that_cuts_equal_values_says_so() -> None:
    target = noise(16, 16, 0).float()
    done = apply(torch.eye(16), target, "directions", "uv", head(4))
    assert done.note == "the window ends at rank 4 among equal singular values, so its directions are chance"
    assert apply(noise(16, 16, 1).float(), target, "directions", "uv", head(4)).note == ""


def test_an_interpolation_across_types_is_rounded_once() -> None:
    reference, target = noise(64, 96, 0).float(), noise(64, 96, 1).to(torch.bfloat16)
    done = apply(reference, target, "interpolate", "all", dose=0.5)
    once = ((reference.double() + target.double()) / 2).to(torch.bfloat16)
    twice = ((reference.to(torch.bfloat16).double() + target.double()) / 2).to(torch.bfloat16)
    assert torch.equal(done.tensor, once)
    assert not torch.equal(once, twice)  # else this would show nothing
    removed = apply(reference, target, "remove_outside", "uv", head(0.2), dose=0.5)
    assert removed.tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("basis", ["u", "v"])
@pytest.mark.parametrize("operator", ["directions", "rotate"])
def test_one_sided_edits_mean_the_outputs_by_u_however_a_matrix_is_stored(operator: str, basis: str) -> None:
    reference, target = noise(24, 40, 0).float(), noise(24, 40, 1).float()
    edit = Edit(operator, basis, "base", "tuned", SCOPE, head(0.3))
    plain = apply_edit(edit, Pair(MatrixView.of(reference), MatrixView.of(target)), name="w")
    turned = Pair(*(MatrixView.of(each.mT.contiguous()) for each in (reference, target)))
    stored = apply_edit(edit, turned, name="w", inputs_first=True)
    assert torch.allclose(stored.tensor.mT, plain.tensor, atol=1e-5)


def test_a_block_that_began_at_zero_is_left_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-Pro's new blocks begin with o_proj and down_proj all zero."""

    def expanded(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if "layers.1" in name and ("o_proj" in name or "down_proj" in name) else tensor

    def trained(name: str, tensor: Tensor) -> Tensor:
        drift = trained_like(name, tuple(tensor.shape), seed=9)
        return expanded(name, tensor) + 0.1 * drift

    sizes = {"layers": 2, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 1 << 30}
    base, tuned = (
        write_checkpoint(tmp_path / name, change=change, **sizes)
        for name, change in (("base", expanded), ("tuned", trained))
    )
    out = tmp_path / "out"
    command = ["restore", base, tuned, "--operator", "directions", "--window", "head:0.2", "--out", out]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, command), "--cache", str(tmp_path / "c")])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    zero = [f"model.layers.1.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")]
    line = next(line for line in said.splitlines() if "the reference is zero and has no singular directions" in line)
    assert all(name in line for name in zero)
    before, after = state(tuned), state(out)
    assert all(same_bits(before[name], after[name]) for name in zero)
    assert "the reference is zero and has no singular directions" in (out / "README.md").read_text()
