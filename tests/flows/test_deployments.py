"""The deployments of prefect.yaml and of flows/serve.py: the same, valid, and working on a real server."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ruamel.yaml import YAML

from flows.serve import DEPLOYMENTS, TIME_ZONE, Deployment
from flows.server import temporary_server
from tests.orchestration.test_sweep import isolation, make_project

REPOSITORY = Path(__file__).parents[2]
DECLARED = YAML(typ="safe").load((REPOSITORY / "prefect.yaml").read_text())


def as_declared(deployment: Deployment) -> dict[str, Any]:
    """What prefect.yaml should say."""
    return {
        "name": deployment.name,
        "entrypoint": deployment.entrypoint,
        "description": deployment.description,
        "parameters": deployment.parameters,
        "tags": deployment.tags,
        "schedules": [{"cron": deployment.cron, "timezone": TIME_ZONE}] if deployment.cron else [],
        "concurrency_limit": deployment.concurrency_limit,
        "work_pool": {"name": "local"},
    }


def test_prefect_yaml_and_serve_say_the_same():
    assert DECLARED["deployments"] == [as_declared(deployment) for deployment in DEPLOYMENTS]
    assert [deployment.name for deployment in DEPLOYMENTS] == ["reproduce", "figures", "sweep"]


def test_prefect_yaml_names_no_folder_of_one_machine():
    assert DECLARED["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment.name)
def test_each_is_valid(deployment):
    path, _, function = deployment.entrypoint.partition(":")
    assert Path(inspect.getfile(deployment.flow.fn)) == REPOSITORY / path
    assert deployment.flow.fn.__name__ == function
    checked = deployment.flow.validate_parameters(deployment.parameters)
    assert {key: checked[key] for key in deployment.parameters} == deployment.parameters
    assert len(deployment.description) < 120


def test_each_is_served_with_its_schedule_and_limit():
    for deployment in DEPLOYMENTS:
        made = deployment.runner()
        assert (made.name, made.parameters, made.tags) == (deployment.name, deployment.parameters, deployment.tags)
        assert made.concurrency_limit == 1
        crons = [each.schedule.cron for each in made.schedules]
        assert crons == ([deployment.cron] if deployment.cron else [])


def test_the_nightly_run_is_once_a_night():
    from prefect.server.schemas.schedules import CronSchedule

    nightly = next(deployment for deployment in DEPLOYMENTS if "nightly" in deployment.tags)
    assert re.fullmatch(r"\d+ [0-6] \* \* \*", nightly.cron)
    assert CronSchedule(cron=nightly.cron, timezone=TIME_ZONE).cron == nightly.cron
    assert datetime.now(UTC).tzname() == TIME_ZONE


def test_serving_needs_a_server_that_stays(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    served = subprocess.run(
        [sys.executable, "-m", "flows.serve"],
        cwd=REPOSITORY,
        env=environment | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert served.returncode == 1
    assert "prefect server start" in served.stderr
    assert "Traceback" not in served.stderr


@pytest.mark.slow
def test_deploying_and_a_worker(tmp_path, monkeypatch):
    """`prefect deploy --all`, a process worker, and `prefect deployment run`, in a small project with these flows."""
    for name, value in isolation(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = make_project(tmp_path / "project")
    for name in ("flows", "rlheals", "prefect.yaml"):
        (folder / name).symlink_to(REPOSITORY / name)
    monkeypatch.setenv("PWD", str(folder))  # as a shell sets it

    def prefect(*arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    with temporary_server(tmp_path / "server.log") as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        prefect("work-pool", "create", "local", "--type", "process")
        prefect("deploy", "--all", "--no-prompt")
        with (tmp_path / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local"],
                cwd=tmp_path,  # anywhere: the deployment knows its folder
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            printed = prefect(
                *("deployment", "run", "sweep/sweep", "--watch"),
                *("--param", 'grid=["sft.learning_rate=2e-4"]', "--param", 'name="nightly"'),
            )
        finally:
            worker.terminate()
            worker.wait(60)
    assert "Completed" in printed, (tmp_path / "worker.log").read_text()
    assert pl.read_csv(folder / "reports/sweeps/nightly/table.csv")["verdict"].to_list() == ["Completed"]
