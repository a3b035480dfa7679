"""The whole graph on a Ray of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.flows.test_reproduce import FAN, Driver, verdicts
from tests.orchestration.fixture import Workspace

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("prefect_ray", reason="the ray extra is not installed, so no graph was run on Ray")


@pytest.mark.slow
def test_a_graph_on_ray_leaves_the_workspace_up_to_date(tmp_path: Path) -> None:
    driver = Driver(Workspace(tmp_path / "project"), None, tmp_path / "home")
    driver.workspace.params(retries=1)
    driver.workspace.behave(**{"ppo@2": {"failures": 1}, "ppo@4": {"failures": 9}})
    printed = driver.run("--runner", "ray", code=1)
    found = verdicts(printed)
    assert {found[name] for name in FAN[:3]} == {"Completed"}
    assert (found["ppo@4"], found["report"]) == ("Failed", "UpstreamFailed")
    assert "it failed on purpose" in printed, "how it ended comes back from the worker"
    assert driver.workspace.ran().count("ppo@2") == 2
    driver.workspace.behave()
    driver.run()
    assert driver.workspace.ran() == ["ppo@4", "report"]
    assert driver.workspace.status() == {}
