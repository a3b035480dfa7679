"""What tests/stages/test_vllm_stages.py runs in a process of its own: stages on vLLM and on transformers.

Run: python -m tests.stages.vllm_program ROOT
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlheals.stages.common import quiet_environment

quiet_environment(1)

import polars as pl  # noqa: E402

from rlheals.errors import UserError  # noqa: E402
from rlheals.inference.vllm import engine as engine_module  # noqa: E402
from rlheals.reporting.schemas import read_table  # noqa: E402
from rlheals.stages.base import base  # noqa: E402
from rlheals.stages.common import Run  # noqa: E402
from rlheals.stages.dataset import dataset  # noqa: E402
from rlheals.stages.ppo import ppo  # noqa: E402
from rlheals.stages.probe_rl import probe_rl  # noqa: E402
from rlheals.stages.probe_sft import probe_sft  # noqa: E402
from rlheals.stages.restore import restore  # noqa: E402
from rlheals.stages.sft import sft  # noqa: E402
from tests.stages.test_probe_rl import make_branch, params  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = (
    "sft.checkpoints=[0, 2, 3]",
    "ppo.starts=[2, 3]",
    "ppo.arms=[ppo]",
    "restore.layer_blocks=2",
    "restore.heads=[0.2]",
    "restore.tails=[]",
    "restore.doses=[]",
    "restore.references=[base]",
    "restore.starts=false",
    "restore.screen=1",
    "restore.best=1",
    "restore.id_budget=1.0",
)
VLLM = ("inference.engine=vllm", "inference.max_sequences=32", "inference.memory_fraction=0.05")
CHANGE = "ppo.change={minibatch: 4, micro_batch: 4, critic_warmup_updates: 0, least_readable: 0.0}"
ENGINE_OF = pl.exclude("engine", "seconds")


def answers(run: Run, stage: str) -> list[dict[str, Any]]:
    """The stage's answers, whatever engine gave them."""
    return read_table(run.output(stage) / "answers.parquet", "answers").select(ENGINE_OF).to_dicts()


def engines(run: Run, stage: str) -> list[str]:
    return sorted(set(read_table(run.output(stage) / "answers.parquet", "answers")["engine"]))


def probes(run: Run) -> None:
    for stage in (probe_sft, probe_rl, restore):
        stage(run)


def dying(*calls: int) -> Callable[[], None]:
    """Let the engine die at these calls of its `generate`, counted over restarts; returns what undoes it."""
    start, count = engine_module.start, [0]

    def start_dying(*arguments: Any) -> Any:
        llm = start(*arguments)
        generate = llm.generate

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] in calls:
                raise RuntimeError("a worker was killed")
            return generate(*args, **kwargs)

        llm.generate = counted
        return llm

    engine_module.start = start_dying

    def undo() -> None:
        engine_module.start = start

    return undo


def train(run: Run) -> dict[str, Any]:
    """A PPO branch whose episodes vLLM plays."""
    branch = replace(run, start=3, arm="ppo")
    shutil.rmtree(branch.branch("ppo", 3))
    ppo(branch)
    folder = branch.branch("ppo", 3)
    rows = read_table(folder / "rl_training.parquet", "rl_training")
    doctor = read_table(folder / "doctor.parquet", "doctor")
    return {
        "engine": rows["engine_ratio_deviation"].to_list(),
        "first": rows["ratio_max_deviation_first"].to_list(),
        "doctor": dict(doctor.select("check", "level").iter_rows()),
    }


def main(root: Path) -> None:
    plain = Run(params(*SMALL), "tiny", 0, root / "plain")
    for stage in (dataset, base, sft, probe_sft):
        stage(plain)
    for start, rung in ((2, 3), (3, 2)):
        make_branch(plain, "ppo", start, rung)
    shutil.copytree(root / "plain" / "data", root / "vllm" / "data", ignore=shutil.ignore_patterns("probe_sft"))
    served = Run(params(*SMALL, *VLLM, "ppo.rollouts=vllm", "ppo.episodes=8", CHANGE), "tiny", 0, root / "vllm")
    for stage in (probe_rl, restore):
        stage(plain)
    probes(served)
    found: dict[str, Any] = {
        stage: {"same": answers(plain, stage) == answers(served, stage), "count": len(answers(served, stage))}
        | {"engines": engines(served, stage)}
        for stage in ("probe_sft", "probe_rl", "restore")
    }

    shutil.rmtree(served.output("restore"))
    undo = dying(40, 60)
    try:
        restore(served)
    except UserError as error:
        found["died twice"] = str(error)
    undo()
    found["kept"] = len(list((root / "vllm" / "scratch").rglob("cells/select/*.json")))
    found["published"] = served.output("restore").exists()
    restore(served)
    found["went on"] = answers(plain, "restore") == answers(served, "restore")
    found["ppo"] = train(served)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
