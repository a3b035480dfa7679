"""The stages dataset, base, sft and probe_sft end to end on random models with real chat templates."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from safetensors.torch import load_file

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import Dialogue
from rlheals.evaluation.probes import Prober
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.publish import verify
from rlheals.reporting.schemas import read_table
from rlheals.stages.base import base
from rlheals.stages.common import Run
from rlheals.stages.dataset import dataset
from rlheals.stages.probe_sft import probe_sft
from rlheals.stages.sft import loss_sets, sft
from tests.common import make_folder, make_params
from tests.fake_server import running, serving

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

RUNGS = [0, 1, 3]
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1280, "max_position_embeddings": 2048}


def params(source: Path, *more: str) -> Params:
    spec = {"source": str(source), "prompt_format": "paper", "dtype": "float32"}
    return make_params(
        "models=[real]",
        f"model={json.dumps({'real': spec})}",
        "compute.threads=1",
        "compute.device=cpu",
        "dataset.sft_rows=24",
        "dataset.rl_prompts=4",
        "dataset.loss_rows=2",
        "dataset.probe.select=1",
        "dataset.probe.confirm=2",
        "sft.steps=3",
        f"sft.checkpoints={RUNGS}",
        f"ppo.starts={RUNGS}",
        f"spectra.rl_start={RUNGS[-1]}",
        "sft.batch_size=2",
        "sft.max_length=1024",
        "sft.loss_every=2",
        "sft.state_every=2",
        "inference.batch_size=16",
        "probe_sft.confirm_attempts=2",
        *more,
    )


def run_stages(root: Path, family: str, **shape: int) -> Run:
    run = Run(params(make_folder(root / "folder", family, **shape)), "real", 0, root)
    for stage in (dataset, base, sft, probe_sft):
        stage(run)
    return run


@pytest.fixture(scope="module", params=[pytest.param("qwen2", marks=pytest.mark.slow), "llama"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_stages(tmp_path_factory.mktemp(request.param), request.param, **SHAPE)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For what does not depend on the family or the size."""
    return run_stages(tmp_path_factory.mktemp("smaller"), "llama", max_position_embeddings=2048)


def test_every_directory_is_published_whole_and_scratch_is_gone(finished: Run) -> None:
    for stage in ("dataset", "base", "sft", "probe_sft"):
        verify(finished.output(stage))
    assert [path for path in (finished.root / "scratch").rglob("*") if path.is_file()] == []


def test_the_models_have_about_five_million_parameters(finished: Run) -> None:
    count = load_model(finished.output("base")).num_parameters()
    assert 4e6 < count < 6e6, count


def test_every_rung_is_a_folder_of_its_own(finished: Run) -> None:
    ladder = finished.output("sft")
    assert sorted(path.name for path in ladder.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in RUNGS]
    for step in RUNGS:
        load_model(ladder / f"checkpoint-{step}")
        load_tokenizer(ladder / f"checkpoint-{step}")
    first, start = (
        load_file(path / "model.safetensors") for path in (ladder / "checkpoint-0", finished.output("base"))
    )
    assert all((first[name] == start[name]).all() for name in start)


def test_losses_and_training_tables(finished: Run) -> None:
    losses = read_table(finished.output("sft") / "losses.parquet", "losses")
    assert set(losses["series"]) == {"train_id", "test_id", "ood"}
    assert sorted(set(losses["step"])) == [0, 1, 2, 3]
    fallen = losses.filter(pl.col("series") == "train_id").sort("step")["nll_per_token"]
    assert fallen[-1] < fallen[0]
    assert read_table(finished.output("sft") / "training.parquet", "training").height == 3


def test_probe_tables(finished: Run) -> None:
    directory = finished.output("probe_sft")
    chosen = json.loads((directory / "selection.json").read_text())
    assert chosen["end"] == 3
    answers = read_table(directory / "answers.parquet", "answers")
    assert set(answers["checkpoint_step"]) == set(RUNGS)
    first = answers.filter(pl.col("attempt") == 1).group_by("split", "condition", "checkpoint_step").len()
    assert set(first.filter(split="select")["len"]) == {1}
    assert set(first.filter(split="confirm")["len"]) == {2}
    second = answers.filter(pl.col("attempt") == 2)
    assert set(second["checkpoint_step"]) == set(chosen.values())
    assert set(second["split"]) == {"confirm"}
    summary = read_table(directory / "probe_summary.parquet", "probe_summary")
    within = summary.filter(pl.col("attempts") == 2)
    assert set(within["checkpoint_step"]) == set(chosen.values())
    assert set(within["split"]) == {"confirm"}
    assert read_table(directory / "selection.parquet", "selection").height == 5
    read_table(directory / "losses.parquet", "losses")


def test_the_mismatched_ood_target_of_the_paper_is_another_text(finished: Run) -> None:
    speak = Dialogue(load_tokenizer(finished.output("base")))
    path = finished.output("dataset") / "loss_sets.parquet"
    same, mismatched = (loss_sets(speak, path, target) for target in ("same", "paper_mismatched"))
    assert {name for name in same if same[name] != mismatched[name]} == {"ood"}


def test_an_altered_ladder_is_not_probed(smaller: Run, tmp_path: Path) -> None:
    shutil.copytree(smaller.root / "data", tmp_path / "data")
    run = Run(smaller.params, "real", 0, tmp_path)
    file = run.output("sft") / "checkpoint-1" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    shutil.rmtree(run.output("probe_sft"))
    with pytest.raises(UserError, match=r"checkpoint-1/model.safetensors is corrupted"):
        probe_sft(run)
    assert not run.output("probe_sft").exists()


def test_a_probe_that_was_stopped_goes_on_where_it_was(
    smaller: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(smaller.root / "data", tmp_path / "data")
    run = Run(smaller.params, "real", 0, tmp_path)
    expected = (run.output("probe_sft") / "answers.parquet").read_bytes()
    shutil.rmtree(run.output("probe_sft"))
    ask, asked = Prober.answers, []

    def stop_at_fifth(self: Prober, rows: pl.DataFrame, *more: Any) -> pl.DataFrame:
        asked.append(len(rows))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, rows, *more)

    monkeypatch.setattr(Prober, "answers", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        probe_sft(run)
    assert not run.output("probe_sft").exists()
    probe_sft(run)
    assert len(asked) == 5 + 2  # two passes over three rungs: four were kept, two are asked again
    assert (run.output("probe_sft") / "answers.parquet").read_bytes() == expected


def test_a_server_answers_for_a_ladder_of_one_rung(smaller: Run, tmp_path: Path) -> None:
    shutil.copytree(smaller.root / "data", tmp_path / "data")
    served = Run(smaller.params, "real", 0, tmp_path).output("sft") / "checkpoint-3"
    with running() as start:
        address, one = start(serving(served)).url, ("sft.checkpoints=[3]", "ppo.starts=[3]")
        tables = []
        for engine in (address, "transformers"):
            run = Run(params(smaller.root / "folder", f"inference.engine={engine}", *one), "real", 0, tmp_path)
            shutil.rmtree(run.output("probe_sft"))
            probe_sft(run)
            tables.append(read_table(run.output("probe_sft") / "answers.parquet", "answers"))
        assert set(tables[0]["engine"]) == {"server"}
        assert tables[0].drop("engine").equals(tables[1].drop("engine"))


def test_a_server_is_refused_at_the_first_rung_that_it_does_not_hold(smaller: Run, tmp_path: Path) -> None:
    shutil.copytree(smaller.root / "data", tmp_path / "data")
    ladder = Run(smaller.params, "real", 0, tmp_path).output("sft")
    with running() as start:
        address = start(serving(ladder / "checkpoint-0")).url
        run = Run(params(smaller.root / "folder", f"inference.engine={address}"), "real", 0, tmp_path)
        shutil.rmtree(run.output("probe_sft"))
        with pytest.raises(
            UserError, match=rf"other weights than {ladder}/checkpoint-\d .* cannot be swapped; serve this"
        ):
            probe_sft(run)
    assert not run.output("probe_sft").exists()
