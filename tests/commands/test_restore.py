from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from rlheals import cli
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.restoration.edit import BASES, DOSED
from rlheals.restoration.patch import PatchWriter, model_digest
from rlheals.spectra.reader import Weights
from tests.common import make_folder
from tests.restoration.folders import same_bits, same_state, state, write
from tests.spectra.synthetic import trained_like

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Q0 = "model.layers.0.self_attn.q_proj.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Reference, target and cache."""
    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "before"), make_folder(root / "after", seed=1), root / "cache"


def changed(one: Path, other: Path) -> set[str]:
    ours, theirs = state(one), state(other)
    return {name for name in ours if not same_bits(ours[name], theirs[name])}


def test_the_written_model_is_the_recipe_and_nothing_else(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, cache = models
    edit = ["--window", "head:0.2", "--layers", "0", "--modules", "q_proj,up_proj", "--cache", cache]
    out, patch = tmp_path / "out", tmp_path / "p"
    code, text, err = run(capsys, "restore", reference, target, *edit, "--out", out, "--patch", patch)
    assert code == 0, err
    assert "2 of 21 tensors changed" in text
    assert changed(target, out) == {Q0, "model.layers.0.mlp.up_proj.weight"}
    load_model(out)
    load_tokenizer(out)
    assert run(capsys, "patch", "apply", patch, target, "--out", tmp_path / "again")[0] == 0
    assert same_state(out, tmp_path / "again")
    card = (out / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("rlheals restore"))
    assert "ranks `head:0.2`" in card
    words = shlex.split(line)[1:]
    words[words.index("BASE")], words[words.index("TARGET")] = str(reference), str(target)
    with Weights(reference) as weights:
        assert f"| BASE, the reference | before | `{model_digest(weights)}` |" in card
    words[words.index("DIR")] = str(tmp_path / "third")
    assert run(capsys, *words, "--cache", cache)[0] == 0
    assert same_state(out, tmp_path / "third")
    with Weights(out) as weights:
        assert len(weights.shapes) == 21


def test_by_default_it_goes_three_quarters_of_the_way_back(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, cache = models
    out = tmp_path / "out"
    code, text, err = run(capsys, "restore", reference, target, "--cache", cache, "--out", out)
    assert code == 0, err
    before, after, written = state(reference), state(target), state(out)
    edited = changed(target, out)
    assert edited == {name for name in written if "_proj" in name}
    for name in edited:
        old, new = before[name].double().numpy(), after[name].double().numpy()
        np.testing.assert_allclose(written[name].numpy(), new + 0.75 * (old - new), rtol=0, atol=1e-7)
    lines = text.splitlines()
    assert lines[0].startswith("interpolate_all_before-to-after_all_dose0.75")
    assert lines[1] == f"wrote {out}"
    assert lines[2].startswith("left as they are although they differ: ")
    assert f"`rlheals eval {out}`" in lines[3]
    assert "try doses from 0.5 to 0.95" in lines[4]
    assert len(lines) == 5, "a plain step decomposes nothing, so nothing is said of the cache"


@pytest.mark.parametrize("options", [["--window", "head:0.2"], ["--basis", "uv"], ["--official"]])
def test_a_window_a_basis_or_the_released_way_mean_directions(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    reference, target, cache = models
    code, text, _ = run(capsys, "restore", reference, target, *options, "--dry-run", "--json", "--cache", cache)
    recipe = json.loads(text)["recipe"]
    assert (code, recipe["operator"], recipe["dose"]) == (0, "directions", 1.0)


def test_after_an_edit_come_the_next_steps_and_what_stays_on_disk(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, _ = models
    cache, patch = tmp_path / "cache", tmp_path / "p"
    options = ["--window", "head:0.2", "--layers", "0", "--cache", cache, "--cache-gib", "2"]
    code, text, err = run(capsys, "restore", reference, target, *options, "--patch", patch)
    assert code == 0, err
    assert "compare with a plain step, --operator interpolate --dose 0.75" in text
    assert f"`rlheals patch invert {patch} --out FILE`" in text
    weights = sum(state(target)[name].nbytes for name in state(target) if ".layers.0." in name and "_proj" in name)
    size = patch.stat().st_size
    assert f"wrote {patch}: {size:,} bytes, {100 * size / weights:.3g} % of the {weights:,} bytes of weights" in text
    stored = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert 1024 < stored < 2**20
    kept = f"{stored / 1024:.3g} KiB of decompositions in {cache / 'factors'}, at most 2 GiB (--cache-gib)"
    assert kept in text.splitlines()[-1]
    told = json.loads(run(capsys, "restore", reference, target, *options, "--patch", patch, "--json")[1])
    assert (told["patch_bytes"], told["patch_weight_bytes"]) == (size, weights)


def test_a_full_swap_is_the_reference(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, cache = models
    options = ["--operator", "swap", "--embeddings", "--head", "--cache", cache, "--json", "--shard-gb", 0.0001]
    code, text, _ = run(capsys, "restore", reference, target, *options, "--out", tmp_path / "out")
    told = json.loads(text)
    assert code == 0
    assert set(told["changed"]) == changed(reference, target)
    assert same_state(reference, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_swap_gives_the_very_bits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also where only the sign of zeros differs, or numbers whose squares vanish."""

    def zeros(name: str, tensor: Tensor) -> Tensor:
        return tensor * 0.0 if name == Q0 else tensor * 1e-25

    def signed(name: str, tensor: Tensor) -> Tensor:
        return zeros(name, tensor) * (-1 if name == Q0 else 3)

    one, two, out = write(tmp_path / "a", change=zeros), write(tmp_path / "b", change=signed), tmp_path / "out"
    options = ["--operator", "swap", "--modules", "q_proj,up_proj", "--cache", tmp_path / "cache", "--json"]
    code, text, _ = run(capsys, "restore", one, two, *options, "--out", out, "--patch", tmp_path / "p")
    assert (code, len(json.loads(text)["changed"])) == (0, 3)  # by size, of which a sign of zero has none
    before, after, written = state(one), state(two), state(out)
    for name in written:
        wanted = before if "q_proj" in name or "up_proj" in name else after
        assert same_bits(written[name], wanted[name])
    assert run(capsys, "patch", "apply", tmp_path / "p", two, "--out", tmp_path / "again")[0] == 0
    assert same_state(tmp_path / "again", out)


def strict(text: str) -> Any:
    """JSON without the numbers that are none."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_changes_are_told_relative_to_the_target(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = write(tmp_path / "a"), write(tmp_path / "b", change=lambda name, tensor: tensor * 4 + 0.01)
    options = ["--operator", "swap", "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--json"]
    told = strict(run(capsys, "restore", one, two, *options)[1])["changed"]
    before, after = ({n: tensor.double() for n, tensor in state(folder).items()} for folder in (two, one))
    assert len(told) == 14
    for name, change in told.items():
        assert change["relative"] == pytest.approx(float((after[name] - before[name]).norm() / before[name].norm()))
    assert "The change is relative to the target's tensor" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("zero", ["target", "edited"])
def test_tensors_that_are_all_zero_have_a_change_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, zero: str
) -> None:
    folders = write(tmp_path / "a"), write(tmp_path / "b", change=lambda name, t: t * 0 if name == Q0 else t * 2)
    one, two = folders if zero == "target" else folders[::-1]
    options = ["--operator", "swap", "--modules", "q_proj", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    code, text, err = run(capsys, "restore", one, two, *options)
    assert code == 0, err
    if zero == "target":
        assert f"2 of 21 tensors changed, {Q0} most (relative norm from all zeros)" in text
    told = strict(run(capsys, "restore", one, two, *options, "--json")[1])["changed"]
    assert told[Q0]["relative"] == (None if zero == "target" else pytest.approx(1.0))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("from all zeros" in card, "inf" in card.split("## Recipe")[0]) == (zero == "target", False)
    same = [*options[:-2], "--out", tmp_path / "same"]
    assert "the edit changes nothing" in run(capsys, "restore", two, two, *same)[1]


def test_a_patch_without_a_change_is_not_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = write(tmp_path / "a"), write(tmp_path / "b")
    options = ["--operator", "swap", "--cache", tmp_path / "cache", "--patch", tmp_path / "p"]
    for more in ([], ["--out", tmp_path / "out"]):
        code, _, err = run(capsys, "restore", one, two, *options, *more)
        assert (code, "there is nothing to patch" in err) == (2, True)
        assert not any((tmp_path / name).exists() for name in ("p", "out"))


def test_places_and_roles_are_named_as_they_were_given(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, _ = models
    other, options = write(tmp_path / "other"), ["--dry-run", "--cache", tmp_path / "cache"]
    wrong: list[tuple[list[object], str]] = [
        ([reference, other], f"{other} is not a fine-tuned version of {reference}"),
        ([tmp_path / "nowhere", target], f"{tmp_path / 'nowhere'} does not exist"),
        ([reference, target / "config.json"], f"{target / 'config.json'} is a file, not a folder"),
    ]
    for folders, message in wrong:
        code, _, err = run(capsys, "restore", *folders, *options)
        assert (code, message in err) == (2, True), err
    if not torch.cuda.is_available():
        _, _, err = run(capsys, "restore", reference, target, *options, "--device", "cuda")
        assert err.startswith("error: --device is cuda, but torch sees no CUDA device")


def test_a_patch_alone_shows_how_far_it_is(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, cache = models
    options = ["--operator", "swap", "--modules", "q_proj", "--cache", cache, "--patch", tmp_path / "p"]
    assert "editing after: 2/2 tensors" in run(capsys, "restore", reference, target, *options)[2]


def test_an_interrupted_edit_says_so_and_leaves_nothing(
    models: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, target, cache = models

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PatchWriter, "add", interrupted)
    options = ["--operator", "swap", "--cache", cache, "--patch", tmp_path / "p", "--out", tmp_path / "out"]
    code, text, err = run(capsys, "restore", reference, target, *options)
    assert (code, text, err.splitlines()[-1]) == (130, "", "interrupted; nothing unfinished was written")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, _ = models
    options = ["--dry-run", "--layers", "1", "--window", "tail:4", "--cache", tmp_path / "cache"]
    code, text, _ = run(capsys, "restore", reference, target, *options)
    assert (code, "7 of 21 tensors would change" in text, "ranks 60-64 of 64" in text) == (0, True, True)
    code, text, _ = run(capsys, "restore", reference, target, *options, "--json")
    assert (code, len(json.loads(text)["would_change"])) == (0, 7)
    _, text, _ = run(capsys, "restore", reference, target, *options, "--window", "ends:8-4")
    assert "ranks 0-8, 60-64 of 64" in text
    code, text, _ = run(capsys, "restore", reference, target, *options, "--window", "band:40-50")
    assert (code, "5 of 21 tensors would change" in text, "none of" in text) == (0, True, False), "keys have 32 ranks"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_tied_head_that_is_stored_follows_the_embedding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def tied(seed: int) -> Path:
        def same(name: str, tensor: Tensor) -> Tensor:
            return trained_like("model.embed_tokens.weight", tuple(tensor.shape), seed) if "lm_head" in name else tensor

        folder = write(tmp_path / f"m{seed}", seed=seed, change=same)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        return folder

    one, two, out = tied(0), tied(1), tmp_path / "out"
    options = ["--operator", "interpolate", "--dose", "0.5", "--layers", "0", "--embeddings"]
    assert run(capsys, "restore", one, two, *options, "--cache", tmp_path / "cache", "--out", out)[0] == 0
    assert {"model.embed_tokens.weight", "lm_head.weight"} < changed(two, out)
    written = state(out)
    assert same_bits(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_a_head_that_is_not_tied_after_all_is_not_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Loaders untie a stored head that differs from the embedding, whatever the config says."""
    one, two = write(tmp_path / "a"), write(tmp_path / "b", seed=1)
    for folder in (one, two):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    options = ["--operator", "swap", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    for flag in ("--embeddings", "--head"):
        code, _, err = run(capsys, "restore", one, two, *options, flag)
        assert (code, f"{two} stores a head that differs from the embedding" in err) == (2, True), err
        assert not (tmp_path / "out").exists()
    assert run(capsys, "restore", one, two, *options)[0] == 0
    assert changed(two, tmp_path / "out").isdisjoint({"lm_head.weight", "model.embed_tokens.weight"})


@pytest.mark.parametrize("command", [["restore"], ["patch", "apply"], ["patch", "lora"]])
def test_help_tells_that_an_earlier_output_is_replaced(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert "an earlier output of rlheals there is replaced" in " ".join(run(capsys, *command, "--help")[1].split())


def test_help_tells_which_operators_have_a_dose(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "restore", "--help")[1].split())
    plain, _, dosed = text.partition("with a dose: ")
    assert {name for name in BASES if name in dosed.partition(".")[0]} == set(DOSED)
    assert all(name in plain for name in BASES if name not in DOSED)
    assert "head:1.0 takes every rank, head:1 the first" in text


def test_bad_input_exits_2_and_writes_nothing(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference, target, cache = models
    out = tmp_path / "out"
    (target.parent / "config.json").write_text("{}")
    wrong: list[tuple[list[object], str]] = [
        ([], "say where to write"),
        (["--out", out, "--operator", "swp"], "did you mean 'swap'"),
        (["--out", out, "--window", "top"], "is no window of ranks"),
        (["--out", out, "--modules", "q_prj"], "did you mean 'q_proj'"),
        (["--out", out, "--layers", "9"], "layer 9 is outside"),
        (["--out", out, "--operator", "swap", "--dose", "0.5"], "has no dose"),
        (["--out", out, "--device", "tpu"], "--device tpu is not known"),
        (["--out", target], "exists and is no output"),
        (["--out", out, "--patch", out / "p"], "would lie inside"),
        (["--patch", target / "p"], "would lie inside the model folder"),
        (["--patch", reference / "deep" / "p"], "would lie inside the model folder"),
        (["--patch", target.parent / "config.json"], "is no patch"),
        (["--patch", out, "--layers", ""], "is not a list of layers"),
        (["--patch", out, "--modules", ""], "is not a list of names"),
        (["--patch", out, "--modules", "q_proj,"], "is not a list of names"),
        (["--out", target.parent / "config.json" / "x"], "a part of the path is a file"),
        (["--out", target / "edited"], "lies in"),
        (["--out", reference / "deep" / "edited"], "lies in"),
        (["--patch", out, "--operator", "interpolate", "--dose", "0"], "a dose of 0 changes nothing"),
        (["--recipe", out, "--dose", "0"], "a dose of 0 changes nothing"),
        (["--recipe", target / "r.json"], "would lie inside the model folder"),
        (["--out", out, "--recipe", out / "r.json"], "would lie inside the model folder"),
        (["--recipe", target.parent / "config.json"], "is no recipe, so it is not replaced"),
        (["--recipe", out, "--patch", out], "cannot be both"),
        (["--patch", target.parent / "config.json" / "x"], "a file is in the way"),
        (["--patch", f"/proc/{'x' * 8}"], "can be made there"),
        (["--out", out, "--shard-gb", "inf"], "--shard-gb is a size"),
        (["--out", out, "--cache-gib", "inf"], "--cache-gib is a size"),
        (["--out", out, "--layers", "0-2000000000"], "beyond any model"),
        (["--patch", out, "--window", "band:500-600"], "holds no rank of any matrix"),
        (["--patch", out, "--window", "head:0"], "holds no rank of any matrix"),
        (["--patch", out, "--operator", "rotate", "--window", "head:64"], "takes all 64 of"),
        (["--patch", out, "--operator", "swap", "--window", "head:0.2"], "has no window"),
        (["--patch", out, "--operator", "rotate"], "give a window such as"),
        (["--patch", out, "--operator", "noise", "--dose", "nan"], "a number from 0 up"),
        (["--patch", out, "--operator", "noise", "--dose", "-1"], "a number from 0 up"),
        (["--patch", out, "--operator", "noise", "--dose", "1e300"], "cannot hold"),
    ]
    for options, message in wrong:
        code, _, err = run(capsys, "restore", reference, target, *options, "--cache", cache)
        assert (code, message in err) == (2, True), err
        assert not list(tmp_path.iterdir())
