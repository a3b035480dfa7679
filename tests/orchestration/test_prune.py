"""`rlheals prune` on a small pipeline whose matrix shrinks: what goes, what stays, and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from rlheals.errors import UserError
from rlheals.orchestration.driver_lock import RECORD, Holder, driver_lock
from rlheals.orchestration.prune import Leftover, find_leftovers, remove_leftovers
from rlheals.publish import publish

PIPELINE = """\
stages:
  count:
    matrix: {profile: ["${profile}"], model: "${models}", seed: "${seeds}"}
    cmd: PYTHON count.py ${item.profile} ${item.model} ${item.seed}
    deps: [count.py]
    outs: ["data/${item.profile}/count/${item.model}/${item.seed}"]
  total:
    matrix: {profile: ["${profile}"]}
    cmd: PYTHON total.py
    params: [profile, models, seeds]
    deps: ["data/${item.profile}/count", total.py]
    outs:
      - reports/${item.profile}: {cache: false}
"""
WORK = """\
import sys
from pathlib import Path
from rlheals.publish import publish

profile, model, seed = sys.argv[1:]
with publish(Path("data", profile, "count", model, seed)) as folder:
    (folder / "number.txt").write_text(f"{model} {seed}")
with open("ran.txt", "a") as ran:
    ran.write(f"{profile}-{model}-{seed} ")
"""
# The real check of the collecting stages, so that the sentence it tells is the one that is tested.
TOTAL = """\
import sys
from pathlib import Path
from types import SimpleNamespace
from ruamel.yaml import YAML
from rlheals.errors import UserError
from rlheals.publish import publish
from rlheals.reporting.tables import Study

params = SimpleNamespace(**YAML(typ="safe").load(Path("params.yaml").read_text()))
try:
    Study(params, Path()).check_runs("count")
except UserError as error:
    sys.exit(f"error: {error}")
numbers = [path.read_text() for path in sorted(Path("data", params.profile, "count").rglob("number.txt"))]
with publish(Path("reports", params.profile)) as folder:
    (folder / "total.txt").write_text("\\n".join(numbers))
"""


def call(folder, *command, code=0):
    """Run a command that must end with ``code``; its standard output and standard error."""
    clean = {
        "HOME": str(folder.parent),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(folder.parent / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(folder.parent / "system"),
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def declare(folder, profile="mini", models=("tiny",), seeds=(0, 1)):
    content = {"profile": profile, "models": list(models), "seeds": list(seeds)}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)


def entries(folder):
    """Names of the entries of dvc.lock."""
    return set(YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"])


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A git and DVC project that was run on two profiles: mini with seeds 0 and 1, and mini-confirm with seed 1."""
    folder = tmp_path_factory.mktemp("prune") / "project"
    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[cache]\n    type = hardlink,symlink\n")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / "dvc.yaml").write_text(PIPELINE.replace("PYTHON", sys.executable))
    (folder / "count.py").write_text(WORK)
    (folder / "total.py").write_text(TOTAL)
    declare(folder, "mini-confirm", seeds=[1])
    call(folder, "dvc", "repro", "-q")
    declare(folder)
    call(folder, "dvc", "repro", "-q")
    return folder


@pytest.fixture
def project(pristine, tmp_path, monkeypatch):
    """A private copy, with its own databases of DVC."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "system"))
    folder = shutil.copytree(pristine, tmp_path / "project")
    (folder / "ran.txt").write_text("")
    return folder


def test_nothing_is_left_over_while_everything_is_declared(project):
    assert find_leftovers(project) == []
    out, _ = call(project, "rlheals.cli", "prune", "--yes")
    assert out.startswith("nothing to remove: everything of profile mini is declared")


def test_a_shrunken_matrix_is_refused_pruned_and_comes_back(project):
    declare(project, seeds=[0])
    _, told = call(project, "dvc", "repro", code=255)
    assert "count/tiny/1 is stale" in told
    assert "remove it with `rlheals prune`" in told

    before = entries(project)
    out, _ = call(project, "rlheals.cli", "prune", "--yes")
    assert "data/mini/count/tiny/1 (count@mini-tiny-1 in dvc.lock)" in out
    assert "not in DVC's cache" not in out
    assert entries(project) == before - {"count@mini-tiny-1"}
    assert {path.name for path in (project / "data/mini/count/tiny").iterdir()} == {"0", ".gitignore"}
    assert (project / "data/mini/count/tiny/.gitignore").read_text() == "/0\n"
    call(project, "dvc", "repro")
    assert (project / "reports/mini/total.txt").read_text() == "tiny 0"

    declare(project, seeds=[0, 1])
    call(project, "dvc", "repro")
    assert (project / "ran.txt").read_text() == "", "the run cache restored the item"
    assert (project / "reports/mini/total.txt").read_text() == "tiny 0\ntiny 1"
    assert "up to date" in call(project, "dvc", "status")[0]


def test_other_profiles_and_the_users_files_stay(project):
    declare(project, seeds=[0])
    (project / "data/mini/count/tiny/notes.txt").write_text("mine")
    (project / "data/mini/mine/tiny/1").mkdir(parents=True)
    (project / "data/mini/mine/tiny/1/manifest.json").write_text('{"name": "another program"}')
    others = files(project / "data/mini-confirm") | files(project / "reports")
    cache = files(project / ".dvc/cache")
    remove_leftovers(project, find_leftovers(project))
    assert not (project / "data/mini/count/tiny/1").exists()
    assert (project / "data/mini/count/tiny/notes.txt").read_text() == "mine"
    assert (project / "data/mini/mine/tiny/1/manifest.json").exists()
    assert files(project / "data/mini-confirm") | files(project / "reports") == others
    assert {"count@mini-confirm-tiny-1", "total@mini-confirm", "total@mini"} <= entries(project)
    assert files(project / ".dvc/cache") == cache


def test_a_dropped_model_takes_its_empty_folder_along(project):
    declare(project, models=["tiny", "big"])
    call(project, "dvc", "repro", "-q")
    declare(project)
    found = find_leftovers(project)
    assert [leftover.stage for leftover in found] == ["count@mini-big-0", "count@mini-big-1"]
    remove_leftovers(project, found)
    assert not (project / "data/mini/count/big").exists()
    assert (project / "data/mini/count/tiny/0/number.txt").exists()


def test_a_dry_run_changes_nothing(project):
    declare(project, seeds=[0])
    before = files(project), (project / "dvc.lock").read_text()
    out, _ = call(project, "rlheals.cli", "prune", "--dry-run", "--json")
    content = json.loads(out)
    assert content["profile"] == "mini"
    assert content["removed"] is False
    assert [leftover["paths"] for leftover in content["leftovers"]] == [["data/mini/count/tiny/1"]]
    assert content["leftovers"][0]["cached"] is True
    assert content["leftovers"][0]["size"] > 0
    assert (files(project), (project / "dvc.lock").read_text()) == before


def ask(folder, answer):
    command = [sys.executable, "-m", "rlheals.cli", "prune"]
    return subprocess.run(command, cwd=folder, input=answer, capture_output=True, text=True, check=False)


def test_it_asks_first(project):
    declare(project, seeds=[0])
    refused = ask(project, "n\n")
    assert refused.returncode == 0
    assert "nothing was removed" in refused.stdout
    silent = ask(project, "")
    assert silent.returncode == 2
    assert "pass --yes" in silent.stderr
    assert (project / "data/mini/count/tiny/1/number.txt").exists()
    assert ask(project, "y\n").returncode == 0
    assert not (project / "data/mini/count/tiny/1").exists()


def test_json_asks_no_questions(project):
    _, told = call(project, "rlheals.cli", "prune", "--json", code=2)
    assert "add --dry-run or --yes" in told


def test_a_published_folder_without_an_entry_goes_and_says_it_cannot_be_restored(project):
    with publish(project / "data/mini/count/lost/3") as folder:
        (folder / "number.txt").write_text("lost 3")
    (project / "data/mini/count/tiny/.7.partial").mkdir()
    (project / "data/mini/count/tiny/.0.partial").mkdir()
    found = find_leftovers(project)
    assert [leftover.paths[0] for leftover in found] == ["data/mini/count/lost/3", "data/mini/count/tiny/.7.partial"]
    out, _ = call(project, "rlheals.cli", "prune", "--yes")
    assert "count/lost/3  [not in DVC's cache: cannot be restored]" in out
    assert not (project / "data/mini/count/lost").exists()
    assert (project / "data/mini/count/tiny/.0.partial").exists(), "item 0 is declared: its stage tidies up"


def test_an_output_that_was_moved_aside_goes_with_its_item_alone(project):
    for seed in (0, 7):
        with publish(project / f"data/mini/count/tiny/.{seed}.former") as folder:
            (folder / "number.txt").write_text("kept while it was replaced")
    assert [leftover.paths for leftover in find_leftovers(project)] == [("data/mini/count/tiny/.7.former",)]
    (project / "data/mini/count/tiny/.7.former/mine").write_text("mine")
    assert "no stage wrote mine" in find_leftovers(project)[0].keep


@pytest.mark.parametrize("place", ["eval", "eval/tiny/1", "count/mine", "count/tiny/0/mine", "count/tiny/1/2/3"])
def test_what_another_command_published_stays(project, place):
    declare(project, seeds=[0])
    with publish(project / "data/mini" / place) as folder:
        (folder / "answers.txt").write_text("mine")
    call(project, "rlheals.cli", "prune", "--yes", code=2 if place.startswith("count/tiny/1") else 0)
    assert (project / "data/mini" / place / "answers.txt").read_text() == "mine"


def test_a_stage_that_only_the_lock_file_knows_has_orphans_too(project):
    text = (project / "dvc.yaml").read_text()
    with publish(project / "data/mini/count/lost/3") as folder:
        (folder / "number.txt").write_text("lost 3")
    (project / "dvc.yaml").write_text("stages:" + text[text.index("\n  total:") :])
    assert "data/mini/count/lost/3" in [path for leftover in find_leftovers(project) for path in leftover.paths]


def test_marks_that_a_killed_dvc_left_cut_short_do_not_stop_it(project):
    declare(project, seeds=[0])
    (project / ".dvc/tmp/rwlock").write_text('{"write": {')
    remove_leftovers(project, find_leftovers(project))
    assert not (project / "data/mini/count/tiny/1").exists()


def test_a_killed_driver_is_still_known_afterwards(project):
    declare(project, seeds=[0])
    record = project / RECORD
    dead = json.dumps(vars(replace(Holder.this_process(), pid=4_000_000, flow_run_id="flow-1")))
    record.write_text(dead)
    remove_leftovers(project, find_leftovers(project), say=lambda _: None)
    assert json.loads(record.read_text()) == json.loads(dead)


@pytest.mark.parametrize("published", [True, False])
def test_a_folder_with_a_file_of_the_users_is_kept_and_told(project, published):
    declare(project, seeds=[0])
    folder = project / "data/mini/count/tiny/1"
    (folder / "notes.txt").write_text("mine")
    if not published:
        (folder / "manifest.json").unlink()
    _, told = call(project, "rlheals.cli", "prune", "--yes", code=2)
    assert "kept data/mini/count/tiny/1" in told
    assert "no stage wrote notes.txt in it" in told
    assert (folder / "notes.txt").read_text() == "mine"
    assert "count@mini-tiny-1" in entries(project)


def test_a_folder_nothing_is_known_about_is_kept(project):
    declare(project, seeds=[0])
    (project / "data/mini/count/tiny/1/manifest.json").unlink()
    shutil.rmtree(project / ".dvc/cache")
    (found,) = find_leftovers(project)
    assert "delete it by hand" in found.keep
    remove_leftovers(project, [found])
    assert (project / "data/mini/count/tiny/1/number.txt").exists()


def test_a_link_is_removed_and_what_it_points_to_is_not(project, tmp_path):
    declare(project, seeds=[0])
    moved = shutil.move(project / "data/mini/count/tiny/1", tmp_path / "elsewhere")
    (project / "data/mini/count/tiny/1").symlink_to(moved)
    remove_leftovers(project, find_leftovers(project))
    assert not (project / "data/mini/count/tiny/1").is_symlink()
    assert (tmp_path / "elsewhere/number.txt").exists()


def test_a_renamed_stage_loses_its_entry_and_keeps_the_folder_of_its_successor(project):
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("  total:", "  sum:"))
    (found,) = find_leftovers(project)
    assert found == Leftover("total@mini", (), 0, cached=True)
    remove_leftovers(project, [found])
    assert "total@mini" not in entries(project)
    assert (project / "reports/mini/total.txt").exists()


def test_an_entry_is_found_again_when_only_the_files_were_removed(project):
    declare(project, seeds=[0])
    shutil.rmtree(project / "data/mini/count/tiny/1")
    found = find_leftovers(project)
    assert found == [Leftover("count@mini-tiny-1", (), 0, cached=True)]
    remove_leftovers(project, found)
    assert find_leftovers(project) == []


def test_a_plan_that_is_out_of_date_is_not_carried_out(project):
    declare(project, seeds=[0])
    found = find_leftovers(project)
    declare(project, seeds=[1])
    with pytest.raises(UserError, match="has changed meanwhile"):
        remove_leftovers(project, found)
    assert (project / "data/mini/count/tiny/0/number.txt").exists()
    assert (project / "data/mini/count/tiny/1/number.txt").exists()


def test_a_driver_at_work_is_not_disturbed(project):
    declare(project, seeds=[0])
    found = find_leftovers(project)
    with driver_lock(project), pytest.raises(UserError, match="another run holds"):
        remove_leftovers(project, found)
    assert (project / "data/mini/count/tiny/1/number.txt").exists()


@contextmanager
def slow_repro(folder):
    """``dvc repro`` in the middle of a command of the other profile's kind: it holds only DVC's marks on files."""
    text = (folder / "dvc.yaml").read_text()
    slow = "  slow:\n    cmd: touch started; sleep 60\n    outs: [slow.txt]\n"
    (folder / "dvc.yaml").write_text(text + slow)
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "slow"], cwd=folder, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


def test_dvc_at_work_is_not_disturbed(project):
    declare(project, seeds=[0])
    with slow_repro(project):
        found = find_leftovers(project)
        with pytest.raises(UserError, match="DVC is at work"):
            remove_leftovers(project, found)
    assert (project / "data/mini/count/tiny/1/number.txt").exists()
    remove_leftovers(project, found)
    assert not (project / "data/mini/count/tiny/1").exists()


@pytest.mark.parametrize("content", ["profile: ..\n", "profile: a/b\n", "models: []\n", "", "profile: [\n"])
def test_a_profile_that_is_no_name_is_refused(project, content):
    (project / "params.yaml").write_text(content)
    with pytest.raises(UserError, match="does not name a profile"):
        find_leftovers(project)


def test_a_pipeline_that_cannot_be_read_removes_nothing(project):
    (project / "dvc.yaml").write_text("stages: [1\n")
    with pytest.raises(UserError, match="DVC says"):
        find_leftovers(project)
    (project / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"holds no dvc\.yaml"):
        find_leftovers(project)
