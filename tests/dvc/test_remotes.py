"""Results travel between clones through a DVC remote: a shared folder, and a real S3 server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PIPELINE = """\
stages:
  train:
    cmd: PYTHON stage.py train
    params: [rate]
    outs: [weights]
  probe:
    cmd: PYTHON stage.py probe
    deps: [weights]
    outs: [tables/0]
  figure:
    cmd: PYTHON stage.py figure
    deps: [draw.txt, tables]  # a folder above outputs, as the report's
    outs: [figure.svg]
"""
# Every run is written down, so that a test knows which commands ran.
STAGE = """\
import sys
from pathlib import Path

name = sys.argv[1]
with open("ran.txt", "a") as ran:
    ran.write(name + " ")
if name == "train":
    rate = Path("params.yaml").read_text()
    Path("weights").mkdir()
    for step in (1, 2):
        Path("weights", f"{step}.bin").write_bytes(f"{rate} {step}".encode() * 100_000)
elif name == "probe":
    content = Path("weights/2.bin").read_bytes()
    Path("tables/0").mkdir(parents=True)
    Path("tables/0/table.csv").write_text(f"bytes,start\\n{len(content)},{content[:9].decode()}\\n")
else:
    Path("figure.svg").write_text(f"<svg>{Path('draw.txt').read_text()}{Path('tables/0/table.csv').read_text()}</svg>")
"""
S3_SERVER = """\
import logging
import sys
import boto3
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel("ERROR")  # no line for every request
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
address = "http://{}:{}".format(*server.get_host_and_port())
boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="study")
print(address, flush=True)
sys.stdin.read()
"""


class Clone:
    """A clone of the study with a cache of its own, as on another machine."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def run(self, *command, code=0):
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def dvc(self, *arguments, code=0):
        return self.run(sys.executable, "-m", "dvc", *arguments, code=code)

    def ran(self):
        path = self.folder / "ran.txt"
        return path.read_text().split() if path.exists() else []

    def has(self, name):
        return (self.folder / name).exists()

    def cached_bytes(self):
        """Bytes of the outputs in this clone's cache."""
        return sum(path.stat().st_size for path in (self.folder / ".dvc/cache/files").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """No settings of the user's: neither for git and DVC nor for S3."""
    home = tmp_path_factory.mktemp("home")
    clean = {
        "HOME": str(home),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(home / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    } | {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    return inherited | clean


@pytest.fixture(scope="module")
def s3_server(environment):
    """Address of an S3 server with the bucket ``study``."""
    pytest.importorskip("moto", reason="the S3 server of these tests is moto's; install the extra dev")
    pytest.importorskip("dvc_s3", reason="DVC speaks S3 through dvc-s3; install the extra s3")
    command = [sys.executable, "-c", S3_SERVER]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address, "the S3 server did not start"
        yield address
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=["folder", "s3"])
def remote(request, tmp_path_factory):
    """Settings of the remote ``store``, as ``dvc remote add`` and ``dvc remote modify`` write them."""
    if request.param == "folder":
        return f"url = {tmp_path_factory.mktemp('store')}\n"
    return f"url = s3://study/dvc\n    endpointurl = {request.getfixturevalue('s3_server')}\n"


@pytest.fixture(scope="module")
def origin(remote, environment, tmp_path_factory):
    """The clone where all was run: rate 3 and not pushed, rate 2 and pushed, rate 1, pushed and committed."""
    folder = tmp_path_factory.mktemp("origin") / "study"
    folder.mkdir()
    clone = Clone(folder, environment)
    clone.run("git", "init", "-q", "-b", "main")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / ".dvc/config").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    {remote}")
    (folder / "dvc.yaml").write_text(PIPELINE.replace("PYTHON", sys.executable))
    (folder / "stage.py").write_text(STAGE)
    (folder / "draw.txt").write_text("first drawing")
    (folder / ".gitignore").write_text("/ran.txt\n/weights\n/tables\n/figure.svg\n")
    for rate, pushed in ((3, False), (2, True), (1, True)):
        (folder / "params.yaml").write_text(f"rate: {rate}\n")
        clone.dvc("repro", "-q")
        if pushed:
            clone.dvc("push", "--run-cache")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-q", "-m", "results")
    return clone


@pytest.fixture
def elsewhere(origin, tmp_path):
    """A fresh clone: what git has, an empty cache, and the settings of the remote."""
    origin.run("git", "clone", "-q", str(origin.folder), str(tmp_path / "clone"))
    return Clone(tmp_path / "clone", origin.environment)


def contents(clone):
    names = ["weights/1.bin", "weights/2.bin", "tables/0/table.csv", "figure.svg"]
    return {name: (clone.folder / name).read_bytes() for name in names}


def test_pull_brings_every_output_and_nothing_is_run(origin, elsewhere):
    elsewhere.dvc("pull")
    assert contents(elsewhere) == contents(origin)
    assert "up to date" in elsewhere.dvc("status")
    assert "up to date" in elsewhere.dvc("repro")
    assert elsewhere.ran() == []


def test_repro_leaves_all_on_the_remote_or_fetches_it(origin, elsewhere):
    elsewhere.dvc("repro", "--allow-missing")
    assert not elsewhere.has("weights")
    elsewhere.dvc("repro", "--pull")
    assert contents(elsewhere) == contents(origin)
    assert elsewhere.ran() == []


def test_one_figure_is_read_and_redrawn_without_the_weights(origin, elsewhere):
    elsewhere.dvc("pull", "figure")
    assert (elsewhere.folder / "figure.svg").read_bytes() == (origin.folder / "figure.svg").read_bytes()
    elsewhere.dvc("repro", "--allow-missing")
    assert elsewhere.ran() == []

    (elsewhere.folder / "draw.txt").write_text("second drawing")
    elsewhere.dvc("pull", "probe")
    elsewhere.dvc("repro", "--allow-missing", "figure")
    assert elsewhere.ran() == ["figure"]
    assert (elsewhere.folder / "figure.svg").read_text().startswith("<svg>second drawing")
    assert not elsewhere.has("weights")
    assert elsewhere.cached_bytes() < 10_000


def test_what_was_pushed_is_restored_though_no_commit_has_it(elsewhere):
    (elsewhere.folder / "params.yaml").write_text("rate: 2\n")
    elsewhere.dvc("repro", "--pull")
    assert elsewhere.ran() == []
    assert (elsewhere.folder / "weights/1.bin").read_text().startswith("rate: 2\n 1rate: 2")


def test_the_run_cache_alone_restores_nothing(elsewhere):
    """`dvc push --run-cache` sends the records of all runs, and the outputs of the present one only."""
    (elsewhere.folder / "params.yaml").write_text("rate: 3\n")
    elsewhere.dvc("repro", "--pull")
    assert elsewhere.ran() == ["train", "probe", "figure"]


def test_no_output_is_pushed_twice(origin):
    assert "Everything is up to date" in origin.dvc("push")
