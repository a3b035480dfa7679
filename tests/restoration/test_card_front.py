"""The front matter: what a YAML reader and the hub's own reader find in it, whatever names and cards are like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from rlheals.restoration.card_front import front_matter, hub_name, licence, plain

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = [
    "a: b",
    "- x\nlicense: mit",
    "---",
    "*alias",
    "'quoted\"",
    "null",
    "yes",
    "1e3",
    "über \U0001f600",
    "a\x00b",
    "x" * 300,
    "\\",
    " ",
    "!!python/object:os.system",
    "{{ jinja }}",
    "</script>",
    "\udcff bytes of no text",
    "\u2028\x85\x9f",
]


def read(lines: list[str]) -> dict[str, object]:
    text = "\n".join(lines)
    assert text.startswith("---\n")
    found: dict[str, object] = YAML(typ="safe").load(text.split("\n---\n")[0])
    assert ModelCard(text).data.to_dict() == found
    return found


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("tuned", "base"):
        (tmp_path / name).mkdir()
    return tmp_path / "tuned", tmp_path / "base"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_names(folders: tuple[Path, Path], name: str) -> None:
    lines = front_matter(name, [(name, folders[0]), ("base", folders[1])], merged=True)
    "\n".join(lines).encode()
    found = read(lines)
    assert set(found) == {"base_model", "base_model_relation", "library_name", "license", "tags"}
    models = found["base_model"]
    assert isinstance(models, list)
    assert models[-1] == "base"
    assert all(
        isinstance(each, str) and each.replace("-", "").replace(".", "").replace("_", "").isascii() for each in models
    )
    assert (found["library_name"], found["tags"], found["license"]) == ("transformers", ["rlheals"], "unknown")
    assert len([line for line in lines if line.startswith("# ")]) <= 1
    assert "\n" not in "".join(lines)


def test_a_merge_names_both_models_and_a_patched_one_its_own(folders: tuple[Path, Path]) -> None:
    both = read(front_matter("out", [("tuned", folders[0]), ("base", folders[1])], merged=True))
    assert (both["base_model"], both["base_model_relation"]) == (["tuned", "base"], "merge")
    one = read(front_matter("out", [("tuned", folders[0])], merged=False))
    assert (one["base_model"], "base_model_relation" in one) == (["tuned"], False)


def test_a_model_of_the_hubs_cache_has_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--some-model-7B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub_name("abc", snapshot) == "someone/some-model-7B"
    assert hub_name("gpt2", tmp_path) == "gpt2"
    assert hub_name("my model!", tmp_path) == "my-model"


def test_the_licence_is_that_of_the_models_own_card(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = folders
    (base / "README.md").write_text("---\nlicense: llama3.2\nlicense_name: ignored\n---\n# base\n")
    assert licence([tuned, base]) == {"license": "llama3.2"}
    (tuned / "README.md").write_text("---\nlicense: other\nlicense_name: 'a: \U0001f600 1e3'\nlicense_link: L\n---\n")
    named = {"license": "other", "license_name": "a: \U0001f600 1e3", "license_link": "L"}
    assert licence([tuned, base]) == named
    assert read(front_matter("t", [("tuned", tuned)], merged=False)).items() > named.items()
    (tmp_path / "stolen.md").write_text("---\nlicense: mit\n---\n")
    (tuned / "README.md").unlink()
    (tuned / "README.md").symlink_to(tmp_path / "stolen.md")
    assert licence([tuned]) == {"license": "unknown"}


@pytest.mark.parametrize(
    "card",
    [
        "# no front matter",
        "---\nlicense: [a, b]\n---\n",
        "---\nlicense: 'Mine, all mine: yes'\n---\n",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        "---\n{ : [\n---\n",
        "---\n- a\n---\n",
        "",
        "\x00",
    ],
)
def test_cards_that_tell_no_licence_leave_it_open(folders: tuple[Path, Path], card: str) -> None:
    tuned, _ = folders
    (tuned / "README.md").write_text(card)
    assert licence([tuned]) == {"license": "unknown"}
    (tuned / "LICENSE.txt").write_text("terms")
    other = {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE.txt"}
    assert licence([tuned]) == other
    assert {key: read(front_matter("t", [("tuned", tuned)], merged=False))[key] for key in other} == other


def test_a_name_is_one_cell_of_a_table() -> None:
    assert plain("a | b\n`c`") == "a \\| b 'c'"
