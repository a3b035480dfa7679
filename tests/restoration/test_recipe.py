"""Recipes: the same bits from both models, every entry checked, and every refusal one sentence."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.restoration import recipe as recipes
from rlheals.restoration.edit import Edit, Scope, head
from rlheals.restoration.recipe import (
    LARGEST,
    Recipe,
    check_recipe_target,
    check_result,
    is_recipe,
    read_recipe,
    write_recipe,
)
from rlheals.restoration.tensor_file import TensorFileWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EDIT = Edit("directions", "uv", "base", "tuned", Scope(("q_proj",), (0, 1)), head(0.2))
SIDES = {"reference": {"name": "base", "weights_sha256": "a" * 64}, "target": {"name": "t", "weights_sha256": "b" * 64}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_recipe(Recipe.made(EDIT, SIDES, "c" * 64, "cpu"), tmp_path / "edit.json")
    return tmp_path / "edit.json"


def sealed(content: dict[str, Any]) -> str:
    """The file with its own sha256 made right again, as somebody would who alters it on purpose."""
    rest = {name: entry for name, entry in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(rest | {"sha256": digest})


def test_what_is_written_is_read(file: Path) -> None:
    found = read_recipe(file)
    assert (found.edit, found.result.weights_sha256) == (EDIT, "c" * 64)
    assert (found.reference.name, found.target.weights_sha256) == ("base", "b" * 64)
    assert (found.machine.torch, found.machine.device) == (torch.__version__, "cpu")
    assert found.machine.threads == torch.get_num_threads()
    assert file.stat().st_size < 1500
    write_recipe(found, file)  # an earlier recipe may be replaced
    assert read_recipe(file) == found
    assert [path.name for path in file.parent.iterdir()] == ["edit.json"]


@pytest.mark.parametrize("name", ['a"b\\c', "über alles \U0001f600", "two\nlines", "- &anchor"])
def test_names_of_any_kind_survive(tmp_path: Path, name: str) -> None:
    sides = {**SIDES, "target": {"name": name, "weights_sha256": "b" * 64}}
    made = Recipe.made(EDIT, sides, "c" * 64, "cuda:0")
    write_recipe(made, tmp_path / "edit.json")
    assert read_recipe(tmp_path / "edit.json") == made
    assert made.machine.device == "cuda"


def setting(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


WRONG: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (setting("version", value=2), "recipe of format 2, this rlheals .* reads 1; update rlheals"),
    (setting("version", value="1"), "recipe of format 1, this rlheals"),
    (setting("version", value=True), "update rlheals"),
    (setting("format", value="rlheals.patch"), "is no patch and no recipe"),
    (setting("extra", value=1), "extra is not a known entry"),
    (setting("edit", "extra", value=1), "edit.extra is not a known entry"),
    (setting("edit", "scope", "extra", value=1), "edit.scope.extra is not a known entry"),
    (lambda c: c.pop("target"), "target is missing"),
    (lambda c: c["edit"].pop("dose"), "edit.dose is missing"),
    (setting("edit", value=[]), "edit"),
    (setting("edit", "dose", value="all"), "edit.dose: input should be a valid number"),
    (setting("edit", "dose", value=float("nan")), "edit.dose: input should be a finite number"),
    (setting("edit", "seed", value=-1), "edit.seed: input should be greater than or equal to 0"),
    (setting("edit", "seed", value=2**70), "edit.seed"),
    (setting("edit", "scope", "layers", value=[0.5]), "edit.scope.layers.1|edit.scope.layers"),
    (setting("edit", "scope", "modules", value="q_proj"), "edit.scope.modules: input should be a valid"),
    (setting("edit", "official", value=1), "edit.official: input should be a valid boolean"),
    (setting("edit", "operator", value="swp"), "did you mean 'swap'"),
    (setting("edit", "window", value="top"), "is no window of ranks"),
    (setting("target", "weights_sha256", value="b" * 63), "target.weights_sha256"),
    (setting("target", "name", value="x" * 1001), "target.name"),
    (setting("result", "weights_sha256", value=3), "result.weights_sha256: input should be a valid string"),
    (setting("machine", "threads", value=10**6), "machine.threads: input should be less than or equal to 1024"),
    (setting("machine", "device", value="tpu"), "machine.device"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_each_problem_is_one_sentence(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(sealed(content))
    with pytest.raises(UserError, match=message) as error:
        read_recipe(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_an_altered_recipe_is_told(file: Path) -> None:
    for change in (setting("edit", "dose", value=0.5), setting("result", "weights_sha256", value="d" * 64)):
        content = json.loads(file.read_text())
        content["edit"] |= {"operator": "rotate"}  # which has a dose
        change(content)
        altered = file.with_name("altered.json")
        altered.write_text(json.dumps(content))
        with pytest.raises(UserError, match="was altered since it was written"):
            read_recipe(altered)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format": "rlheals.recipe", "format": 1}', "a name occurs twice"),
        (b"{", "is no JSON object"),
        (b"[" * 100_000, "is no JSON object"),
        (b"[1]", "is no patch and no recipe"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"{" + b" " * LARGEST, "is larger than any recipe"),
    ],
)
def test_files_that_are_none_are_told(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "f")
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "nowhere")


def test_a_patch_is_no_recipe_whatever_its_length_begins_with(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "p") as writer:
        writer.add("a", torch.zeros(3))
        writer.finish({})
    content = (tmp_path / "p").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    header += b" " * (ord("{") + 256 - len(header))  # so that the length begins with a brace
    (tmp_path / "q").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert (tmp_path / "q").read_bytes()[:1] == b"{"
    assert not is_recipe(tmp_path / "p")
    assert not is_recipe(tmp_path / "q")
    assert not is_recipe(tmp_path / "nowhere")


def test_only_recipes_are_replaced(file: Path, tmp_path: Path) -> None:
    check_recipe_target(file)
    check_recipe_target(tmp_path / "new.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(file)
    (tmp_path / "folder").mkdir()
    for taken in ("config.json", "link.json", "folder"):
        with pytest.raises(UserError, match="is no recipe, so it is not replaced"):
            check_recipe_target(tmp_path / taken)
    with pytest.raises(UserError, match="would lie inside the model folder"):
        check_recipe_target(tmp_path / "deep" / "r.json", tmp_path)


def test_other_bits_are_told_with_what_differs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(file)
    check_result(recipe, "c" * 64, file)
    with pytest.raises(UserError, match=r"gives other bits here .* seem the same.*nothing was written.*full patch"):
        check_result(recipe, "d" * 64, file)
    there = recipes.here()
    monkeypatch.setattr(recipes, "here", lambda _: there.model_copy(update={"cpu": "Another CPU, AVX2"}))
    with pytest.raises(UserError, match=r"sums are rounded differently \(cpu .* there and Another CPU, AVX2 here\)"):
        check_result(recipe, "d" * 64, file)
