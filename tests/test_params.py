from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from rlheals.errors import UserError
from rlheals.params import Architecture, ModelSpec, Params, load_params, parse_params
from rlheals.profile import preset_names, render
from rlheals.tasks import task_names, task_spec_model

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
BLOCK_OF_FIELD = {"model": ModelSpec, "architecture": Architecture}


def content(**changes: Any) -> dict[str, Any]:
    """The mini params with changes given as ``block__key=value``."""
    raw = YAML(typ="safe").load(render("mini").text)
    for path, value in changes.items():
        *parents, last = path.split("__")
        block = raw
        for parent in parents:
            block = block[parent]
        block[last] = value
    return raw


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(raw)
    return str(caught.value)


def block_of(name: str, annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that describes a field, if it is a block."""
    if name in BLOCK_OF_FIELD:
        return BLOCK_OF_FIELD[name]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def schema_keys(model: type[BaseModel]) -> Iterator[str]:
    """Names of all keys of the schema, of blocks and of values; the task block by each registered task."""
    for name, field in model.model_fields.items():
        yield name
        inner = block_of(name, field.annotation)
        if inner is not None:
            yield from schema_keys(inner)
    if model is Params:
        for task in task_names():
            yield from schema_keys(task_spec_model(task))


def value_keys(model: type[BaseModel]) -> set[str]:
    """Names of the keys that hold values rather than blocks."""
    names = {name for name, field in model.model_fields.items() if block_of(name, field.annotation) is None}
    for name, field in model.model_fields.items():
        inner = block_of(name, field.annotation)
        names |= value_keys(inner) if inner else set()
    return names


def test_committed_params_are_the_mini_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == render("mini").text
    assert load_params(ROOT / "params.yaml").profile == "mini"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_short_and_documented(name: str) -> None:
    text = render(name).text
    assert parse_params(YAML(typ="safe").load(text)).profile == name
    lines = text.splitlines()
    assert len(lines) < 150
    documented = {line.split(":")[0].strip() for line in lines if "# " in line and ":" in line.split("#")[0]}
    used = {line.split(":")[0].strip() for line in lines if ":" in line.split("#")[0]}
    optional = {"architecture"} if "architecture" not in used else set()
    expected = (value_keys(Params) | value_keys(task_spec_model("general_points"))) - {"task"}
    if optional:
        expected -= set(Architecture.model_fields) | optional
    assert expected - documented == set(), "keys without a comment where they stand"


def test_every_key_is_read_by_the_code() -> None:
    attributes = {
        node.attr
        for path in (ROOT / "rlheals").rglob("*.py")
        if path.name != "params.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    # Matrix lists and resources are read by dvc.yaml.
    pipeline = set(re.findall(r"\w+", " ".join(re.findall(r"\$\{([\w.]+)\}", (ROOT / "dvc.yaml").read_text()))))
    unused = {key for key in schema_keys(Params) if key not in attributes | pipeline}
    assert unused == set()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sft__learning_rat", "did you mean sft.learning_rate?"),
        ("modle", "did you mean model?"),
        ("dataset__probe__selct", "did you mean dataset.probe.select?"),
        ("task__trget", "did you mean task.target?"),
        ("model__tiny__dtyp", "did you mean model.tiny.dtype?"),
        ("model__tiny__architecture__layer", "did you mean model.tiny.architecture.layers?"),
    ],
)
def test_unknown_key_names_the_nearest(path: str, expected: str) -> None:
    told = message(content(**{path: 1}))
    assert path.replace("__", ".") in told
    assert expected in told


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sft__checkpoints": [0, 5, 99999]}, ["params.yaml", "sft.checkpoints", "99999", "only steps 0 to"]),
        ({"sft__checkpoints": [5, 0]}, ["sft.checkpoints", "strictly increasing"]),
        ({"sft__learning_rate": "fast"}, ["sft.learning_rate", "'fast'"]),
        ({"sft__steps": 0}, ["sft.steps"]),
        ({"sft__steps": True}, ["sft.steps", "True"]),
        ({"sft__learning_rate": True}, ["sft.learning_rate", "True"]),
        ({"sft__learning_rate": 0}, ["sft.learning_rate", "greater than 0"]),
        ({"base__learning_rate": -1e-3}, ["base.learning_rate", "greater than 0"]),
        ({"base__learning_rate": float("inf")}, ["base.learning_rate", "finite"]),
        ({"sft__gradient_checkpointing": 1}, ["sft.gradient_checkpointing"]),
        ({"sft__checkpoints": []}, ["sft.checkpoints", "at least 1"]),
        ({"sft__checkpoints": [False, 5]}, ["sft.checkpoints.0"]),
        ({"sft__warmup_steps": -1}, ["sft.warmup_steps"]),
        ({"base__warmup_steps": -1}, ["base.warmup_steps"]),
        ({"sft__weight_decay": -0.1}, ["sft.weight_decay"]),
        ({"base__weight_decay": -0.1}, ["base.weight_decay"]),
        ({"sft__adam_betas": [0.9, 1.0]}, ["sft.adam_betas.1"]),
        ({"sft__adam_betas": [0.9]}, ["sft.adam_betas"]),
        ({"sft__adam_epsilon": 0}, ["sft.adam_epsilon"]),
        ({"inference__temperature": -0.1}, ["inference.temperature"]),
        ({"inference__temperature": 0.005}, ["inference.temperature", "0, which is greedy, or from 0.01 to 2"]),
        ({"inference__temperature": 2.5}, ["inference.temperature", "from 0.01 to 2"]),
        ({"inference__stop": ["}", "a\ufffd"]}, ["inference.stop.1", "holds U+FFFD"]),
        ({"inference__stop": [""]}, ["inference.stop.0"]),
        ({"inference__top_p": 0}, ["inference.top_p"]),
        ({"inference__top_k": -1}, ["inference.top_k"]),
        ({"seeds": []}, ["seeds", "at least 1"]),
        ({"seeds": [0, -1]}, ["seeds.1"]),
        ({"seeds": [3, 4, 3]}, ["seeds", "3 twice"]),
        ({"seeds": [2**32]}, ["seeds.0"]),
        ({"models": []}, ["models", "at least 1"]),
        ({"models": ["tiny", "tiny"]}, ["models", "'tiny' twice"]),
        ({"base__mixture": {"read": 0.5}}, ["base.mixture", "sum to 0.5, not 1"]),
        ({"base__mixture": {"read": 1.5, "solve": -0.5}}, ["base.mixture.solve"]),
        (
            {"model__tiny__architecture__heads": 3},
            ["model.tiny.architecture.heads", "divide hidden_size, which is 128"],
        ),
        ({"model__tiny__architecture__kv_heads": 3}, ["model.tiny.architecture.kv_heads", "divide heads, which is 4"]),
        ({"inference__engine": "auto"}, ["inference.engine", "transformers", "'auto'"]),
        ({"models": ["tiny", "large"]}, ["'large'", "no block under model"]),
        ({"model__tiny__source": "models/somewhere"}, ["model.tiny", "architecture"]),
        ({"task__name": "chess"}, ["'chess'", "general_points"]),
        ({"task__target": "many"}, ["task.target"]),
        ({"profile": "../escape"}, ["profile"]),
    ],
)
def test_wrong_values_are_told_by_key(changes: dict[str, Any], parts: list[str]) -> None:
    told = message(content(**changes))
    for part in parts:
        assert part in told
    assert "\n" not in told


def test_whole_numbers_serve_as_shares_and_rates() -> None:
    params = parse_params(content(inference__temperature=1, sft__adam_betas=[0, 0.5], base__mixture={"read": 1}))
    assert (params.inference.temperature, params.sft.adam_betas, params.base.mixture) == (
        1.0,
        (0.0, 0.5),
        {"read": 1.0},
    )


def test_mistyped_key_is_told_before_the_key_it_replaces() -> None:
    raw = content(sft__learning_rat=1.0)
    del raw["sft"]["learning_rate"]
    assert "sft.learning_rat is not a known key; did you mean sft.learning_rate?" in message(raw)


def test_missing_key_is_named() -> None:
    raw = content()
    del raw["sft"]["steps"]
    assert "sft.steps is missing" in message(raw)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_files_that_are_not_params(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_params(path)


def test_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist here; run `python -m rlheals\.profile mini`"):
        load_params(tmp_path / "params.yaml")
