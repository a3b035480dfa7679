"""Every causal language model of transformers that can be built here: saved, read, named, analysed, restored."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model
from rlheals.models.families import OUTSIDE
from rlheals.models.topology import split_name
from rlheals.restoration.edit import FULL, Edit, Scope
from rlheals.restoration.folder_edit import FolderEdit, edit_card
from rlheals.restoration.grid import ModelSet
from rlheals.restoration.windows import head
from rlheals.restoration.write_model import write_model
from rlheals.spectra.diagnose import Caches, Diagnosis, diagnose
from rlheals.spectra.reader import Weights
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore
from tests.models import zoo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ANALYSED = [
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "olmo", "olmo2", "cohere",
    "starcoder2", "stablelm", "granite", "glm", "smollm3", "exaone4", "persimmon", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "gpt_neox", "opt", "falcon", "gpt2", "bloom",
    "gptj", "mpt", "gpt_bigcode", "codegen",
]  # fmt: skip
"""Kinds that are diagnosed and restored in the tests, each family of layouts among them."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a kind, made once."""
    folder = tmp_path_factory.mktemp("zoo")

    def make(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else zoo.write_tiny(kind, folder / kind)

    return make


def test_no_valid_folder_of_the_pinned_release_is_refused(built: Callable[[str], Path]) -> None:
    """Names on disk go through the library's own conversion, so that what it saved a moment before loads."""
    found: dict[str, str] = {}
    for kind, name in zoo.kinds().items():
        if kind in zoo.NOT_BUILT:
            continue
        folder = built(kind)
        if kind in zoo.NOT_LOADED:
            with pytest.raises(UserError):
                load_model(folder)
            continue
        expected, loaded = zoo.tiny_model(kind).state_dict(), load_model(folder).state_dict()
        assert expected.keys() == loaded.keys(), kind
        assert all(torch.equal(expected[key], loaded[key]) for key in expected), kind
        found[kind] = name
    assert len(set(found.values())) >= 120


def test_what_cannot_be_built_is_listed_with_its_reason() -> None:
    known = zoo.kinds()
    assert set(zoo.NOT_BUILT) | set(zoo.NOT_LOADED) <= set(known)
    assert [kind for kind in zoo.NOT_BUILT if zoo.builds(kind)] == []


def test_every_tensor_of_every_kind_is_a_matrix_or_left_out_with_a_reason(built: Callable[[str], Path]) -> None:
    shares = {}
    for kind in zoo.kinds():
        if kind in zoo.NOT_BUILT:
            continue
        with Weights(built(kind)) as weights:
            topology = weights.topology
            named = {split_name(matrix.name)[0] for matrix in topology.matrices}
            assert named | set(topology.left_out) == set(weights.shapes), kind
            assert not named & set(topology.left_out), kind
            assert all(len(weights.shapes[matrix.name]) == 2 for matrix in topology.matrices), kind
            sizes = {name: math.prod(shape) for name, shape in weights.shapes.items()}
            shares[kind] = sum(sizes[name] for name in topology.unknown) / sum(sizes.values())
            assert all(matrix.layer >= 0 for matrix in topology.matrices if matrix.kind not in OUTSIDE), kind
    assert {kind for kind in ANALYSED if shares[kind]} == set()
    assert sum(share == 0 for share in shares.values()) >= 120


def _diagnose(base: Path, tuned: Path, tmp_path: Path) -> Diagnosis:
    caches = Caches(FactorStore(tmp_path / "factors", 10**9, "cpu"), ResultCache(tmp_path / "results"))
    settings = DiagnoseSettings(ks=(0.25,), nulls=0, embeddings=True, gauge=False)
    return diagnose(base, [tuned], settings, caches, function=False)


@pytest.mark.parametrize("kind", ANALYSED)
def test_all_matrices_of_a_kind_are_analysed_and_given_back(
    built: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = built(kind)
    tuned = zoo.tuned(base, tmp_path / "tuned")
    found = _diagnose(base, tuned, tmp_path)
    coverage = next(iter(found.coverage.values()))
    assert found.changed
    assert not coverage.unknown
    assert found.verdicts["verdict"].to_list() == ["structured rotation"] * len(found.verdicts)
    assert found.verdicts["relative_change"].to_numpy() == pytest.approx(0.2, rel=1e-4)
    assert {each.part for each in coverage.differing} <= {
        "norm scale", "bias", "gate or other vector", "a single row or column",
    }  # fmt: skip
    for scope, window, operator in ((Scope(everything=True), FULL, "swap"), (Scope(), head(0.2), "directions")):
        out = _restore(base, tuned, tmp_path, Edit(operator, "all", "base", "tuned", scope, window))
        load_model(out)
        with Weights(base) as ours, Weights(out) as theirs, Weights(tuned) as before:
            for name in ours.shapes:
                if operator == "swap":
                    assert ours.digest(name) == theirs.digest(name), name
            edited = {split_name(m.name)[0] for m in ours.topology.matrices if m.kind not in OUTSIDE}
            changed = {name for name in theirs.shapes if before.digest(name) != theirs.digest(name)}
            assert operator == "swap" or changed == edited


def _restore(base: Path, tuned: Path, tmp_path: Path, edit: Edit) -> Path:
    store = FactorStore(tmp_path / "factors", 10**9, "cpu")
    out = tmp_path / f"restored-{edit.operator}"
    with ModelSet({"base": base, "tuned": tuned}, store) as models:
        planned = FolderEdit(edit, models)

        def changed(name: str) -> torch.Tensor | None:
            done = planned.edited(name)
            return None if done is None else done.tensor

        write_model(planned.target, changed, lambda digest: edit_card(planned, planned.origin(), "x", digest), out)
    return out


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_change_of_the_experts_alone_is_seen(built: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    base = built(kind)
    tuned = zoo.tuned(base, tmp_path / "tuned", only=lambda name: "experts" in name or "linear" in name)
    found = _diagnose(base, tuned, tmp_path)
    verdicts = dict(zip(found.verdicts["tensor"], found.verdicts["verdict"], strict=True))
    moved = {name for name, verdict in verdicts.items() if verdict != "unchanged"}
    assert moved == {name for name in verdicts if "experts" in name or "linear" in name}
    assert len(moved) >= 2 * 4 * 2  # layers, experts, matrices of an expert at least
    assert found.changed


def test_stacked_experts_are_edited_one_by_one(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Against the edit of the same matrix on its own."""
    from rlheals.restoration.job import MatrixView, Pair
    from rlheals.restoration.operators import apply_edit

    base = built("gpt_oss")
    tuned = zoo.tuned(base, tmp_path / "tuned")
    edit = Edit("directions", "uv", "base", "tuned", Scope(modules=("gate_up_proj",)), head(0.3))
    out = _restore(base, tuned, tmp_path, edit)
    with Weights(base) as ours, Weights(tuned) as theirs, Weights(out) as done:
        stacks = [name for name in ours.shapes if len(ours.shapes[name]) == 3 and "gate_up_proj" in name]
        for name in stacks:
            for place in range(4):
                pair = Pair(*(MatrixView.of(each.tensor(name)[place]) for each in (ours, theirs)))
                expected = apply_edit(edit, pair, name=f"{name}[{place}]").tensor
                assert torch.allclose(done.tensor(name)[place], expected, atol=1e-6)
        assert len(stacks) == 2


def test_what_is_not_understood_is_told_and_not_edited_in_part(built: Callable[[str], Path], tmp_path: Path) -> None:
    base = built("recurrent_gemma")
    tuned = zoo.tuned(base, tmp_path / "tuned")
    found = _diagnose(base, tuned, tmp_path)
    coverage = next(iter(found.coverage.values()))
    assert "rlheals does not understand" in coverage.text
    assert 0 < coverage.share < 1
    edit = Edit("interpolate", "all", "base", "tuned", Scope(), dose=0.75)
    store = FactorStore(tmp_path / "factors", 10**9, "cpu")
    with ModelSet({"base": base, "tuned": tuned}, store) as models:
        with pytest.raises(UserError, match=r"a part of the model only; say --partial .* or .* --everything"):
            FolderEdit(edit, models)
        assert FolderEdit(edit, models, partial=True).left.unknown


def test_drift_of_what_is_not_understood_alone_is_no_clean_bill(built: Callable[[str], Path], tmp_path: Path) -> None:
    base = built("recurrent_gemma")
    tuned = zoo.tuned(base, tmp_path / "tuned", only=lambda name: "rg_lru" in name)
    found = _diagnose(base, tuned, tmp_path)
    assert set(found.verdicts["verdict"]) == {"unchanged"}
    assert found.changed


def test_layers_are_counted_where_the_config_does_not(built: Callable[[str], Path], tmp_path: Path) -> None:
    base = zoo.tuned(built("bloom"), tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("n_layer", "num_hidden_layers")})
    )
    with Weights(base) as weights:
        assert weights.topology.layers == 2
