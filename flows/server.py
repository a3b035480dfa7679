"""A Prefect server for a run from the command line: the one that is there, or a temporary one that ends with it."""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.orchestration.guard import Guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_URL = "http://127.0.0.1:4200/api"
"""Where `prefect server start` listens unless told otherwise."""
LOGS = Path("scratch/runs")
PROBE_SECONDS = 0.5
START_SECONDS = 180.0
"""Prefect's own limit is 20 s, which a busy machine does not keep."""


@dataclass(frozen=True)
class Api:
    """The server in use.

    Attributes:
        url: its API, ending in ``/api``.
        temporary: it was started for this run and ends with it; it has no UI, its records stay in Prefect's database.
    """

    url: str
    temporary: bool


@contextmanager
def prefect_api(
    log: Path | None = None, say: Callable[[str], None] = print, seconds: float = START_SECONDS
) -> Iterator[Api]:
    """Make a Prefect API available to this process and its children while the body runs.

    In this order: the one Prefect is configured for (``PREFECT_API_URL`` or a profile), one that answers at Prefect's
    default address, a temporary one on a free port. The temporary one uses the same database as any other server of
    this user, so its runs are there to see the next time `prefect server start` runs.

    Args:
        log: file for the output of a temporary server; by default in ``scratch/runs``.
        say: is told in a sentence what is used.
        seconds: how long a temporary server may take to answer.

    Raises:
        UserError: the configured server does not answer, or a temporary one does not start or would leave its log
            outside a project.
    """
    from prefect.settings import get_current_settings

    configured = get_current_settings().api.url
    if configured:
        _check(configured)
        yield Api(configured, temporary=False)
    elif answers(DEFAULT_URL):
        say(f"using the Prefect server at {DEFAULT_URL}")
        with _use(DEFAULT_URL):
            yield Api(DEFAULT_URL, temporary=False)
    else:
        with temporary_server(log or _log_file(), seconds) as url, _use(url):
            yield Api(url, temporary=True)


def answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a Prefect API says at once that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=seconds) as reply:  # fixed http address
            return bool(reply.read(16).strip() == b"true")
    except (OSError, ValueError, urllib.error.URLError):
        return False


@contextmanager
def temporary_server(log: Path, seconds: float = START_SECONDS) -> Iterator[str]:
    """Run a Prefect server without UI while the body runs, and give the address of its API.

    Raises:
        UserError: it ended, or did not answer in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with log.open("ab") as output:
        server = Guarded(server_command(port), cwd=".", environment=server_environment(), output=output.fileno())
    with server:
        _await_answer(server, url, log, seconds)
        try:
            yield url
        finally:
            send_what_waits()


def send_what_waits(seconds: float = 10.0) -> None:
    """Wait until the log lines and events of this process are with the server, which would be gone at exit."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    from flows.artifacts import wait_for_updates

    wait_for_updates()
    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=seconds)


def server_command(port: int) -> list[str]:
    """The command of Prefect's own temporary server (``SubprocessASGIServer``)."""
    import prefect

    return [
        *(sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)),
        *("--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)),
        *("--log-level", "error", "--lifespan", "on"),
    ]


def server_environment() -> dict[str, str]:
    """Variables of a temporary server: the settings of this process, no UI, no block types (which take seconds)."""
    from prefect.settings import get_current_settings

    own = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    return {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True), **own}


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log_file() -> Path:
    """Where the output of a temporary server goes in the project folder, which this must be."""
    if not Path(".dvc").is_dir():
        raise UserError(
            f"{Path.cwd()} is no DVC project (it has no folder .dvc); run the command in the project's folder."
        )
    return LOGS / f"server-{os.getpid()}.log"


def _check(url: str) -> None:
    """Ask the configured server with Prefect's client, which knows its keys, proxies and certificates."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        trouble = client.api_healthcheck()
    if trouble is not None:
        raise UserError(
            f"the Prefect server at {url} does not answer ({trouble}): start it with `prefect server start`, "
            "or unset PREFECT_API_URL so that a temporary one is started."
        )


@contextmanager
def _use(url: str) -> Iterator[None]:
    """Point Prefect at ``url``: by its settings in this process, by the environment in children."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = url
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        if before is None:
            os.environ.pop("PREFECT_API_URL", None)
        else:
            os.environ["PREFECT_API_URL"] = before


def _await_answer(server: Guarded, url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not answers(url):
        if server.process.poll() is not None:
            raise UserError(
                f"the temporary Prefect server ended with exit code {server.process.returncode} before it answered; "
                f"see {log}, or start one yourself with `prefect server start`."
            )
        if time.monotonic() > deadline:
            raise UserError(
                f"the temporary Prefect server did not answer within {seconds:.0f} s; see {log}, "
                "or start one yourself with `prefect server start`."
            )
        time.sleep(0.1)
