"""The task as the rest of the project sees it: parameters, tables, episodes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from rlheals.errors import UserError
from rlheals.params import load_params
from rlheals.reporting.schemas import check
from rlheals.tasks import CONDITIONS, DatasetSizes, Task, TaskData, make_task, task_spec_model
from rlheals.tasks.general_points.leakage import leakage_report
from rlheals.tasks.general_points.splits import Splits
from rlheals.tasks.general_points.verifier import verify

SPEC_MODEL = task_spec_model("general_points")
PAPER: dict[str, Any] = SPEC_MODEL.paper().model_dump()
SIZES = DatasetSizes(sft_rows=600, rl_prompts=200, select=40, confirm=60, loss_rows=20)
TABLES = ("hands", "sft", "rl_prompts", "probes", "loss_sets")


def task(**changes: Any) -> Task:
    return make_task(SPEC_MODEL.model_validate(PAPER | changes))


@pytest.fixture(scope="module")
def data() -> TaskData:
    return task().build("compact", SIZES, 0)


@pytest.fixture(scope="module")
def paper_data() -> TaskData:
    return task().build("paper", SIZES, 0)


def test_the_protocol_is_met_and_the_preset_is_valid(request: pytest.FixtureRequest):
    assert isinstance(task(), Task)
    preset = request.config.rootpath / "rlheals" / "presets" / "mini.yaml"
    assert set(load_params(preset).task) == set(PAPER)


@pytest.mark.parametrize(
    "changes",
    [
        {"cards": 2},
        {"cards": 7},
        {"target": 0},
        {"deck": "tarot"},
        {"held_out": 0},
        {"held_out": 1},
        {"reserved": 1.5},
        {"training_rule": {"J": 10, "Q": 10}},
        {"training_rule": {"J": 0, "Q": 10, "K": 10}},
        {"training_rule": {"J": 10, "Q": 10, "K": 10, "Z": 1}},
        {"training_rule": {"J": 11, "Q": 12, "K": 13}},
        {"fidelity": "loose"},
        {"feedback": "loud"},
        {"attempts": 0},
        {"jokers": 2},
    ],
)
def test_bad_parameters_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValidationError):
        SPEC_MODEL.model_validate(PAPER | changes)


def test_missing_parameter_is_refused():
    with pytest.raises(ValidationError, match="reserved"):
        SPEC_MODEL.model_validate({key: value for key, value in PAPER.items() if key != "reserved"})


def test_sizes_and_schemas(data: TaskData):
    for name in TABLES:
        check(getattr(data, name), name)
    assert (data.sft.height, data.rl_prompts.height, data.hands.height) == (600, 200, 1820)
    counts = {(c, s): rows for c, s, rows in data.probes.group_by("condition", "split").len().iter_rows()}
    assert counts == {(c, s): n for c in CONDITIONS for s, n in (("select", 40), ("confirm", 60))}
    assert dict(data.loss_sets.group_by("series").len().iter_rows()) == {"train_id": 20, "test_id": 20, "ood": 20}


def test_hands_table(data: TaskData):
    assert data.hands["solvable"].sum() == 1362
    assert data.hands["expressible"].sum() == 1344
    assert (data.hands["solutions"] > 0).equals(data.hands["solvable"].rename("solutions"))
    assert 0.2 < data.hands["held_out"].mean() < 0.3  # type: ignore[operator]


def held_out_keys(data: TaskData) -> set[str]:
    return set(data.hands.filter("held_out")["hand_key"])


def multiset(cards: str, faces: dict[str, int]) -> str:
    values = {"A": 1} | faces
    return ",".join(map(str, sorted(values.get(card) or int(card) for card in cards.split())))


def test_training_rows_hold_no_held_out_multiset_and_no_probed_hand(data: TaskData):
    # Recomputed from the cards, not from the tables' own keys.
    training = [*data.sft["hand_id"], *data.rl_prompts["hand_id"]]
    keys = {multiset(cards, {"J": 10, "Q": 10, "K": 10}) for cards in training}
    assert not keys & held_out_keys(data)
    unseen = set(data.probes.filter(pl.col("condition") == "id")["hand_id"])
    unseen |= set(data.loss_sets.filter(pl.col("series") == "test_id")["hand_id"])
    assert not unseen & set(training)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_probe_conditions(data: TaskData, condition: str):
    rows = data.probes.filter(pl.col("condition") == condition)
    assert rows["hand_id"].n_unique() == rows.height
    faces = {"J": 11, "Q": 12, "K": 13} if condition.startswith("ood") else {"J": 10, "Q": 10, "K": 10}
    held_out = held_out_keys(data)
    for cards, key, prompt, item in rows.select("hand_id", "hand_key", "prompt", "item").iter_rows():
        assert key == multiset(cards, faces)
        assert (key in held_out) == condition.endswith("heldout")
        assert prompt.endswith(f": {cards}")
        assert f"J {faces['J']} Q" in prompt
        assert json.loads(item) == {"cards": cards.split(), "rule": condition.removesuffix("_heldout")}
        if condition.startswith("ood"):
            assert any(face in cards for face in "JQK")


@pytest.mark.parametrize("prompt_format", ["compact", "paper"])
def test_completions_solve_their_hand(prompt_format: str, data: TaskData, paper_data: TaskData):
    tables = data if prompt_format == "compact" else paper_data
    spec = task().spec
    for cards, completion in tables.sft.select("hand_id", "completion").iter_rows():
        verdict = verify(completion, cards.split(), spec.rule("id"), prompt_format)
        assert verdict.solved
        assert verdict.fields_ok
    for series, cards, completion in tables.loss_sets.select("series", "hand_id", "completion").iter_rows():
        rule = spec.rule("ood" if series.startswith("ood") else "id")
        assert verify(completion, cards.split(), rule, prompt_format).solved


def test_tables_are_a_function_of_the_seed(data: TaskData):
    again, other = task().build("compact", SIZES, 0), task().build("compact", SIZES, 1)
    for name in TABLES:
        assert getattr(data, name).equals(getattr(again, name))
        assert not getattr(data, name).equals(getattr(other, name))
    assert data.leakage == again.leakage


def test_longer_tables_begin_with_the_shorter_ones(data: TaskData):
    longer = task().build("compact", DatasetSizes(900, 300, 40, 60, 20), 0)
    assert longer.sft.head(600).equals(data.sft)
    assert longer.probes.equals(data.probes)


def test_formats_share_every_hand_both_can_express(data: TaskData, paper_data: TaskData):
    expressible = set(data.hands.filter("expressible")["hand_key"])
    shared = [(h, k) for h, k in paper_data.sft.select("hand_id", "hand_key").iter_rows() if k in expressible]
    assert len(shared) > 550
    assert shared == data.sft.select("hand_id", "hand_key").rows()[: len(shared)]
    assert paper_data.leakage["excluded"]["solvable value multisets without an expressible solution"] == 0
    assert data.leakage["excluded"]["solvable value multisets without an expressible solution"] == 18
    assert data.leakage["excluded"]["draws dropped"]["sft"] > 0


def test_the_paper_s_mismatched_loss_rows_have_the_same_hands(paper_data: TaskData):
    series = {name: paper_data.loss_sets.filter(pl.col("series") == name) for name in ("ood", "ood_mismatched")}
    assert series["ood"]["hand_id"].equals(series["ood_mismatched"]["hand_id"])
    assert all(text.endswith('=24",\n}') for text in series["ood"]["completion"])
    assert not any("=" in text or text.endswith(",\n}") for text in series["ood_mismatched"]["completion"])


def test_leakage_report(data: TaskData):
    assert set(data.leakage) == {"counts", "overlaps", "information", "excluded"}
    assert data.leakage["overlaps"]
    assert not any(data.leakage["overlaps"].values())
    assert data.leakage["counts"]["sft rows"] == 600
    seen = set(data.sft["hand_id"]) | set(data.rl_prompts["hand_id"])
    asked = data.probes.filter(pl.col("condition") == "ood")["hand_id"].to_list()
    shares = data.leakage["information"]["share_of_ood_probe_hands_whose_symbols_occur_in_training"]
    assert shares["ood"] == pytest.approx(sum(hand in seen for hand in asked) / len(asked))


@pytest.mark.parametrize("leak", ["held-out key", "probed hand", "rl prompt", "split", "loss"])
def test_an_injected_leak_is_refused(data: TaskData, leak: str):
    tables = {name: getattr(data, name) for name in TABLES}
    heldout = data.probes.filter(pl.col("condition") == "ood_heldout").row(0, named=True)
    known = data.probes.filter(pl.col("condition") == "id").row(0, named=True)
    extra = {"row_id": 600, "hand_id": known["hand_id"], "hand_key": "1,1,1,1", "prompt": "", "completion": ""}
    if leak == "held-out key":
        extra |= {"hand_id": "A A A A", "hand_key": heldout["hand_key"]}
    if leak in ("held-out key", "probed hand"):
        tables["sft"] = pl.concat([data.sft, pl.DataFrame([extra], schema=data.sft.schema)])
    elif leak == "rl prompt":
        row = {"row_id": 0, "hand_id": known["hand_id"], "hand_key": "1,1,1,1", "prompt": "", "item": ""}
        tables["rl_prompts"] = pl.concat([data.rl_prompts, pl.DataFrame([row], schema=data.rl_prompts.schema)])
    elif leak == "split":
        twice = data.probes.head(1).with_columns(split=pl.lit("confirm"))
        tables["probes"] = pl.concat([data.probes, twice])
    else:
        row = {"series": "test_id", "hand_id": known["hand_id"], "prompt": "", "completion": ""}
        tables["loss_sets"] = pl.concat([data.loss_sets, pl.DataFrame([row], schema=data.loss_sets.schema)])
    with pytest.raises(UserError, match="leak"):
        leakage_report(*(tables[name] for name in TABLES))


@pytest.mark.parametrize("cards", [3, 4, 6])
def test_impossible_task_names_the_target(cards: int):
    with pytest.raises(UserError, match=r"task\.target is 1000000000"):
        task(cards=cards, target=10**9).build("compact", SIZES, 0)


def test_too_small_a_pool_is_one_sentence():
    with pytest.raises(
        UserError, match=r"dataset\.probe asks for 2220 different id hands, but only \d+ turned up"
    ) as error:
        task(cards=3).build("paper", DatasetSizes(10, 10, 1000, 1200, 20), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"cards": 3}, {"cards": 5}, {"deck": "broad", "replacement": False}, {"target": 36}]
)
def test_other_games_build(changes: dict[str, Any]):
    built = task(**changes).build("paper", DatasetSizes(30, 10, 5, 5, 3), 2)
    assert built.sft.height == 30
    cards = {len(hand.split()) for hand in built.sft["hand_id"]}
    assert cards == {changes.get("cards", 4)}
    assert not any(built.leakage["overlaps"].values())


def test_hashed_splits_do_not_depend_on_each_other_or_on_the_format():
    spec = task().spec
    splits = [Splits(spec, task().format(name), 7) for name in ("compact", "paper")]
    keys = [f"{a},{b}" for a, b in pairwise(range(2000))]
    assert [splits[0].is_held_out(key) for key in keys] == [splits[1].is_held_out(key) for key in keys]
    held_out = sum(splits[0].is_held_out(key) for key in keys) / len(keys)
    reserved = sum(splits[0].is_reserved(key) for key in keys) / len(keys)
    both = sum(splits[0].is_held_out(key) and splits[0].is_reserved(key) for key in keys) / len(keys)
    assert (held_out, reserved, both) == pytest.approx((0.25, 0.2, 0.05), abs=0.03)


def test_episodes_play_the_items_of_the_tables(data: TaskData):
    game = task()
    row = data.probes.filter(pl.col("condition") == "ood_heldout").row(0, named=True)
    episode = game.episode(row["item"], "compact", 2, "neutral")
    assert episode.prompt == row["prompt"]
    form = game.format("compact")
    cards = row["hand_id"].split()
    rule = game.spec.rule("ood")
    solution = form.canonical_solution(rule.values(cards), 24)
    assert episode.step("")
    assert episode.step(form.response(cards, rule, solution)).solved


@pytest.mark.parametrize(
    "item", ["", "[]", '{"cards": ["A"]}', '{"cards": ["A"], "rule": "test"}', '{"cards": ["?"], "rule": "id"}']
)
def test_bad_items_are_refused(item: str):
    with pytest.raises(UserError):
        task().episode(item, "compact", 1, "none")


def test_unknown_format_is_named():
    with pytest.raises(UserError, match="prompt_format 'poem'"):
        task().build("poem", SIZES, 0)


def test_compact_format_refuses_rules_its_prompt_cannot_state():
    ood = {"J": 10, "Q": 10, "K": 10, "A": 11}
    with pytest.raises(UserError, match="rules give a value to A"):
        task(ood_rule=ood).format("compact")
    assert task(ood_rule=ood).format("paper").name == "paper"


def test_target_the_format_cannot_write_is_named_at_once():
    # 168 = 14 * 12 is reachable, but compact results end at 144.
    with pytest.raises(UserError, match=r"task\.target is 168, but the compact format"):
        task(target=168).build("compact", DatasetSizes(8, 8, 4, 4, 2), 0)


def test_rows_may_outnumber_the_different_hands():
    splits = Splits(task().spec, task().format("compact"), 0)
    assert len(splits.hands("sft", 200_000, distinct=False, key="dataset.sft_rows")) == 200_000
