from __future__ import annotations

import http.server
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows import server
from flows.server import answers, free_port, prefect_api, temporary_server
from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DRIVER = """
import sys, time
from pathlib import Path
import flows
from flows.server import prefect_api
from prefect import flow, get_run_logger, task

@task
def stage():
    get_run_logger().info("from the task")

@flow
def run():
    stage.submit().wait()
    return 1

with prefect_api(Path(sys.argv[1])) as api:
    run()
    print(api.url, flush=True)
    if sys.argv[2:]:
        time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_server_configured() -> Iterator[None]:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@contextmanager
def web(body: bytes) -> Iterator[str]:
    """A web server that answers everything with ``body``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}/api"
        listener.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's folder: the database is made once for all tests here."""
    return tmp_path_factory.mktemp("prefect")


def driver_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return kept | {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)}


def test_only_a_prefect_server_counts_as_one() -> None:
    with web(b"true") as url:
        assert answers(url)
    with web(b"<html>it works</html>") as url:
        assert not answers(url)
    assert not answers(f"http://127.0.0.1:{free_port()}/api")


def test_a_server_at_the_default_address_is_used_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with web(b"true") as url:
        monkeypatch.setattr(server, "DEFAULT_URL", url)
        with prefect_api(tmp_path / "log", say=said.append) as api:
            assert (api.url, api.temporary) == (url, False)
            assert get_current_settings().api.url == url
            assert os.environ["PREFECT_API_URL"] == url
    assert said == [f"using the Prefect server at {url}"]
    assert "PREFECT_API_URL" not in os.environ
    assert not (tmp_path / "log").exists()


def test_the_configured_server_is_used_before_any_other(tmp_path: Path) -> None:
    with web(b"true") as url, temporary_settings({PREFECT_API_URL: url}):
        with prefect_api(tmp_path / "log", say=pytest.fail) as api:
            assert (api.url, api.temporary) == (url, False)
        assert get_current_settings().api.url == url


def test_a_configured_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(UserError, match=f"{url} does not answer .*unset PREFECT_API_URL"),
        prefect_api(tmp_path / "log"),
    ):
        pytest.fail("there is no server")


def test_no_log_is_left_in_a_folder_that_is_no_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(server, "DEFAULT_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setattr(server, "server_command", lambda port: [sys.executable, "-S", "-c", "raise SystemExit(3)"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is no DVC project"), prefect_api():
        pytest.fail("there is no server")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".dvc").mkdir()
    with pytest.raises(UserError, match="exit code 3"), prefect_api():
        pytest.fail("there is no server")
    assert [path.parent for path in tmp_path.rglob("*.log")] == [tmp_path / "scratch/runs"]


def test_a_temporary_server_that_dies_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit('no database')"]
    monkeypatch.setattr(server, "server_command", lambda port: command)
    log = tmp_path / "runs" / "server.log"
    with pytest.raises(UserError, match=f"exit code 1 before it answered; see {log}"), temporary_server(log):
        pytest.fail("there is no server")
    assert "no database" in log.read_text()


def test_a_temporary_server_that_never_answers_is_given_up_and_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    monkeypatch.setattr(server, "server_command", lambda port: [sys.executable, "-S", "-c", code])
    log = tmp_path / "server.log"
    with pytest.raises(UserError, match=r"did not answer within 2 s"), temporary_server(log, seconds=2):
        pytest.fail("there is no server")
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_temporary_server_serves_one_run_and_ends_with_it(tmp_path: Path, home: Path) -> None:
    driver = [sys.executable, "-c", DRIVER, str(tmp_path / "server.log")]
    done = subprocess.run(
        driver, env=driver_environment(home), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not answers(done.stdout.strip())
    # Log lines and events that are still on their way when the server is gone are reported there, a minute later.
    assert "rror logging to API" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (home / "prefect.db").exists(), "the run is to be found by the next server"
    with sqlite3.connect(home / "prefect.db") as database:
        messages = {row[0] for row in database.execute("select message from log")}
        states = [row[0] for row in database.execute("select state_type from task_run")]
    database.close()
    assert "from the task" in messages
    assert states == ["COMPLETED"]


@pytest.mark.fault
def test_a_killed_driver_leaves_no_server(tmp_path: Path, home: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "server.log"), "stay"],
        env=driver_environment(home),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert driver.stdout is not None
    url = driver.stdout.readline().strip()
    assert answers(url, 5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    end = time.monotonic() + 10
    while answers(url):
        assert time.monotonic() < end, "the server is still there"
        time.sleep(0.1)
