"""What every stage entry shares: arguments, environment, paths, scratch, and how errors are told."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlheals.errors import EXIT_BAD_INPUT, UserError
from rlheals.params import ModelSpec, Params, load_params

if TYPE_CHECKING:
    from collections.abc import Callable

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
LIBRARIES = ("torch", "transformers", "trl")
"""The libraries that compute; a state saved under one version is not continued under another."""
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """One cell of the stage matrix.

    Attributes:
        params: the whole of ``params.yaml``.
        model: name under ``models``; empty for stages that collect all of them.
        seed: seed of this run.
        start: rung an RL branch starts from; only of branch stages.
        arm: arm of an RL branch; only of branch stages.
        root: project directory; all paths are relative to it.
    """

    params: Params
    model: str
    seed: int
    root: Path = Path()
    start: int | None = None
    arm: str = ""

    @property
    def spec(self) -> ModelSpec:
        """The model's block in params."""
        return self.params.model[self.model]

    def output(self, stage: str) -> Path:
        """Directory that ``stage`` publishes for this cell: ``data/<profile>/<stage>/<model>/<seed>``."""
        return self.root / "data" / self.params.profile / stage / self.model / str(self.seed)

    def branch(self, arm: str, start: int) -> Path:
        """Directory of one RL branch: ``data/<profile>/ppo/<model>/<seed>/<arm>/<rung>``."""
        return self.output("ppo") / arm / str(start)

    def scratch(self, stage: str, *blocks: Any) -> Path:
        """Directory for resumable state, named by a digest of all that decides the stage's numbers.

        That is ``blocks`` (the params and manifests the stage read), the package's code, the versions of `LIBRARIES`
        and the device that ``compute.device`` means here. A change of any gives another directory, so a state is never
        resumed under other settings, code or hardware.
        """
        versions = {name: version(name) for name in LIBRARIES}
        decides = [blocks, code_digest(), versions, resolve_device(self.params.compute.device)]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:12]
        branch = f"{self.arm}-{self.start}-" if self.arm else ""
        name = f"{self.params.profile}-{self.model}-{self.seed}-{branch}{digest}"
        return self.root / "scratch" / stage / name

    def answering(self, engine: str | None = None) -> list[Any]:
        """What decides answers beside weights and prompts, for `scratch`: the model's block, and what answers how.

        Args:
            engine: what answers, where that is not ``inference.engine``.
        """
        from rlheals.inference.vllm.checks import installed

        inference = self.params.inference
        return [self.spec, inference, installed() if (engine or inference.engine) == "vllm" else None]

    def columns(self) -> dict[str, Any]:
        """The columns every table starts with."""
        return {"profile": self.params.profile, "model": self.model, "seed": self.seed}


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """Hex sha256 over the paths and bytes of all Python files of the package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def quiet_environment(threads: int) -> None:
    """Switch telemetry and network look-ups off and fix the thread count; call before torch is imported."""
    os.environ.update(OFFLINE)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["MKL_NUM_THREADS"] = str(threads)


def resolve_device(device: str, key: str = "compute.device") -> str:
    """``auto`` becomes ``cuda`` when torch sees one, else ``cpu``.

    Args:
        device: cpu, cuda or auto.
        key: where it was given, for the message.

    Raises:
        UserError: ``cuda`` is asked for and torch sees none.
    """
    if device == "cpu":
        return device
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(f"{key} is cuda, but torch sees no CUDA device; set it to auto or cpu.")
    return "cuda" if available else "cpu"


def _cell(params: Params, model: str, seed: int) -> Run:
    if model not in params.model:
        raise UserError(f"--model {model} has no block under model in params.yaml; add one or fix the name.")
    return Run(params, model, seed)


def _branch(run: Run, start: int, arm: str) -> Run:
    settings = run.params.ppo
    if start not in settings.starts:
        raise UserError(
            f"--checkpoint-step {start} is not in ppo.starts of params.yaml, which holds {settings.starts}."
        )
    if arm not in settings.arms:
        raise UserError(f"--arm {arm} is not in ppo.arms of params.yaml, which holds {settings.arms}.")
    return replace(run, start=start, arm=arm)


def run_stage(stage: Callable[[Run], None], *, per_model: bool = True, per_branch: bool = False) -> None:
    """Parse arguments, load params and run ``stage``; a `UserError` becomes one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(sys.modules[stage.__module__].__doc__ or "").strip())
    if per_model:
        parser.add_argument("--model", required=True, help="model name, one of `models` in params.yaml")
        parser.add_argument("--seed", required=True, type=int, help="seed, one of `seeds` in params.yaml")
    if per_branch:
        parser.add_argument("--checkpoint-step", required=True, type=int, help="rung, one of ppo.starts in params.yaml")
        parser.add_argument("--arm", required=True, help="one of ppo.arms in params.yaml")
    arguments = parser.parse_args()
    try:
        params = load_params()
        quiet_environment(params.compute.threads)
        run = _cell(params, arguments.model, arguments.seed) if per_model else Run(params, "", 0)
        stage(_branch(run, arguments.checkpoint_step, arguments.arm) if per_branch else run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
