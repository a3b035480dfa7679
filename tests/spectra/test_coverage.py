"""A verdict covers what was compared: what was not is listed with the size of its change."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlheals import cli
from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model
from rlheals.spectra.coverage import coverage
from rlheals.spectra.diagnose import Caches, Diagnosis, diagnose
from rlheals.spectra.reader import Weights, check_same
from rlheals.spectra.results import ResultCache
from rlheals.spectra.settings import DiagnoseSettings
from rlheals.spectra.store import FactorStore
from tests.restoration.folders import state
from tests.spectra.synthetic import trained_like, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def write(folder: Path, **options: Any) -> Path:
    sizes = {"layers": 2, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 1 << 30}
    return write_checkpoint(folder, **sizes | options)


def moved(*names: str) -> Callable[[str, Tensor], Tensor]:
    """A change of rank 2 and a tenth of the norm of the named tensors."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not any(part in name for part in names):
            return tensor
        noise = trained_like(name, tuple(tensor.shape), seed=7)
        if tensor.ndim == 2:
            left, values, right = torch.linalg.svd(noise, full_matrices=False)
            noise = (left[:, :2] * values[:2]) @ right[:2]
        return tensor + 0.1 * noise * (tensor.norm() / noise.norm())

    return change


def ask(base: Path, tuned: Path, tmp_path: Path, **options: Any) -> Diagnosis:
    caches = Caches(FactorStore(tmp_path / "f", 10**9, "cpu"), ResultCache(tmp_path / "r"))
    settings = DiagnoseSettings(ks=(0.25,), nulls=0, gauge=False, **options)
    return diagnose(base, [tuned], settings, caches, function=False)


def test_norms_and_tables_that_differ_are_told_with_their_size(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("norm", "embed", "q_proj"))
    with Weights(base) as ours, Weights(tuned) as theirs:
        compared = [m.name for m in ours.topology.matrices if m.layer >= 0]
        found = coverage(ours, theirs, compared)
    before, after = state(base), state(tuned)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {each.name for each in found.differing} == changed - set(compared)
    for each in found.differing:
        expected = (
            float((after[each.name].double() - before[each.name].double()).norm()),
            float(before[each.name].norm()),
        )
        assert (each.change, each.norm) == pytest.approx(expected, rel=1e-6)
        assert each.relative == pytest.approx(0.1, rel=1e-5)
    assert found.parts == ["embedding 10 %", "5 × norm scales 10 %"]
    assert found.elements == sum(t.numel() for t in before.values())
    assert found.compared == sum(before[name].numel() for name in compared)
    assert "of the rest, 6 of 7 tensors differ" in found.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_alone_is_no_difference_and_a_change_is_one_in_any_type(tmp_path: Path, dtype: str) -> None:
    base, rounded = write(tmp_path / "base"), write(tmp_path / "rounded", dtype=dtype)
    with Weights(base) as ours, Weights(rounded) as theirs:
        assert not coverage(ours, theirs, []).differing
    # A coarse base has no rounding error with respect to itself: what differs from it was changed.
    with Weights(rounded) as ours, Weights(base) as theirs:
        assert coverage(ours, theirs, []).differing


def test_a_model_whose_norms_alone_moved_is_not_unchanged(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("norm"))
    found = ask(base, tuned, tmp_path)
    assert set(found.verdicts["verdict"]) == {"unchanged"}
    assert found.changed
    assert not ask(base, base, tmp_path).changed


@pytest.mark.parametrize("rows", [65, 67, 128])
@pytest.mark.parametrize("bigger", ["tuned", "base"])
def test_added_and_padded_tokens_leave_the_rest_comparable(tmp_path: Path, rows: int, bigger: str) -> None:
    sizes = {"tuned": {"vocabulary": 64}, "base": {"vocabulary": 64}} | {bigger: {"vocabulary": rows}}
    base = write(tmp_path / "base", **sizes["base"])
    tuned = write(tmp_path / "tuned", change=moved("q_proj"), **sizes["tuned"])
    _same_first_rows(tmp_path, base, tuned)
    found = ask(base, tuned, tmp_path)
    verdicts = dict(zip(found.verdicts["tensor"], found.verdicts["verdict"], strict=True))
    assert {name for name, verdict in verdicts.items() if verdict != "unchanged"} == {
        n for n in verdicts if "q_proj" in n
    }
    rest = next(iter(found.coverage.values()))
    assert not rest.differing
    added = [each for each in rest.rest if each.part == "added rows"]
    assert [each.elements for each in added] == [(rows - 64) * 32] * 2
    tables = ask(base, tuned, tmp_path, embeddings=True).verdicts
    assert {f"{EMBEDDING}[:64]", f"{HEAD}[:64]"} <= set(tables["tensor"])


def _same_first_rows(tmp_path: Path, base: Path, tuned: Path) -> None:
    """Give the tuned model the base's rows, as adding tokens does; `trained_like` draws by shape."""
    ours, file = state(base), next(tuned.glob("*.safetensors"))
    theirs = load_file(file)
    for name in (EMBEDDING, HEAD):
        rows = min(len(ours[name]), len(theirs[name]))
        theirs[name][:rows] = ours[name][:rows]
    save_file(theirs, file, metadata={"format": "pt"})


def test_rows_of_a_table_are_compared_as_numpy_does(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", vocabulary=70)
    found = ask(base, tuned, tmp_path, modules=("embed_tokens",))
    ours, theirs = state(base)[EMBEDDING].double(), state(tuned)[EMBEDDING].double()[:64]
    row = found.verdicts.row(0, named=True)
    assert row["relative_change"] == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-6)
    values = found.spectra.filter(found.spectra["quantity"] == "sigma_after")["value"].to_numpy()
    assert values == pytest.approx(torch.linalg.svdvals(theirs).numpy(), rel=1e-6)


def test_an_untied_head_is_held_against_the_embedding_it_was(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", tied=True), write(tmp_path / "tuned", change=moved("lm_head"))
    found = ask(base, tuned, tmp_path)
    assert set(found.verdicts["verdict"]) == {"unchanged"}
    rest = {each.name: each for each in next(iter(found.coverage.values())).differing}
    assert set(rest) == {HEAD}
    embedding, head = state(base)[EMBEDDING].double(), state(tuned)[HEAD].double()
    assert rest[HEAD].relative == pytest.approx(float((head - embedding).norm() / embedding.norm()), rel=1e-6)
    assert "tied to the embedding in one of the two models only" in rest[HEAD].reason


def test_a_head_that_its_config_calls_tied_but_is_another_is_told(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("lm_head"))
    for folder in (base, tuned):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found = ask(base, tuned, tmp_path)
    assert sum("another head is stored; loaders untie the two" in note for note in found.notes) == 2
    assert {each.name for each in next(iter(found.coverage.values())).differing} == {HEAD}


def test_buffers_of_one_side_do_not_matter(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned")
    file = next(tuned.glob("*.safetensors"))
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "model.mask": torch.ones(2, 2).bool()}
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
    index = json.loads((tuned / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(buffers, file.name)
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    for one, other in ((base, tuned), (tuned, base)):
        found = ask(one, other, tmp_path)
        assert not found.changed
    run("restore", base, tuned, "--operator", "swap", "--out", tmp_path / "out", "--cache", tmp_path / "c")
    assert set(state(tmp_path / "out")) == set(state(tuned))
    load_model(tmp_path / "out")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("operator", ["interpolate", "directions"])
def test_common_rows_are_edited_and_added_ones_stay(tmp_path: Path, operator: str) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", vocabulary=70, change=moved("q_proj"))
    options = ["--operator", operator, "--embeddings", "--head", "--cache", tmp_path / "c"]
    options += ["--dose", "0.5"] if operator == "interpolate" else ["--window", "head:0.3"]
    assert run("restore", base, tuned, *options, "--out", tmp_path / "out") == 0
    before, after, out = state(base), state(tuned), state(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out[name][64:], after[name][64:])
        if operator == "interpolate":
            assert torch.allclose(out[name][:64], (before[name] + after[name][:64]) / 2, atol=1e-6)
        else:
            assert not torch.equal(out[name][:64], after[name][:64])
    load_model(tmp_path / "out")


def test_everything_reaches_the_base(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("norm", "embed", "q_proj", "head"))
    cache = ["--cache", tmp_path / "c"]
    whole = ["--operator", "interpolate", "--dose", "1", "--everything"]
    assert run("restore", base, tuned, *whole, "--out", tmp_path / "out", *cache) == 0
    ours, out = state(base), state(tmp_path / "out")
    assert all(torch.equal(ours[name], out[name]) for name in ours)


def test_what_stays_although_it_differs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("norm", "embed", "q_proj"))
    options = ["--operator", "interpolate", "--dose", "0.75", "--out", tmp_path / "out", "--cache", tmp_path / "c"]
    assert run("restore", base, tuned, *options) == 0
    said = capsys.readouterr().out
    assert "left as they are although they differ: embedding 10 %, 5 × norm scales 10 %; --everything" in said
    assert run("restore", base, tuned, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)["left_although_different"]
    assert len(told) == 6
    assert told[NORM]["part"] == "norm scale"
    assert math.isclose(told[NORM]["relative"], 0.1, rel_tol=1e-4)


@pytest.mark.parametrize("arguments", [["--layers", "0"], ["--modules", "q_proj"]])
def test_everything_is_everything(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("q_proj"))
    command = ["restore", base, tuned, "--operator", "swap", "--everything", *arguments, "--dry-run"]
    assert run(*command, "--cache", tmp_path / "c") == 2
    assert "--everything takes every tensor" in capsys.readouterr().err


def test_everything_is_for_edits_of_any_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("q_proj"))
    command = ["restore", base, tuned, "--operator", "directions", "--everything", "--dry-run"]
    assert run(*command, "--cache", tmp_path / "c") == 2
    assert "directions edits matrices, but everything includes vectors" in capsys.readouterr().err


def test_wrapped_names_compare_with_plain_ones_and_are_written_plain(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=moved("q_proj"))
    file = next(tuned.glob("*.safetensors"))
    save_file({f"_orig_mod.{name}": each for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
    index = json.loads((tuned / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"_orig_mod.{name}": each for name, each in index["weight_map"].items()}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    found = ask(base, tuned, tmp_path)
    assert any("which a wrapper left; it was ignored" in note for note in found.notes)
    assert found.changed
    options = ["--operator", "interpolate", "--dose", "0.5", "--cache", tmp_path / "c"]
    assert run("restore", base, tuned, *options, "--out", tmp_path / "out") == 0
    load_model(tmp_path / "out")


def test_other_widths_and_layers_are_still_another_model(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    for options, message in (({"layers": 3}, "also has"), ({"intermediate": 56}, "has shape")):
        other = write(tmp_path / message.replace(" ", "-"), **options)
        with Weights(base) as ours, Weights(other) as theirs, pytest.raises(UserError, match=message):
            check_same(ours, theirs)
