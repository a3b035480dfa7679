from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import polars as pl
import pytest
import torch

from rlheals import cli
from rlheals.commands.eval import _check_weights
from rlheals.errors import UserError
from rlheals.inference.server import ServerEngine
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model, load_tokenizer, save_model
from rlheals.models.tiny import tiny_llama, tiny_tokenizer
from rlheals.params import Architecture
from rlheals.publish import MANIFEST, verify
from rlheals.reporting.schemas import read_table
from rlheals.tasks import make_task
from rlheals.tasks.general_points import GeneralPointsSpec
from tests.fake_server import running, serving

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that speaks the compact format."""
    folder = tmp_path_factory.mktemp("models") / "checkpoint-30"
    folder.mkdir()
    task = make_task(GeneralPointsSpec.paper())
    tokenizer = tiny_tokenizer(task.vocabulary(), **task.special_words())
    shape = Architecture(
        hidden_size=32, layers=1, heads=1, kv_heads=1, intermediate_size=32, max_position_embeddings=320
    )
    torch.manual_seed(0)
    save_model(tiny_llama(shape, tokenizer), tokenizer, folder)
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", *arguments])
    return int(stopped.value.code or 0)


def test_writes_every_answer_and_reports_both_conditions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert run(str(model), "--n", "6", "--attempts", "2", "--json", "--output", str(target)) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["dtype"], told["output"]) == ("compact", "float32", str(target))
    cells = [(row["condition"], row["attempts"], row["n"]) for row in told["results"]]
    assert cells == [("id", 1, 6), ("id", 2, 6), ("ood", 1, 6), ("ood", 2, 6)]
    assert all(row["wilson_low"] <= row["accuracy"] <= row["wilson_high"] for row in told["results"])
    assert set(verify(target)) == {"answers.parquet", "probe_summary.parquet"}
    answers = read_table(target / "answers.parquet", "answers")
    assert answers.filter(pl.col("attempt") == 1).height == 12
    assert answers["checkpoint_step"].unique().to_list() == [30]


def test_shows_a_table_and_names_the_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(model), "--n", "3", "--format", "compact", "--output", str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "compact prompts, float32, greedy" in out
    assert "95 %" in out
    assert out.rstrip().endswith("answers.parquet")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--probe", "chess"], "use one of: general_points"),
        (["--engine", "vlm"], "is 'vlm', which is not a known engine; use one of: transformers, vllm, or the address"),
        (["--format", "paper", "--n", "2"], "do not fit into the context"),
    ],
)
def test_bad_input_exits_2(model: Path, tmp_path: Path, capsys, options: list[str], expected: str) -> None:
    target = tmp_path / "out"
    assert run(str(model), *options, "--output", str(target)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not target.exists()


def test_a_folder_with_other_files_is_left_alone_and_told_before_probing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlheals.commands.eval._probe", lambda *_: pytest.fail("probed for nothing"))
    (tmp_path / "mine").write_text("x")
    assert run(str(model), "--n", "2", "--output", str(tmp_path)) == 2
    assert "is not replaced; name another folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


def test_a_folder_that_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path)) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_a_broken_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert run(str(tmp_path)) == 2
    assert "is not valid JSON" in capsys.readouterr().err


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("others") / "checkpoint-40"
    shutil.copytree(model, folder)
    loaded = load_model(model)
    with torch.no_grad():
        loaded.get_output_embeddings().weight.mul_(2)
    save_model(loaded, load_tokenizer(model), folder)
    return folder


def test_an_engine_that_reads_its_weights_itself_must_have_those_of_the_folder(
    model: Path, other: Path, tmp_path: Path
) -> None:
    """As vLLM does, which takes damaged weights without a word."""

    class Reader(TransformersEngine):
        name = "vllm"

    class Deaf(Reader):
        def swap(self, state_dict: Mapping[str, torch.Tensor]) -> None:
            """Keep the old weights in silence."""

    tokenizer = load_tokenizer(model)
    _check_weights(Reader(load_model(other), tokenizer, 4), model, "float32")
    with pytest.raises(UserError, match="does not answer with these weights"):
        _check_weights(Deaf(load_model(other), tokenizer, 4), model, "float32")
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / MANIFEST).write_text(json.dumps({"model.safetensors": "0" * 64}))
    with pytest.raises(UserError, match="corrupted"):
        _check_weights(Reader(load_model(model), tokenizer, 4), damaged, "float32")


def test_a_server_answers_as_the_machine_at_hand_does(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running() as start:
        address = start(serving(model)).url
        for engine in (address, "transformers"):
            target = str(tmp_path / engine[:4])
            assert run(str(model), "--n", "2", "--engine", engine, "--output", target, "--json") == 0
            assert json.loads(capsys.readouterr().out)["engine"] == engine
    found, expected = (read_table(tmp_path / name / "answers.parquet", "answers") for name in ("http", "tran"))
    assert set(found["engine"]) == {"server"}
    assert found.drop("engine").equals(expected.drop("engine"))


def test_a_server_of_another_model_is_asked_no_hand(
    model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerEngine, "generate", lambda *_: pytest.fail("a hand was asked"))
    with running() as start:
        target = tmp_path / "out"
        assert run(str(other), "--engine", start(serving(model)).url, "--output", str(target)) == 2
    assert f"server serves other weights than {other}" in capsys.readouterr().err
    assert not target.exists()
