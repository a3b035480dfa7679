"""A small pipeline with fan-out, whose stages do as they are told, in a repository of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DVC_YAML = """
stages:
  data:
    cmd: python -S stage.py data out/data
    deps: [stage.py, input.txt]
    outs: [out/data]
    meta: {timeout: 60}
  train:
    desc: One folder with every rung.
    cmd: python -S stage.py train out/train
    params: [lr, steps]
    deps: [stage.py, out/data]
    outs: [out/train]
    meta:
      timeout: ${timeout}
      retries: ${retries}
  ppo:
    matrix:
      step: ${steps}
    cmd: python -S stage.py ppo out/ppo/${item.step} ${item.step}
    params: [lr]
    deps:
      - stage.py
      - out/train/${item.step}
    outs:
      - out/ppo/${item.step}
    meta:
      gpus: ${gpus}
      timeout: ${timeout}
      retries: ${retries}
  report:
    cmd: python -S stage.py report report.json
    params: [steps]
    deps: [stage.py, out/ppo]
    outs:
      - report.json:
          cache: false
"""
PARAMS = {"steps": [1, 2, 3, 4], "lr": 1, "timeout": 60, "retries": 0, "gpus": 0}
STAGE = '''
"""stage.py KIND OUT [STEP]: do as behaviour.json says for KIND or KIND@STEP, then write OUT."""
import json, os, pathlib, sys, time
kind, out, *step = sys.argv[1:]
name = "@".join([kind, *step])
with open("ran.log", "a") as log:
    log.write(name + "\\n")
todo = json.loads(pathlib.Path("behaviour.json").read_text()).get(name, {})
if todo.get("loud", True):
    print("stage", name, "on GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if todo.get("child"):
    import subprocess
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path("child.pid").write_text(str(child.pid))
pathlib.Path(name + ".pid").write_text(str(os.getpid()))
if "total" in todo:
    with os.fdopen(int(os.environ["RLHEALS_PROGRESS_FD"]), "w") as progress:
        for done in range(todo["total"] + 1):
            progress.write(json.dumps({"label": kind, "done": done, "total": todo["total"], "unit": "step"}) + "\\n")
            progress.flush()
            time.sleep(todo.get("sleep", 0) / todo["total"])
else:
    time.sleep(todo.get("sleep", 0))
if todo.get("failures", 0) >= pathlib.Path("ran.log").read_text().splitlines().count(name):
    print("it failed on purpose", flush=True)
    raise SystemExit(todo.get("code", 1))
target = pathlib.Path(out)
target.parent.mkdir(parents=True, exist_ok=True)
if todo.get("forget"):
    raise SystemExit
params = dict(line.split(": ", 1) for line in pathlib.Path("params.yaml").read_text().splitlines() if line)
steps = json.loads(params["steps"])
if kind == "train":
    for rung in steps:
        (target / str(rung)).mkdir(parents=True)
        (target / str(rung) / "weights").write_text(f"{rung} {params['lr']} {pathlib.Path('out/data').read_text()}")
elif kind == "ppo":
    target.mkdir()
    (target / "weights").write_text("branch of " + pathlib.Path("out/train", step[0], "weights").read_text())
elif kind == "report":
    found = sorted(int(path.name) for path in pathlib.Path("out/ppo").iterdir() if path.is_dir())
    if found != sorted(steps):
        print(f"error: out/ppo holds {found} and params.yaml declares {sorted(steps)}")
        raise SystemExit(2)
    target.write_text(json.dumps({"steps": found}))
else:
    target.write_text("data from " + pathlib.Path("input.txt").read_text())
'''


class Workspace:
    """A copy of the small pipeline."""

    def __init__(self, folder: Path, **params: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.py").write_text(STAGE)
        (folder / "dvc.yaml").write_text(DVC_YAML)
        (folder / "input.txt").write_text("first\n")
        (folder / ".gitignore").write_text("/scratch\n/out\n*.pid\nran.log\nbehaviour.json\n__pycache__\n")
        self.params(**params)
        self.behave()
        self.call("git", "init", "-q")
        # What `dvc init` writes, without its second of start-up.
        (folder / ".dvc").mkdir(exist_ok=True)
        (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n[cache]\n    type = hardlink,symlink\n")
        (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")

    def params(self, **changes: Any) -> None:
        """Write params.yaml; what is not named has its default."""
        content = PARAMS | changes
        (self.folder / "params.yaml").write_text("".join(f"{key}: {json.dumps(v)}\n" for key, v in content.items()))

    def behave(self, **todo: dict[str, Any]) -> None:
        """What stages do from now on, for example ``behave(train={"sleep": 3}, **{"ppo@2": {"failures": 1}})``."""
        (self.folder / "behaviour.json").write_text(json.dumps(todo))

    def ran(self) -> list[str]:
        """Stages that ran since the last call, in the order they began."""
        log = self.folder / "ran.log"
        names = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def call(self, *command: str, code: int | None = 0) -> str:
        """Output of a command in the workspace, with its exit code checked."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert code is None or done.returncode == code, done.stdout
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What `dvc status` finds out of date."""
        found: dict[str, Any] = json.loads(self.call("dvc", "status", "--json"))
        return found

    def commit(self) -> None:
        """Commit everything to git."""
        self.call("git", "add", "-A")
        self.call("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "state")


def environment(**more: str) -> dict[str, str]:
    """The tests' environment, with the interpreter that runs them first on the path."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"} | more
