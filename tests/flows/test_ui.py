"""Prefect's user interface in a real browser, after a real run: what a person who opens it sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import flows
from flows.server import answers, free_port
from tests.browser import Page, browser, need_chromium
from tests.stages.test_smoke import copy_of_the_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
GRAPH_IS_DRAWN = """(() => {
  const graph = [...document.querySelectorAll('canvas')].find(canvas => canvas.width > 300 && canvas.height > 100);
  return Boolean(graph);
})()"""
STAGES = ("dataset", "base", "sft", "probe_sft", "report")
pytestmark = pytest.mark.slow  # it runs the smoke profile


class Server:
    """A running Prefect server with a database of its own."""

    def __init__(self, port: int, home: Path) -> None:
        self.ui = f"http://127.0.0.1:{port}"
        self.api = f"{self.ui}/api"
        self.environment = (
            os.environ
            | flows.ENVIRONMENT
            | {
                "PREFECT_HOME": str(home),
                "PREFECT_API_URL": self.api,
                # On any port but 4200 the pages look for the API at 4200 unless they are told.
                "PREFECT_SERVER_UI_API_URL": self.api,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            }
        )

    def ask(self, path: str, **body: Any) -> Any:
        """What a POST to the API gives."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.api + path, data=json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)


@contextmanager
def prefect_server(folder: Path) -> Iterator[Server]:
    """`prefect server start` on a free port."""
    server = Server(free_port(), folder)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", server.ui[17:]]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=server.environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 180
        while not answers(server.api):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which the smoke profile has been run by ``python -m flows.reproduce``."""
    need_chromium()
    workspace = copy_of_the_tree(tmp_path_factory.mktemp("workspace"))
    with prefect_server(tmp_path_factory.mktemp("prefect")) as server:
        done = subprocess.run(
            [sys.executable, "-m", "flows.reproduce", "--profile", "smoke", "-j", "2"],
            cwd=workspace,
            env=server.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        yield server


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def artifact(server: Server, key: str) -> dict[str, Any]:
    (found,) = [item for item in server.ask("/artifacts/filter") if item["key"] == key]
    return dict(found)


def picture(page: Page, name: str) -> None:
    """Keep a screenshot where RLHEALS_SCREENSHOTS says."""
    if folder := os.environ.get("RLHEALS_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"prefect_{name}.png")


def test_the_graph_of_the_run_is_drawn(server: Server, page: Page) -> None:
    (run,) = server.ask("/flow_runs/filter")
    assert run["state_type"] == "COMPLETED"
    graph = json.load(urllib.request.urlopen(f"{server.api}/flow_runs/{run['id']}/graph-v2", timeout=30))
    label = {node["id"]: node["label"] for _, node in graph["nodes"]}
    above = {node["label"]: {label[parent["id"]] for parent in node["parents"]} for _, node in graph["nodes"]}
    dataset, base, sft, probe_sft = (f"{stage}@smoke-tiny-0" for stage in STAGES[:4])
    assert above[dataset] == above[base] == set()
    assert above[sft] == {dataset, base}
    assert probe_sft in above["report@smoke"]
    page.open(f"{server.ui}/runs/flow-run/{run['id']}", 1280, 500)
    page.wait_for(GRAPH_IS_DRAWN)
    page.wait_for("document.body.innerText.includes('Task runs')")
    # The graph is drawn by WebGL, so its pixels are read from a screenshot: green bars are completed stages.
    end = time.monotonic() + 60
    while green_pixels(page) < 3000:
        assert time.monotonic() < end, "no bar of a completed stage is drawn"
        time.sleep(0.5)
    picture(page, "flow_run")


def green_pixels(page: Page) -> int:
    """Pixels of the graph in the colour of completed runs, counted by the browser itself."""
    box = page.evaluate(
        "(() => { const b = document.querySelector('canvas').getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; })()"
    )
    x, y, width, height = box
    height -= 40  # at the bottom is a bar in the colour of the run, also without any task
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    data = page.call("Page.captureScreenshot", format="png", clip=clip)["data"]
    return page.evaluate(
        f"""(async () => {{
          const image = new Image();
          image.src = 'data:image/png;base64,{data}';
          await image.decode();
          const canvas = document.createElement('canvas');
          [canvas.width, canvas.height] = [image.width, image.height];
          const context = canvas.getContext('2d');
          context.drawImage(image, 0, 0);
          const pixels = context.getImageData(0, 0, image.width, image.height).data;
          let count = 0;
          for (let i = 0; i < pixels.length; i += 4)
            if (pixels[i + 1] > 120 && pixels[i] < 80 && pixels[i + 2] < 120) count++;
          return count;
        }})()"""
    )


def test_the_verdicts_are_a_table(server: Server, page: Page) -> None:
    page.open(f"{server.ui}/artifacts/artifact/{artifact(server, 'verdicts')['id']}")
    stages = 5 + len(STAGES)  # two branches, their probe, spectra and restore
    page.wait_for(f"document.querySelectorAll('table tbody tr').length >= {stages}")
    text = page.evaluate("document.querySelector('table').innerText")
    assert all(f"{stage}@smoke" in text for stage in STAGES)
    assert text.count("Completed") == stages
    picture(page, "verdicts")


def test_the_figures_are_shown(server: Server, page: Page) -> None:
    found = artifact(server, "report-smoke")
    assert len(found["data"]) < 2_000_000
    page.open(f"{server.ui}/artifacts/artifact/{found['id']}", 1280, 900)
    page.wait_for("[...document.querySelectorAll('img')].filter(image => image.naturalWidth > 200).length >= 3")
    broken = "[...document.querySelectorAll('img')].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
    assert page.evaluate(broken) == []
    page.evaluate("document.querySelector('img').scrollIntoView()")
    picture(page, "figures")


def test_the_progress_of_a_long_stage_is_shown(server: Server, page: Page) -> None:
    found = artifact(server, "stage-sft-smoke-tiny-0")
    assert found["data"] == 100
    page.open(f"{server.ui}/artifacts/artifact/{found['id']}")
    page.wait_for("document.body.innerText.includes('Progress: 100%')")


def test_the_pages_ask_no_other_host(server: Server, page: Page) -> None:
    asked = {url.split("/")[2] for url in page.requested if url.startswith(("http:", "https:", "ws:", "wss:"))}
    assert asked == {server.ui.removeprefix("http://")}
