"""Loading: nothing missing, stale, corrupted or mislabelled gets into a report."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.publish import publish, write_manifest
from rlheals.reporting.schemas import read_table, write_table
from rlheals.reporting.tables import Choice, load_study, outcomes
from tests.reporting.fabricate import LADDER, make_params, make_project, make_run

HANDS = 12
RUN = "data/mini/probe_sft/tiny/0"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    make_project(root, make_params([0, 1]), HANDS)
    return root


@pytest.fixture
def project(pristine, tmp_path):
    """A private copy of a valid project with seeds 0 and 1."""
    return shutil.copytree(pristine, tmp_path / "project")


def test_valid_project_loads(project):
    study = load_study(make_params([0, 1]), project)
    assert study.runs == [("tiny", 0), ("tiny", 1)]
    assert set(study.summary["seed"]) == {0, 1}
    assert study.choices == [Choice("tiny", 0, 10, 320), Choice("tiny", 1, 10, 320)]


def test_missing_run_is_named(project):
    shutil.rmtree(project / RUN)
    with pytest.raises(UserError, match=r"probe_sft/tiny/0 is missing though params\.yaml declares"):
        load_study(make_params([0, 1]), project)


def test_nothing_at_all_is_a_missing_run(tmp_path):
    with pytest.raises(UserError, match="is missing though"):
        load_study(make_params(), tmp_path)


@pytest.mark.parametrize(("model", "seed"), [("tiny", 7), ("other", 0)])
def test_undeclared_run_is_stale(project, model, seed):
    make_run(project, "mini", model, seed, HANDS)
    with pytest.raises(UserError, match=rf"probe_sft/{model}/{seed} is stale.*remove it with `rlheals prune`"):
        load_study(make_params([0, 1]), project)


def test_runs_of_another_profile_do_not_matter(project):
    make_run(project, "smoke", "tiny", 9, HANDS)
    load_study(make_params([0, 1]), project)


def test_half_written_folders_are_not_runs(project):
    (project / "data/mini/probe_sft/tiny/.1.partial").mkdir()
    load_study(make_params([0, 1]), project)


def test_folder_that_is_no_seed(project):
    (project / "data/mini/probe_sft/tiny/copy of 0").mkdir()
    with pytest.raises(UserError, match="is not the folder of a seed"):
        load_study(make_params([0, 1]), project)


def test_one_flipped_byte_is_corruption(project):
    path = project / RUN / "answers.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"answers\.parquet is corrupted"):
        load_study(make_params([0, 1]), project)


def test_ladder_must_be_the_declared_one(project):
    params = make_params([0, 1])
    shorter = params.model_copy(update={"sft": params.sft.model_copy(update={"checkpoints": [0, 5, 10]})})
    with pytest.raises(UserError, match=r"sft\.checkpoints in params\.yaml disagree about step 20"):
        load_study(shorter, project)


def test_table_of_another_seed_is_refused(project):
    folder = project / RUN
    write_table(
        read_table(project / "data/mini/probe_sft/tiny/1/losses.parquet", "losses"), "losses", folder / "losses.parquet"
    )
    write_manifest(folder)
    with pytest.raises(UserError, match=r"losses\.parquet holds rows of another seed than 0"):
        _ = load_study(make_params([0, 1]), project).losses


@pytest.mark.parametrize("content", ['{"max_ood": 11, "end": 320}', '{"end": 320}', "[]", "nonsense"])
def test_bad_choice_of_rungs(project, content):
    (project / RUN / "selection.json").write_text(content)
    write_manifest(project / RUN)
    with pytest.raises(UserError, match=r"selection\.json"):
        _ = load_study(make_params([0, 1]), project).choices


def test_outcomes_are_aligned_by_hand(project):
    study = load_study(make_params([0, 1]), project)
    choice = study.choices[0]
    shuffled = study.answers.sample(fraction=1.0, shuffle=True, seed=5)
    pairs = outcomes(shuffled, choice, "ood", (320, 10))
    assert pairs.equals(outcomes(study.answers, choice, "ood", (320, 10)))
    for row in pairs.to_dicts():
        same = study.answers.filter(
            (pl.col("hand_id") == row["hand_id"]) & (pl.col("seed") == 0) & (pl.col("attempt") == 1)
        )
        assert same.filter(pl.col("checkpoint_step") == 320)["solved"].to_list() == [row["first"]]
        assert same.filter(pl.col("checkpoint_step") == 10)["solved"].to_list() == [row["second"]]


def test_different_or_repeated_hands_cannot_be_paired(project):
    study = load_study(make_params([0, 1]), project)
    choice = study.choices[0]
    here = (pl.col("checkpoint_step") == 320) & (pl.col("hand_id") == "ood confirm 3")
    with pytest.raises(UserError, match="not about the same hands"):
        outcomes(study.answers.filter(~here), choice, "ood", (320, 10))
    with pytest.raises(UserError, match="hold a hand twice"):
        outcomes(pl.concat([study.answers, study.answers.filter(here)]), choice, "ood", (320, 10))


def test_optional_stage_is_absent_or_complete(project):
    study = load_study(make_params([0, 1]), project)
    assert study.table("probe_rl", "answers.parquet", "answers") is None
    assert len(study.table("base", "training.parquet", "training")) == 320
    shutil.rmtree(project / "data/mini/base/tiny/1")
    with pytest.raises(UserError, match="base/tiny/1 is missing"):
        load_study(make_params([0, 1]), project).table("base", "training.parquet", "training")


def test_json_must_be_there_and_an_object(project):
    study = load_study(make_params([0, 1]), project)
    assert study.json("dataset", "leakage.json", "tiny", 0)["shared"] == {"id": 0, "ood": 0}
    with pytest.raises(UserError, match="does not exist"):
        study.json("dataset", "other.json", "tiny", 0)
    with publish(project / "data/mini/dataset/tiny/0") as out:
        (out / "leakage.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="JSON object"):
        study.json("dataset", "leakage.json", "tiny", 0)


def test_ladder_of_the_fabricated_tables_is_the_declared_one():
    assert make_params().sft.checkpoints == list(LADDER)
