from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from rlheals import profile
from rlheals.errors import UserError
from rlheals.profile import current_profile, preset_names, preset_summary, render, write_profile


def read(text: str) -> dict:
    return YAML(typ="safe").load(text)


def comments(text: str) -> dict[str, str]:
    """Key → comment beside it (the last one where a key occurs twice)."""
    return dict(re.findall(r"^ *(\w+):.*?\s# (.*)$", text, flags=re.MULTILINE))


def test_presets_are_listed_from_small_to_large_with_a_summary() -> None:
    assert preset_names() == ["smoke", "mini", "mini-confirm", "paper"]
    assert all(preset_summary(name) for name in preset_names())


def test_a_preset_changes_what_it_names_and_nothing_else() -> None:
    mini, confirm = read(render("mini").text), read(render("mini-confirm").text)
    assert confirm.pop("seeds") == [0, 1, 2]
    assert confirm.pop("profile") == "mini-confirm"
    assert set(confirm["ppo"].pop("arms")) > set(mini["ppo"].pop("arms")), "the controls beside PPO"
    assert confirm == {key: value for key, value in mini.items() if key not in {"seeds", "profile"}}


def test_null_in_a_patch_removes_a_key() -> None:
    assert set(read(render("paper").text)["model"]) == {"llama-11b", "qwen-7b"}


def test_the_paper_preset_holds_the_paper_settings() -> None:
    sft = read(render("paper").text)["sft"]
    assert sft["ood_loss_target"] == "paper_mismatched"
    assert sft["batch_size"] * sft["accumulation"] == 64
    assert (sft["learning_rate"], sft["schedule"], sft["warmup_steps"]) == (1e-6, "paper_log_warmup", 376)
    assert (sft["adam_betas"], sft["adam_epsilon"], sft["weight_decay"]) == ([0.9, 0.98], 1e-7, 0.0)
    assert {90, 140, 1100, 1600} <= set(sft["checkpoints"])


def test_model_names_have_no_dot_since_dvc_reads_dots_as_levels() -> None:
    assert not [name for preset in preset_names() for name in read(render(preset).text)["model"] if "." in name]


@pytest.mark.parametrize("name", preset_names())
def test_comments_survive_in_every_preset(name: str) -> None:
    kept, original = comments(render(name).text), comments(render("mini").text)
    assert kept["schedule"] == original["schedule"]
    assert kept["temperature"].startswith("0 is greedy")


def test_override_sets_one_value_and_keeps_the_rest_of_the_text() -> None:
    before, after = render("mini").text.splitlines(), render("mini", ["sft.learning_rate=5e-4"]).text.splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert read(changed[0][1])["learning_rate"] == pytest.approx(5e-4)
    assert changed[0][1].split("#")[1] == changed[0][0].split("#")[1]


@given(
    st.integers(0, 10**6), st.floats(1e-9, 1e3), st.lists(st.integers(0, 10**4), min_size=1, max_size=5, unique=True)
)
def test_overrides_are_read_back_as_given(target: int, rate: float, seeds: list[int]) -> None:
    text = render("mini", [f"task.target={target + 1}", f"base.learning_rate={rate!r}", f"seeds={seeds}"]).text
    values = read(text)
    assert (values["task"]["target"], values["base"]["learning_rate"], values["seeds"]) == (target + 1, rate, seeds)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("base.mixture.read=0.9", "base.mixture: the shares sum to 1.8"),
        ("sft.lr=1e-3", "did you mean sft.learning_rate"),
        ("sft.stepz=3", "did you mean sft.steps"),
        ("learning_rate=1", "did you mean sft.learning_rate"),
        ("zzzz=1", "zzzz is not a known key"),
        ("sft.steps", "not of the form key=value"),
        ("sft.steps=[1", "not valid YAML"),
        ("sft.steps=-3", "sft.steps"),
        ("sft.checkpoints=[0,5000]", "holds 5000"),
        ("model.tiny.dtype.deep=1", "is a value, not a block"),
        ("model.tiny.colour=red", "model.tiny.colour is not a known key"),
    ],
)
def test_bad_overrides(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        render("mini", [override])


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean mini"):
        render("minni")
    with pytest.raises(UserError, match="smoke, mini, mini-confirm, paper"):
        render("gigantic")


def test_engine_auto_is_resolved_with_a_reason() -> None:
    rendered = render("mini", ["inference.engine=auto"])
    assert read(rendered.text)["inference"]["engine"] == "transformers"
    assert any("auto became transformers, because" in note for note in rendered.notes)


def test_write_keeps_a_copy_of_a_hand_edit_only(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    assert write_profile(render("mini").text, path) is None
    assert write_profile(render("smoke").text, path) is None, "an untouched preset needs no copy"
    edited = path.read_text().replace("target: 24 ", "target: 36 ")
    path.write_text(edited)
    backup = write_profile(render("mini").text, path)
    assert backup is not None
    assert backup.read_text() == edited
    path.write_text("second edit")
    second = write_profile(render("mini").text, path)
    assert [each.name for each in (backup, second) if each] == ["params.before-1.yaml", "params.before-2.yaml"]
    assert (backup.read_text(), second and second.read_text()) == (edited, "second edit")
    assert current_profile(path) == "mini"
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["params.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.yaml"
    write_profile(render("mini").text, path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="disk is full"):
        write_profile(render("smoke").text, path)
    assert current_profile(path) == "mini"


def test_writing_into_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; create it first"):
        write_profile("x", tmp_path / "nowhere" / "params.yaml")


@pytest.mark.parametrize("text", [None, "a: [1", "- 1", "profile: 3", "\x00"])
def test_current_profile_of_something_else_is_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    assert current_profile(path) is None


def test_every_preset_file_is_a_patch_of_known_keys() -> None:
    mini = set(profile._paths(profile._load(profile._preset_text("mini"))))
    for name in preset_names():
        for path in profile._paths(profile._load(profile._preset_text(name))):
            assert path in mini or path.startswith(profile.OPEN_BLOCKS), f"{name}: {path}"
