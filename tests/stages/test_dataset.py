from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from ruamel.yaml import YAML

from rlheals.errors import UserError
from rlheals.params import Params, parse_params
from rlheals.profile import render
from rlheals.publish import verify
from rlheals.reporting.schemas import read_table
from rlheals.stages.common import Run
from rlheals.stages.dataset import TABLES, dataset, sizes, write
from rlheals.tasks import make_task

if TYPE_CHECKING:
    from pathlib import Path


def smoke(**task: Any) -> Params:
    raw = YAML(typ="safe").load(render("smoke").text)
    raw["task"] |= task
    return parse_params(raw)


def published(root: Path, params: Params, seed: int = 0) -> Path:
    run = Run(params, "tiny", seed, root)
    dataset(run)
    return run.output("dataset")


def test_sizes_follow_params() -> None:
    block = smoke().dataset
    built = sizes(block)
    assert (built.sft_rows, built.rl_prompts, built.loss_rows) == (block.sft_rows, block.rl_prompts, block.loss_rows)
    assert (built.select, built.confirm) == (block.probe.select, block.probe.confirm)


def test_publishes_every_table_with_its_schema(tmp_path: Path) -> None:
    params = smoke()
    target = published(tmp_path, params)
    assert set(verify(target)) == {f"{name}.parquet" for name in TABLES} | {"leakage.json"}
    tables = {name: read_table(target / f"{name}.parquet", name) for name in TABLES}
    assert tables["sft"].height == params.dataset.sft_rows
    per_condition = tables["probes"].group_by("condition", "split").len()
    expected = {"select": params.dataset.probe.select, "confirm": params.dataset.probe.confirm}
    assert all(row["len"] == expected[row["split"]] for row in per_condition.to_dicts())
    assert json.loads((target / "leakage.json").read_text())


def test_no_probe_hand_is_a_training_hand(tmp_path: Path) -> None:
    target = published(tmp_path, smoke())
    training = set(read_table(target / "sft.parquet", "sft")["hand_id"])
    training |= set(read_table(target / "rl_prompts.parquet", "rl_prompts")["hand_id"])
    probes = read_table(target / "probes.parquet", "probes").filter(pl.col("condition").is_in(["id", "id_heldout"]))
    assert training.isdisjoint(probes["hand_id"])


def test_same_seed_same_bytes_other_seed_other_hands(tmp_path: Path) -> None:
    one, again = published(tmp_path / "a", smoke()), published(tmp_path / "b", smoke())
    other = published(tmp_path / "a", smoke(), seed=1)
    assert verify(one) == verify(again)
    assert verify(one)["sft.parquet"] != verify(other)["sft.parquet"]


def test_impossible_task_is_told_and_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="999983"):
        published(tmp_path, smoke(target=999983))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_table_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    params = smoke()
    data = make_task(params.task_spec).build("compact", sizes(params.dataset), 0)
    object.__setattr__(data, "sft", data.sft.drop("prompt"))
    with pytest.raises(UserError, match="missing prompt"):
        write(data, tmp_path)
