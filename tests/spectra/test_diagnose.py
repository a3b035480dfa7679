from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlheals.errors import UserError
from rlheals.spectra.diagnose import Caches, Diagnosis, compare, diagnose, short_names
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings, Pair, parse_ks
from rlheals.spectra.store import FactorStore
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NOISY, SCALED = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
SHAPE: dict[str, Any] = {"layers": 2, "hidden": 32, "intermediate": 48, "seed": 1, "shard_bytes": 40_000}
SETTINGS = DiagnoseSettings(ks=(0.25, 4), nulls=3, gauge=False)


def tuned_tensor(name: str, tensor: Tensor) -> Tensor:
    """One matrix gets isotropic noise, one is scaled; the rest stays as it is."""
    if name == NOISY:
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
    return tensor * 1.05 if name == SCALED else tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return write_checkpoint(root / "base", **SHAPE), write_checkpoint(root / "tuned", **SHAPE, change=tuned_tensor)


def caches(directory: Path) -> Caches:
    return Caches(FactorStore(directory / "factors", 2**30), ResultCache(directory))


def verdicts(found: Diagnosis) -> dict[str, str]:
    return dict(found.verdicts.select("tensor", "verdict").iter_rows())


def test_each_change_gets_its_verdict_and_only_changed_tensors_are_factorised(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = caches(tmp_path)
    found = diagnose(folders[0], [folders[1]], SETTINGS, first, function=False)
    told = verdicts(found)
    assert told.pop(NOISY) == "indistinguishable from same-norm noise"
    assert told.pop(SCALED) == "magnitude change"
    assert set(told.values()) == {"unchanged"}
    assert len(told) == 12
    assert first.factors.factorised == 4, "two tensors before and after; identical ones are not touched"
    assert found.changed
    again = caches(tmp_path)
    second = diagnose(folders[0], [folders[1]], SETTINGS, again, function=False)
    assert (again.factors.factorised, again.results.computed) == (0, 0)
    assert again.results.hits == first.results.computed
    for name, table in found.tables().items():
        assert table.equals(second.tables()[name], null_equal=True), name


def test_a_ladder_factorises_the_base_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_checkpoint(
        tmp_path / "third", **SHAPE, change=lambda name, tensor: tensor * 1.1 if name == SCALED else tensor
    )
    used = caches(tmp_path / "cache")
    found = diagnose(folders[0], [folders[1], third], SETTINGS, used, function=False)
    assert used.factors.factorised == 5
    assert found.verdicts["pair"].unique(maintain_order=True).to_list() == ["base → tuned", "base → third"]


def test_holm_corrects_over_the_matrices_of_a_pair(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = diagnose(folders[0], [folders[1]], SETTINGS, caches(tmp_path), function=False).verdicts
    tested = rows.filter(pl.col("p_value").is_not_null())
    smallest = tested.sort("p_value").row(0, named=True)
    assert smallest["p_holm"] == pytest.approx(min(1.0, 2 * smallest["p_value"]))


def test_equal_models_are_unchanged_without_any_decomposition(folders: tuple[Path, Path], tmp_path: Path) -> None:
    used = caches(tmp_path)
    found = diagnose(folders[0], [folders[0]], SETTINGS, used, function=False)
    assert set(verdicts(found).values()) == {"unchanged"}
    assert not found.changed
    assert used.factors.factorised == 0
    assert set(found.spectra["value"]) == {0.0}


def test_weights_that_were_never_trained_are_told_even_where_nothing_changed(tmp_path: Path) -> None:
    def fresh(name: str, tensor: Tensor) -> Tensor:
        if name != SCALED:
            return tensor
        return 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))

    base = write_checkpoint(tmp_path / "base", **{**SHAPE, "hidden": 64}, change=fresh)
    used = caches(tmp_path / "cache")
    found = diagnose(base, [base], SETTINGS, used, function=False).verdicts
    told = dict(found.filter(pl.col("warning") != "").select("tensor", "warning").iter_rows())
    assert set(told) == {SCALED}
    assert "matches the random law of its initialiser" in told[SCALED]
    assert used.factors.factorised == 0


def test_k_above_a_rank_is_told_before_anything_is_computed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    used = caches(tmp_path)
    with pytest.raises(UserError, match=r"k_proj.weight: k = 20 asks for 20"):
        diagnose(folders[0], [folders[1]], DiagnoseSettings(ks=(20,)), used, function=False)
    assert used.factors.factorised == 0


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", **SHAPE)
    tuned = write_checkpoint(tmp_path / "tuned", **SHAPE, change=tuned_tensor)
    for file in tuned.glob("*.safetensors"):
        state = load_file(file)
        if NOISY in state:
            state[NOISY][0, 0] = float("nan")
            save_file(state, file)
    with pytest.raises(UserError, match=r"q_proj.weight holds NaN"):
        diagnose(base, [tuned], SETTINGS, caches(tmp_path / "cache"), function=False)


def test_other_shapes_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", **{**SHAPE, "intermediate": 64})
    with pytest.raises(UserError, match="not a fine-tuned version"):
        compare({"a": folders[0], "b": other}, [Pair("a", "b")], SETTINGS, caches(tmp_path))


def test_a_rung_has_fewer_rows(folders: tuple[Path, Path], tmp_path: Path) -> None:
    models = dict(zip("ab", folders, strict=True))
    found = compare(models, [Pair("a", "b", rung=True)], SETTINGS, caches(tmp_path))
    assert set(found.spectra["part"]) == {"", "top"}


def test_names_and_sizes() -> None:
    from pathlib import Path

    assert short_names([Path("x/base"), Path("y/base")]) == ["x/base", "y/base"]
    assert parse_ks("0.5,1,1.0") == (0.5, 1, 1.0)
    with pytest.raises(UserError, match="neither a share"):
        parse_ks("0.5,2.5")
