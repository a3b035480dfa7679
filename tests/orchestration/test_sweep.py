"""Sweeps on a small repository whose params.yaml is a real one and whose stages are shell commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.orchestration import sweep as module
from rlheals.orchestration.comparison import comparison, differences, write_tables
from rlheals.orchestration.execute import execute
from rlheals.orchestration.grid import Axis, parse_grid
from rlheals.orchestration.job import Job, Verdict
from rlheals.orchestration.schedule import Row, Schedule
from rlheals.orchestration.slots import Slots
from rlheals.orchestration.sweep import Experiments, Sweep, plan_sweep, sweep_lock
from rlheals.profile import render

DVC_YAML = """\
stages:
  train:
    matrix:
      profile: ["${profile}"]
    cmd: test ${sft.learning_rate} != 0.5 && sh train.sh ${item.profile} ${sft.learning_rate}
    params:
      - sft.learning_rate
      - seeds
    deps:
      - train.sh
    outs:
      - data/${item.profile}/train
  report:
    matrix:
      profile: ["${profile}"]
    cmd: mkdir -p reports/${item.profile} && cp data/${item.profile}/train reports/${item.profile}/metrics.json
    deps:
      - data/${item.profile}/train
    outs:
      - reports/${item.profile}:
          cache: false
metrics:
  - reports/${profile}/metrics.json
"""
TRAIN = """\
echo "$2" >> "$RLHEALS_TEST_RAN"
mkdir -p "data/$1"
echo "{\\"accuracy\\": $2, \\"code\\": 1}" > "data/$1/train"
"""


def shell(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def isolation(folder: Path) -> dict[str, str]:
    """Environment without the user's git and DVC settings, in which a training stage notes each run in ``ran``."""
    return {
        "HOME": str(folder),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(folder / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(folder / "system"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "RLHEALS_TEST_RAN": str(folder / "ran"),
    }


def make_project(folder: Path) -> Path:
    """A committed pipeline that was never run."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "train.sh").write_text(TRAIN)
    (folder / "params.yaml").write_text(render("mini").text)
    (folder / ".gitignore").write_text("/data/*\n/reports/smoke/\n/reports/sweeps/\n/scratch/\n")
    shell(folder, "git", "init", "-q", "-b", "main")
    shell(folder, "git", "config", "user.name", "test")
    shell(folder, "git", "config", "user.email", "test@localhost")
    shell(folder, sys.executable, "-m", "dvc", "init", "-q")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-q", "-m", "first")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, value in isolation(tmp_path).items():
        monkeypatch.setenv(name, value)
    return make_project(tmp_path / "project")


def ran(folder: Path) -> list[str]:
    path = folder.parent / "ran"
    return path.read_text().split() if path.exists() else []


class Serial:
    """Runs each job at once, in this thread."""

    def __init__(self):
        self.results = {}

    def submit(self, node, job, done):
        self.results[node.name] = execute(job, on_line=lambda _: None, on_progress=lambda _: None)
        done(node.name)

    def result(self, name):
        return self.results[name]

    def settled(self, node, verdict, message): ...

    def stop(self): ...

    def check(self): ...


def run(sweep: Sweep, *, force: bool = False) -> list[Row]:
    """Run what is missing, one after the other."""
    experiments = Experiments(sweep, force=force)
    logs = sweep.root / "scratch/runs"
    return Schedule(experiments, experiments.nodes(), Serial(), Slots(), logs, launchers=experiments.launchers()).run()


def begin(sweep: Sweep) -> Job:
    """The job of the first experiment, in its clone."""
    name = sweep.experiments[0].name
    experiments = Experiments(sweep)
    return experiments.begin(name, sweep.root / "scratch/job.log").launched_by(experiments.launchers()[name])


def state(folder: Path) -> dict[str, bytes]:
    """Every file of the workspace but git's and DVC's own and scratch, with HEAD, index and stash."""
    files = {
        str(path.relative_to(folder)): path.read_bytes() + str(path.stat().st_mtime_ns).encode()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (".git", ".dvc", "scratch")
    }
    index = shell(folder, "git", "ls-files", "--stage")
    return files | {"HEAD": (folder / ".git/HEAD").read_bytes(), "index": index.encode()}


class TestGrid:
    def test_axes_and_values(self):
        assert parse_grid(["a.b=1,2", "seeds=[0],[1, 2]", "m={x: 1, y: [2,3]}", "t='a,b',c", "u=it's, so"]) == [
            Axis("a.b", ("1", "2")),
            Axis("seeds", ("[0]", "[1, 2]")),
            Axis("m", ("{x: 1, y: [2,3]}",)),
            Axis("t", ("'a,b'", "c")),
            Axis("u", ("it's", "so")),
        ]

    @pytest.mark.parametrize(
        ("grid", "words"),
        [
            ([], "needs at least one"),
            (["learning_rate"], "not of the form"),
            (["=1"], "not of the form"),
            (["a=1,,2"], "empty value"),
            (["a="], "empty value"),
            (["a=1,1"], "twice"),
            (["a=1", "a=2"], "names a twice"),
            (["a=[1,2"], "lacks a closing ]"),
            (["a=1],2"], "closes nothing"),
            (["a={1],2"], "closes nothing"),
        ],
    )
    def test_bad_grids_are_told(self, grid, words):
        with pytest.raises(UserError, match=re.escape(words)):
            parse_grid(grid)

    @given(st.lists(st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3)), min_size=1, unique_by=str))
    def test_any_nested_lists_come_apart_as_they_went_in(self, values):
        texts = tuple(json.dumps(value) for value in values)
        assert parse_grid(["key=" + ",".join(texts)]) == [Axis("key", texts)]


class TestPlan:
    def test_names_are_deterministic_valid_and_differ(self, project):
        grid = ["sft.learning_rate=1e-4,5e-4", "seeds=[0],[0, 1]"]
        first, again = (plan_sweep(project, grid) for _ in range(2))
        names = [each.name for each in first.experiments]
        assert names == [each.name for each in again.experiments]
        assert len(set(names)) == 4
        assert [name.rsplit("-", 1)[0] for name in names] == [
            "sweep-learning_rate-1e-4-seeds-0",
            "sweep-learning_rate-1e-4-seeds-0-1",
            "sweep-learning_rate-5e-4-seeds-0",
            "sweep-learning_rate-5e-4-seeds-0-1",
        ]
        for name in names:
            shell(project, "git", "check-ref-format", f"refs/exps/{name}")
        assert first.experiments[1].params == {"sft.learning_rate": 1e-4, "seeds": [0, 1]}

    def test_what_decides_the_outcome_decides_the_name(self, project):
        def name(**options):
            return plan_sweep(project, ["sft.learning_rate=1e-4"], **options).experiments[0].name

        base = name()
        (project / "params.yaml").write_text(render("mini").text + "# a remark\n")
        assert name() == base
        (project / "params.yaml").write_text(render("mini", ["sft.steps=500"]).text)
        assert name() != base
        (project / "params.yaml").write_text(render("mini").text)
        assert name(targets=["train"]) != base
        assert name(profile="smoke") != base
        (project / "train.sh").write_text(TRAIN.replace('"code\\": 1', '"code\\": 2'))
        assert name() != base

    def test_a_sweep_without_a_name_gets_one_that_another_grid_does_not_get(self, project):
        def name(grid="sft.learning_rate=1e-4,5e-4", **options):
            return plan_sweep(project, [grid], **options).name

        base = name()
        assert re.fullmatch("sweep-learning_rate-[0-9a-f]{6}", base)
        assert name() == base
        others = {name("sft.learning_rate=1e-4,3e-4"), name(profile="smoke"), name(targets=["train"])}
        shell(project, "git", "commit", "-q", "--allow-empty", "-m", "second")
        assert len({base, *others, name()}) == 5
        assert name(name="lr") == "lr"

    @pytest.mark.parametrize(
        ("grid", "words"),
        [
            (["sft.learning_rate=1e-4,0"], "sft.learning_rate=0 cannot run: .*sft.learning_rate"),
            (["sft.learnig_rate=1e-4"], "did you mean sft.learning_rate"),
            (["sft.steps=500,20"], "sft.steps=20 cannot run: .*checkpoints"),
            (["sft.learning_rate=1e-3,0.001"], "same params.yaml"),
            (["seeds=0"], "seeds"),
        ],
    )
    def test_every_combination_is_checked_before_anything_runs(self, project, grid, words):
        before = state(project)
        with pytest.raises(UserError, match=words):
            plan_sweep(project, grid)
        assert state(project) == before
        assert not (project / "scratch").exists()

    def test_it_needs_the_top_of_a_repository(self, project, tmp_path):
        with pytest.raises(UserError, match=r"no dvc\.yaml"):
            plan_sweep(tmp_path, ["seeds=[0]"])
        shell(tmp_path, "git", "init", "-q")
        (project / ".git").rename(project / "git")
        with pytest.raises(UserError, match="not the top"):
            plan_sweep(project, ["seeds=[0]"])

    def test_bad_name(self, project):
        with pytest.raises(UserError, match="--name A/B"):
            plan_sweep(project, ["seeds=[0]"], name="A/B")


def test_a_sweep_leaves_the_workspace_alone_and_a_table_behind(project):
    # Changes that are staged, not staged, and not tracked: all stay as they are; tracked ones are part of the runs.
    (project / "train.sh").write_text(TRAIN.replace('"code\\": 1', '"code\\": 2'))
    (project / "staged").write_text("x")
    shell(project, "git", "add", "staged")
    (project / "untracked").write_text("y")
    before = state(project)
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4,0.5,4e-4"], profile="smoke", name="lr")
    rows = run(sweep)
    assert state(project) == before
    assert [each.verdict for each in rows] == [Verdict.COMPLETED, Verdict.FAILED, Verdict.COMPLETED]
    assert ran(project) == ["0.0002", "0.0004"]

    table = comparison(sweep, rows)
    assert table.columns == [
        *("Experiment", "rev", "typ", "Created", "parent", "accuracy", "code"),
        *("sft.learning_rate", "verdict", "seconds", "message"),
    ]
    assert table["Experiment"].to_list() == [each.name for each in sweep.experiments]
    assert table["accuracy"].to_list() == [2e-4, None, 4e-4]
    assert table["code"].to_list() == [2, None, 2]
    assert table["sft.learning_rate"].to_list() == [2e-4, 0.5, 4e-4]
    assert "train@smoke" in table["message"][1]
    assert differences(table)["param or metric"].to_list() == ["accuracy", "code", "sft.learning_rate", "verdict"]
    path = write_tables(sweep, table)
    assert path == project / "reports/sweeps/lr/table.csv"
    assert pl.read_csv(path).columns == table.columns

    saved = shell(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    assert sorted(name.rsplit("/", 1)[-1] for name in saved) == sorted(row.name for row in rows if row.verdict.good)
    left = {path.name for path in (project / "scratch/sweeps").iterdir() if path.is_dir()}
    assert left == {sweep.experiments[1].name}, "the failed one is kept to look at and to go on"

    # A wider grid runs what is new; another name for the same settings is served by DVC's run cache.
    wider = plan_sweep(project, ["sft.learning_rate=2e-4,3e-4"], profile="smoke", name="lr")
    assert [each.done for each in wider.experiments] == [True, False]
    assert [row.verdict for row in run(wider)] == [Verdict.CACHED, Verdict.COMPLETED]
    assert [row.verdict for row in run(plan_sweep(project, ["sft.learning_rate=3e-4"], profile="smoke"))] == [
        Verdict.COMPLETED
    ]
    assert ran(project) == ["0.0002", "0.0004", "0.0003"]


def test_force_runs_every_stage_of_every_experiment(project):
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"], targets=["train"])
    name = sweep.experiments[0].name
    done = replace(sweep, experiments=(replace(sweep.experiments[0], done=True),))
    assert Experiments(done).settle(name) is Verdict.CACHED
    forced = Experiments(done, force=True)
    assert forced.settle(name) is None
    repro, save = forced.begin(name, project / "scratch/job.log").commands
    assert repro[-3:] == ("repro", "--force", "train")
    assert save[-1] == "train"


def test_a_stopped_experiment_goes_on_in_its_clone(project):
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"])
    clone = Path(begin(sweep).cwd)
    (clone / "scratch").mkdir()
    (clone / "scratch/state").write_text("half done")
    (clone / "train.sh").write_text("damaged")
    begin(sweep)
    assert (clone / "scratch/state").read_text() == "half done"
    assert (clone / "train.sh").read_text() == TRAIN
    # A clone that git cannot use any more is made again.
    (clone / ".git/HEAD").write_text("damaged")
    begin(sweep)
    assert not (clone / "scratch").exists()


def test_a_file_that_is_only_staged_is_in_every_attempt_and_in_the_commit_of_the_experiment(project):
    (project / "helper.sh").write_text("accuracy=0.25\n")
    (project / "dropped").write_text("")
    shell(project, "git", "add", "dropped")
    shell(project, "git", "commit", "-q", "-m", "second")
    shell(project, "git", "rm", "-q", "dropped")
    (project / "train.sh").write_text(". ./helper.sh\n" + TRAIN.replace('\\": $2', '\\": $accuracy'))
    shell(project, "git", "add", "helper.sh")
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"], targets=["train"])
    clone = Path(begin(sweep).cwd)
    (clone / "scratch").mkdir()
    (clone / "scratch/state").write_text("half done")
    assert begin(sweep).cwd == str(clone)
    assert (clone / "scratch/state").read_text() == "half done"
    assert [row.verdict for row in run(sweep)] == [Verdict.COMPLETED]
    (reference,) = shell(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    assert shell(project, "git", "show", f"{reference}:helper.sh") == "accuracy=0.25\n"
    assert "dropped" not in shell(project, "git", "ls-tree", "--name-only", reference).split()


def test_what_a_killed_git_and_dvc_leave_in_a_clone_does_not_cost_its_state(project):
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"])
    clone = Path(begin(sweep).cwd)
    (clone / "scratch").mkdir()
    (clone / "scratch/state").write_text("half done")
    for lock in ("index.lock", "HEAD.lock"):
        (clone / ".git" / lock).write_text("")
    (clone / ".dvc/tmp").mkdir(exist_ok=True)
    (clone / ".dvc/tmp/rwlock").write_text('{"write": {')
    begin(sweep)
    assert (clone / "scratch/state").read_text() == "half done"
    assert [row.verdict for row in run(sweep)] == [Verdict.COMPLETED]


def test_a_reset_that_fails_for_another_reason_is_told_and_keeps_the_clone(project, monkeypatch):
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"])
    clone = Path(begin(sweep).cwd)
    (clone / "scratch").mkdir()
    genuine = module._git

    def full(folder, *arguments, **options):
        if "reset" in arguments:
            raise UserError("no space left on device")
        return genuine(folder, *arguments, **options)

    monkeypatch.setattr(module, "_git", full)
    with pytest.raises(UserError, match="no space left"):
        begin(sweep)
    assert (clone / "scratch").is_dir()


def test_the_clone_has_the_workspaces_own_settings_and_cache(project):
    shell(project, sys.executable, "-m", "dvc", "remote", "add", "--local", "store", "../store")
    shell(project, sys.executable, "-m", "dvc", "config", "--local", "core.autostage", "false")
    clone = Path(begin(plan_sweep(project, ["sft.learning_rate=2e-4"])).cwd)
    dvc = (sys.executable, "-m", "dvc")
    assert shell(clone, *dvc, "cache", "dir").strip() == str(project / ".dvc/cache")
    assert shell(clone, *dvc, "config", "core.autostage").strip() == "false"
    assert shell(clone, *dvc, "remote", "list").split()[1] == str(project.parent / "store")


def test_a_model_folder_in_the_workspace_is_seen_by_the_clone(project):
    (project / "models/base").mkdir(parents=True)
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "/models/\n")
    text = render("mini", ["model.tiny={source: models/base, prompt_format: compact, dtype: float32}"]).text
    (project / "params.yaml").write_text(text)
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"])
    job = begin(sweep)
    assert (Path(job.cwd) / "models/base").resolve() == project / "models/base"


def test_progress_of_a_stage_inside_an_experiment_arrives(project):
    line = json.dumps({"label": "sft", "done": 1, "total": 2, "unit": "step", "note": "", "eta": None})
    (project / "train.sh").write_text(TRAIN + f"echo '{line}' >> \"$RLHEALS_PROGRESS_FILE\"\nsleep 2\n")
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"], targets=["train"])
    seen = []
    job = begin(sweep)
    assert execute(job, on_line=lambda _: None, on_progress=seen.append).returncode == 0
    assert [each.label for each in seen] == ["sft"]
    # Only the training stage was asked for, so there are no metrics to compare, and a table all the same.
    Experiments(sweep).finish(job.name)
    table = comparison(sweep, [Row(job.name, Verdict.COMPLETED)])
    assert table.columns == [
        *("Experiment", "rev", "typ", "Created", "parent", "sft.learning_rate", "verdict", "seconds", "message")
    ]


def test_stopping_ends_what_an_experiment_started(project):
    (project / "train.sh").write_text('echo $$ > "$RLHEALS_TEST_RAN"\nsleep 300\n')
    sweep = plan_sweep(project, ["sft.learning_rate=2e-4"])
    job = begin(sweep)
    stop = threading.Event()
    marker = Path(os.environ["RLHEALS_TEST_RAN"])

    def watch():
        while not marker.exists() or not marker.read_text().strip():
            stop.wait(0.1)
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    result = execute(job, on_line=lambda _: None, on_progress=lambda _: None, stop=stop)
    assert result.stopped
    assert not Path("/proc", marker.read_text().strip()).exists()


def test_one_sweep_at_a_time(project):
    with sweep_lock(project), pytest.raises(UserError, match="another sweep"), sweep_lock(project):
        pass
    with sweep_lock(project):
        pass
