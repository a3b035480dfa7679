"""Pages drawn by a real browser that can reach nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")


def draw_offline(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Load ``page`` in headless Chromium and return its document; skips the test where there is no Chromium.

    Every host name resolves to nothing: a page that needs one stays empty.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed, so the page was not drawn")
    command = f"{CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", *options, "--dump-dom"]
    return subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, check=True)
