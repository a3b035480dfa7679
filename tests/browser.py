"""Pages drawn by a real browser that can reach nothing outside this machine."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.client import ClientConnection

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def need_chromium() -> None:
    """Skip the test where there is no Chromium."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed, so the page was not drawn")


def draw_offline(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Load ``page`` in headless Chromium and return its document; skips the test where there is no Chromium.

    Every host name resolves to nothing: a page that needs one stays empty.
    """
    need_chromium()
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", *options, "--dump-dom"]
    return subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, check=True)


class Page:
    """One tab of a running Chromium, driven through the DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, seconds: float = 60.0, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that come meanwhile are looked at for requests."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        deadline = time.monotonic() + seconds
        while True:
            message = json.loads(self._connection.recv(timeout=max(0.1, deadline - time.monotonic())))
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def open(self, url: str, width: int = 1280, height: int = 800) -> None:
        """Go to ``url`` in a window of this size; does not wait for what the page then loads."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.evaluate("window.leftBehind = true")
        self.call("Page.navigate", url=url)
        self.wait_for("!window.leftBehind && document.body !== null")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60.0) -> Any:
        """Wait until a JavaScript expression is true, and return its value; fails with the text of the page."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(condition)):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds} s: {condition}\n{self.evaluate('document.body.innerText')}")
            time.sleep(0.2)
        return value

    def screenshot(self, path: Path | None = None) -> bytes:
        """The window as PNG; also written to ``path``."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return data


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of headless Chromium that reaches this machine only; skips the test where there is no Chromium.

    Args:
        profile: an empty folder for its user data.
    """
    need_chromium()
    from websockets.sync.client import connect

    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_debugger(profile / "DevToolsActivePort", process), max_size=None) as root:
            # The browser's own socket opens the tab; the tab has another one.
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            root.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
            target = json.loads(root.recv(timeout=60))["result"]["targetId"]
            with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None) as connection:
                yield Page(connection)
    finally:
        process.terminate()
        process.wait(20)


def _debugger(file: Path, process: subprocess.Popen[bytes], seconds: float = 60.0) -> str:
    """Address of the browser's socket once it has written it down."""
    deadline = time.monotonic() + seconds
    while not file.exists() or len(file.read_text().split()) < 2:
        assert process.poll() is None, f"Chromium ended with exit code {process.returncode}"
        assert time.monotonic() < deadline, f"Chromium did not open its debugger within {seconds} s"
        time.sleep(0.1)
    port, path = file.read_text().split()[:2]
    return f"ws://127.0.0.1:{port}{path}"
