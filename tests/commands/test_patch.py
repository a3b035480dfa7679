from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlheals.models.checkpoint import load_model
from rlheals.restoration.folder_edit import FolderEdit
from rlheals.restoration.patch import tensor_digest
from tests.commands.test_restore import run
from tests.common import make_folder
from tests.restoration.folders import drifted, low_rank, same_state, state, write

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.restoration.operators import Edited

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a"), write(tmp_path / "b", change=drifted)


def test_make_apply_invert_and_compose(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    p, back, none = (tmp_path / name for name in ("p", "back", "none"))
    code, text, _ = run(capsys, "patch", "make", one, two, "--out", p)
    assert (code, "the difference of two models, made for a" in text) == (0, True)
    assert run(capsys, "patch", "invert", p, "--out", back)[0] == 0
    assert run(capsys, "patch", "compose", p, back, "--out", none)[0] == 0
    code, text, _ = run(capsys, "patch", "apply", p, one, "--out", tmp_path / "there", "--json")
    assert (code, len(json.loads(text)["changed"])) == (0, 21)
    assert run(capsys, "patch", "apply", back, two, "--out", tmp_path / "here")[0] == 0
    assert same_state(tmp_path / "there", two)
    assert same_state(tmp_path / "here", one)
    code, text, _ = run(capsys, "patch", "show", none, "--json")
    assert (code, json.loads(text)["tensors"]) == (0, {})
    assert "patch of rlheals applied" in (tmp_path / "there" / "README.md").read_text()


def test_show_names_tensors_and_what_they_must_be(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")
    told = json.loads(run(capsys, "patch", "show", tmp_path / "p", "--json")[1])
    before, after = state(one), state(two)
    assert {n: (e["before"], e["after"]) for n, e in told["tensors"].items()} == {
        name: (tensor_digest(before[name]), tensor_digest(after[name])) for name in before
    }
    text = run(capsys, "patch", "show", tmp_path / "p")[1]
    assert all(name in text for name in before)


def by_hand(folder: Path) -> str:
    """The sha256 of a folder's weights as the docs describe it."""
    lines = []
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in entry["data_offsets"])
                head = f"{entry['dtype']} [{', '.join(map(str, entry['shape']))}] "
                lines.append(f"{name} {hashlib.sha256(head.encode() + content[first:last]).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_the_models_of_a_patch_are_told_by_their_digests(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    digests = []
    for folder in models:
        code, text, err = run(capsys, "patch", "digest", folder)
        assert (code, text) == (0, f"{by_hand(folder)}  {folder}\n")
        assert f"hashing {folder.name}: 21/21 tensors" in err
        told = json.loads(run(capsys, "patch", "digest", folder, "--json")[1])
        assert told == {"model": str(folder), "weights_sha256": by_hand(folder)}
        digests.append(told["weights_sha256"])
    p, back, both = (tmp_path / name for name in ("p", "back", "both"))
    _, text, err = run(capsys, "patch", "make", one, two, "--out", p)
    assert f"for the model of weights sha256 {digests[0]}\n  gives the model of weights sha256 {digests[1]}\n" in text
    assert "writing p: 21/21 tensors" in err
    assert "writing back: 21/21 tensors" in run(capsys, "patch", "invert", p, "--out", back)[2]
    told = json.loads(run(capsys, "patch", "show", back, "--json")[1])
    assert told["models"] == {"before": digests[1], "after": digests[0]}
    _, text, err = run(capsys, "patch", "compose", p, back, "--out", both)
    assert "writing both: 21/21 tensors" in err


def test_an_inverted_patch_is_for_what_the_change_gave(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")
    run(capsys, "patch", "invert", tmp_path / "p", "--out", tmp_path / "back")
    right = f"the model that the change gave (weights sha256 {by_hand(two)[:12]}…)"
    text = run(capsys, "patch", "show", tmp_path / "back")[1]
    assert f"undoes the difference of two models, for {right}" in text
    other = write(tmp_path / "c", seed=5)
    _, _, err = run(capsys, "patch", "apply", tmp_path / "back", other, "--out", tmp_path / "out")
    assert f"apply it to {right}." in err
    run(capsys, "patch", "compose", tmp_path / "p", tmp_path / "back", "--out", tmp_path / "none")
    text = run(capsys, "patch", "show", tmp_path / "none")[1]
    assert "made for a\n  undoes the difference of two models, for the model that the change gave\n" in text


def test_the_wrong_base_exits_2(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = models
    run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")
    other = write(tmp_path / "c", seed=5)
    code, _, err = run(capsys, "patch", "apply", tmp_path / "p", other, "--out", tmp_path / "out")
    assert (code, "does not fit" in err, "the sha256 of" in err) == (2, True, True)
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, "patch", "show", one / "config.json")
    assert (code, "is no patch and no recipe" in err) == (2, True)


def test_another_model_needs_a_word(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    three = write(tmp_path / "c", change=low_rank)
    other = write(tmp_path / "d", change=lambda name, tensor: tensor * 1.5 if "down_proj" in name else tensor)
    run(capsys, "patch", "make", models[0], three, "--out", tmp_path / "p")
    for command in ("apply", "lora"):
        arguments = ["patch", command, tmp_path / "p", other, "--out", tmp_path / command]
        code, _, err = run(capsys, *arguments)
        assert (code, "or pass --same-tensors-only" in err, (tmp_path / command).exists()) == (2, True, False)
        assert run(capsys, *arguments, "--same-tensors-only")[0] == 0
    wanted, written = (
        state(folder)["model.layers.0.self_attn.q_proj.weight"] for folder in (three, tmp_path / "apply")
    )
    assert torch.equal(written, wanted)


def test_lora_where_the_rank_allows(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    three = write(tmp_path / "c", change=low_rank)
    run(capsys, "patch", "make", one, three, "--out", tmp_path / "p")
    code, text, _ = run(capsys, "patch", "lora", tmp_path / "p", one, "--out", tmp_path / "lora")
    assert (code, "4 matrices, ranks 2 to 2" in text) == (0, True)
    run(capsys, "patch", "make", one, two, "--out", tmp_path / "q")
    code, _, err = run(capsys, "patch", "lora", tmp_path / "q", one, "--out", tmp_path / "no")
    assert (code, "no adapter is written for" in err) == (2, True)


def stored_twice(folder: Path, shift: float = 0.0) -> Path:
    """The folder with its tied head stored on its own."""
    file = folder / "model.safetensors"
    found = load_file(file)
    save_file({**found, HEAD: found[EMBEDDING] + shift}, file, metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_tied_head_that_only_one_model_stores_follows_the_embedding(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = (make_folder(tmp_path / f"q{seed}", "qwen2", seed) for seed in (0, 1))
    stored_twice(one)
    assert run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")[0] == 0
    assert run(capsys, "patch", "apply", tmp_path / "p", one, "--out", tmp_path / "there")[0] == 0
    written, wanted = state(tmp_path / "there"), state(two)
    assert torch.equal(written[HEAD], wanted[EMBEDDING])
    assert torch.equal(logits(tmp_path / "there"), logits(two))
    assert run(capsys, "patch", "make", two, one, "--out", tmp_path / "p")[0] == 0
    assert run(capsys, "patch", "apply", tmp_path / "p", two, "--out", tmp_path / "here")[0] == 0
    assert torch.equal(logits(tmp_path / "here"), logits(one))


def test_a_stored_tied_head_follows_a_patch_of_a_model_without_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = (make_folder(tmp_path / f"q{seed}", "qwen2", seed) for seed in (0, 1))
    assert run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")[0] == 0
    stored_twice(one)
    arguments = ["patch", "apply", tmp_path / "p", one, "--out", tmp_path / "there", "--same-tensors-only"]
    assert run(capsys, *arguments)[0] == 0
    assert torch.equal(logits(tmp_path / "there"), logits(two))


def test_a_stored_head_that_is_not_tied_after_all_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = (make_folder(tmp_path / f"q{seed}", "qwen2", seed) for seed in (0, 1))
    stored_twice(two, shift=1.0)
    code, _, err = run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")
    assert (code, "stores a head that differs" in err) == (2, True)


def test_a_head_that_differs_from_its_embedding_changes_only_by_a_patch_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = (make_folder(tmp_path / f"q{seed}", "qwen2", seed) for seed in (0, 1))
    assert run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")[0] == 0
    stored_twice(one, shift=1.0)
    arguments = ["patch", "apply", tmp_path / "p", one, "--out", tmp_path / "there", "--same-tensors-only"]
    code, _, err = run(capsys, *arguments)
    assert (code, "stores a head that differs from the embedding" in err) == (2, True), err
    assert not (tmp_path / "there").exists()
    stored_twice(two, shift=1.0)
    assert run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")[0] == 0
    assert run(capsys, *arguments[:-1])[0] == 0
    assert same_state(tmp_path / "there", two)
    found, norm = load_file(one / "model.safetensors"), "model.norm.weight"
    save_file({**found, norm: found[norm] * 2}, one / "model.safetensors", metadata={"format": "pt"})
    assert run(capsys, *arguments)[0] == 0
    assert torch.equal(state(tmp_path / "there")[HEAD], state(two)[HEAD])


def test_a_stored_head_stays_where_the_patch_is_for_this_very_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Training untied the two: only the embedding changed."""
    one, two = (stored_twice(make_folder(tmp_path / name, "qwen2")) for name in ("a", "b"))
    file = two / "model.safetensors"
    found = load_file(file)
    save_file({**found, EMBEDDING: found[EMBEDDING] * 2}, file, metadata={"format": "pt"})
    assert run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")[0] == 0
    assert run(capsys, "patch", "apply", tmp_path / "p", one, "--out", tmp_path / "there")[0] == 0
    assert same_state(tmp_path / "there", two)


def test_the_adapter_of_the_docs_can_be_written(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    patch = ["--patch", tmp_path / "p", "--cache", tmp_path / "cache"]
    assert run(capsys, "restore", one, two, "--window", "head:0.05", *patch)[0] == 0
    assert run(capsys, "patch", "lora", tmp_path / "p", two, "--out", tmp_path / "adapter")[0] == 0
    run(capsys, "restore", one, two, "--window", "head:0.2", *patch)
    code, _, err = run(capsys, "patch", "lora", tmp_path / "p", two, "--out", tmp_path / "no")
    assert (code, "is not of rank" in err) == (2, True)


@pytest.fixture
def edited(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, tuned and the recipe of an edit with singular vectors; the edited model lies in ``repaired``."""
    one, two = models
    recipe = tmp_path / "edit.json"
    options = ["--window", "head:0.2", "--cache", tmp_path / "cache", "--out", tmp_path / "repaired"]
    code, text, err = run(capsys, "restore", one, two, *options, "--recipe", recipe)
    assert code == 0, err
    assert f"wrote {recipe}: {recipe.stat().st_size:,} bytes" in text
    return one, two, recipe


def test_a_recipe_makes_the_same_bits(
    edited: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two, recipe = edited
    wanted = by_hand(tmp_path / "repaired")
    told = json.loads(run(capsys, "patch", "show", recipe, "--json")[1])
    assert told["result"] == {"weights_sha256": wanted}
    assert (told["reference"]["weights_sha256"], told["target"]["weights_sha256"]) == (by_hand(one), by_hand(two))
    text = run(capsys, "patch", "show", recipe)[1]
    assert f"gives the model of weights sha256 {wanted}" in text
    for cache in ("cache", "another"):  # with the decompositions at hand, and without
        out = tmp_path / "again"
        arguments = ["patch", "apply", recipe, two, "--reference", one, "--out", out, "--cache", tmp_path / cache]
        code, text, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        told = json.loads(text)
        assert (told["weights_sha256"], by_hand(out), len(told["changed"])) == (wanted, wanted, 14)
        assert same_state(out, tmp_path / "repaired")
    assert "## Recipe" in (tmp_path / "again" / "README.md").read_text()


def test_a_recipe_alone_knows_its_result(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models
    cache = ["--cache", tmp_path / "cache"]
    assert run(capsys, "restore", one, two, *cache, "--recipe", tmp_path / "r")[0] == 0
    assert run(capsys, "restore", one, two, *cache, "--out", tmp_path / "out")[0] == 0
    told = json.loads(run(capsys, "patch", "show", tmp_path / "r", "--json")[1])
    assert told["result"]["weights_sha256"] == by_hand(tmp_path / "out")
    renamed = two.rename(tmp_path / "elsewhere")
    arguments = ["patch", "apply", tmp_path / "r", renamed, "--reference", one, "--out", tmp_path / "again"]
    assert run(capsys, *arguments, *cache)[0] == 0
    assert same_state(tmp_path / "again", tmp_path / "out")


def test_recipes_are_refused_in_a_sentence(
    edited: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two, recipe = edited
    other = write(tmp_path / "c", seed=5)
    content = json.loads(recipe.read_text())
    (tmp_path / "altered").write_text(json.dumps(content | {"result": {"weights_sha256": "0" * 64}}))
    (tmp_path / "later").write_text(json.dumps(content | {"version": 2}))
    run(capsys, "patch", "make", one, two, "--out", tmp_path / "p")
    out, before = tmp_path / "out", {path.name for path in tmp_path.iterdir()}
    apply = ["patch", "apply", "--out", out, "--cache", tmp_path / "cache"]
    wrong: list[tuple[list[object], str]] = [
        ([*apply, recipe, two, "--reference", other], f"{other} is not the reference of {recipe}"),
        ([*apply, recipe, other, "--reference", one], f"{other} is not the target of {recipe}"),
        ([*apply, recipe, one, "--reference", two], f"{one} is the reference of {recipe}, not its target"),
        ([*apply, recipe, two], "name the other by --reference"),
        ([*apply, recipe, two, "--reference", one, "--same-tensors-only"], "leave out --same-tensors-only"),
        ([*apply, tmp_path / "altered", two, "--reference", one], "was altered since it was written"),
        ([*apply, tmp_path / "later", two, "--reference", one], "update rlheals"),
        ([*apply, tmp_path / "p", one, "--reference", two], "leave out --reference"),
        (["patch", "invert", recipe, "--out", out], "a recipe does not hold the change itself"),
        (["patch", "lora", recipe, two, "--out", out], "a recipe does not hold the change itself"),
        (["patch", "compose", tmp_path / "p", recipe, "--out", out], "a recipe does not hold the change itself"),
    ]
    for arguments, message in wrong:
        code, _, err = run(capsys, *arguments)
        assert (code, message in err) == (2, True), err
        assert {path.name for path in tmp_path.iterdir()} == before


def test_a_recipe_that_gives_other_bits_here_writes_nothing(
    edited: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on another processor: the last bit of every edited number is another one."""
    one, two, recipe = edited
    original = FolderEdit.edited

    def otherwise(self: FolderEdit, name: str) -> Edited | None:
        done = original(self, name)
        return done and replace(done, tensor=torch.nextafter(done.tensor, torch.full_like(done.tensor, 9.0)))

    monkeypatch.setattr(FolderEdit, "edited", otherwise)
    before = {path.name for path in tmp_path.iterdir()}
    arguments = ["patch", "apply", recipe, two, "--reference", one, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *arguments, "--cache", tmp_path / "cache")
    assert (code, "gives other bits here" in err, "ask for the full patch" in err) == (2, True, True)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_recipes_are_made_with_the_threads_they_name(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = models
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 3)
    cache = ["--cache", tmp_path / "cache"]
    assert run(capsys, "restore", one, two, *cache, "--recipe", tmp_path / "r")[0] == 0
    asked.append(5)
    arguments = ["patch", "apply", tmp_path / "r", two, "--reference", one, "--out", tmp_path / "out"]
    assert run(capsys, *arguments, *cache)[0] == 0
    assert asked == [5, 3, 5]


def test_a_patch_is_told_with_its_size_and_share(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two = models

    def one_number(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] += 1.0 if name == EMBEDDING else 0.0
        return tensor

    three = write(tmp_path / "c", change=one_number)
    for after, large in ((two, True), (three, False)):
        shapes = state(one)
        weights = sum(t.nbytes for name, t in shapes.items() if not torch.equal(t, state(after)[name]))
        text = run(capsys, "patch", "make", one, after, "--out", tmp_path / "p")[1]
        size = (tmp_path / "p").stat().st_size
        assert f"{size:,} bytes, {100 * size / weights:.3g} % of the {weights:,} bytes of weights" in text
        assert ("restore --recipe" in text, size > weights / 2) == (large, large)
        told = json.loads(run(capsys, "patch", "show", tmp_path / "p", "--json")[1])
        assert (told["bytes"], told["weight_bytes"]) == (size, weights)
    for command in (["invert", tmp_path / "p"], ["compose", tmp_path / "p", tmp_path / "p2"]):
        run(capsys, "patch", "make", three, two, "--out", tmp_path / "p2")
        assert "bytes of weights that it changes" in run(capsys, "patch", *command, "--out", tmp_path / "q")[1]
