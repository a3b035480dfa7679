"""Our PPO against that of TRL 1.12 on one single-turn task: tokens a second, and reward after equal episodes.

Run: python -m bench.bench_ppo_trl --trl-python PYTHON     (after `dvc repro`, or `dvc pull`: it starts from `mini`)

PYTHON is that of an environment of its own with TRL 1.12, the last release that had PPO, and what the task needs:
`uv pip install trl==1.12.0 transformers==5.17.0 torch==2.13.0 polars pydantic`, under this repository's constraints.txt
without its line for TRL.

Both start from the same weights and play the same hands in the same order, with one thread, the same token budget,
temperature, minibatches, epochs and learning rates. ``tokens a CPU second`` counts response tokens over the whole
update (rollout, grading, scoring, training), without the updates in which our critic warms up. The trained policies are
compared on hands that neither played, by one engine at the training temperature. A learning rate that suits one trainer
need not suit the other, so the comparison is made at more than one (``--factors``).

TRL's algorithm stays its own: a second backbone for the critic, values, ratios and advantages by token, the sampled KL
in the reward, no clipping of gradients, no warm-up of the critic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ruamel.yaml import YAML

from rlheals.evaluation.dialogue import Dialogue
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model
from rlheals.params import parse_params
from rlheals.profile import render
from rlheals.stages.common import Run
from rlheals.stages.ppo import make_branch, parent_of
from rlheals.training.ppo.rollout import collect, draw_hands
from rlheals.training.ppo.settings import settings_of
from rlheals.training.ppo.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.training.ppo.trainer import BranchRun

REPOSITORY = Path(__file__).resolve().parent.parent
LADDER_SEED = 0
"""Of the dataset, the base and the rung; the seeds of the comparison draw hands, answers and minibatches."""
TESTS = 8
"""Batches of hands, of an update's size, that judge a trained policy."""


@dataclass(frozen=True)
class Cell:
    """One comparison: the same arm, factor of `mini`'s learning rates, rung and seed in both trainers."""

    arm: str
    factor: float
    start: int
    seed: int
    updates: int
    root: str
    trl_python: str


@dataclass(frozen=True)
class Trained:
    """What one trainer did in one cell.

    Attributes:
        tokens_per_cpu: response tokens a CPU second of whole updates, warm-up left out.
        tokens_per_second: the same by the clock on the wall.
        update: median CPU seconds of an update.
        response: mean tokens of a response.
        played: mean reward over all training episodes.
        reward: of the trained policy on new hands.
        error: standard error of ``reward``.
        solved: share of new hands it solves.
    """

    tokens_per_cpu: float
    tokens_per_second: float
    update: float
    response: float
    played: float
    reward: float
    error: float
    solved: float


def main() -> None:
    """Measure all cells and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of the environment with TRL 1.12")
    parser.add_argument("--root", default=".", help="folder that holds data/mini")
    parser.add_argument("--start", type=int, default=40, help="rung of the ladder")
    parser.add_argument("--arms", nargs="+", default=["ppo"], choices=["ppo", "reward_only"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101])
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[1.0, 0.3], help="learning rates of both, over those of mini"
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells run at the same time, one thread each")
    options = parser.parse_args()
    if options.trl_python is None:  # `make bench` runs every script as it is
        print("skipped: needs --trl-python, the python of an environment with TRL 1.12 (see --help)")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    root = str(Path(options.root).resolve())
    cells = [
        Cell(arm, factor, options.start, seed, options.updates, root, options.trl_python)
        for arm in options.arms
        for factor in options.factors
        for seed in options.seeds
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compare, cells))
    print(f"rung {options.start}, {options.updates} updates; against {results[0]['versions']}\n")
    report(cells, results)


def compare(cell: Cell) -> dict[str, Any]:
    """Train with both and judge the start and both ends."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        branch = make(cell, folder)
        start = judge(branch, cell)
        theirs, versions = train_trl(cell, branch, folder)
        ours = train_ours(cell, branch)
    return {"start": start, "ours": ours, "trl": theirs, "versions": versions}


def make(cell: Cell, scratch: Path) -> BranchRun:
    """Our branch; nothing of it is published."""
    run = ladder_run(cell)
    settings = settings_of(run.params.ppo, cell.arm)
    rates = {name: getattr(settings, name) * cell.factor for name in ("learning_rate", "critic_learning_rate")}
    made = make_branch(run, settings.model_copy(update=rates), scratch, {})
    return replace(made, updates=cell.updates, rollout=replace(made.rollout, seed=cell.seed))


def ladder_run(cell: Cell) -> Run:
    """The cell of the study that holds the rung."""
    text = render("mini", ["compute.threads=1", f"ppo.arms=[{cell.arm}]"]).text
    params = parse_params(YAML(typ="safe").load(text))
    return Run(params, "tiny", LADDER_SEED, Path(cell.root), start=cell.start, arm=cell.arm)


def train_ours(cell: Cell, branch: BranchRun) -> Trained:
    """All updates of our trainer."""
    trainer = Trainer(branch)
    stamps, batches = [(time.process_time(), time.perf_counter())], []
    for index in range(cell.updates):
        row, _ = trainer.update(index)
        stamps.append((time.process_time(), time.perf_counter()))
        reward = row["reward_mean"] * branch.episodes
        batches.append({"episodes": branch.episodes, "reward": reward, "tokens": row["tokens"]})
    return summary(stamps, batches, branch.settings.critic_warmup_updates, judge(branch, cell))


def train_trl(cell: Cell, branch: BranchRun, folder: Path) -> tuple[Trained, str]:
    """The same hands, in TRL's environment; also the versions there."""
    job = folder / "job.json"
    job.write_text(json.dumps(description(cell, branch)))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [cell.trl_python, "-W", "ignore", str(REPOSITORY / "bench" / "trl_ppo.py"), str(job)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"TRL's side failed:\n{done.stderr[-3000:]}")
    result = json.loads((folder / "result.json").read_text())
    policy = load_model(folder / "policy", "float32", branch.device)
    judged = judge(replace(branch, policy=policy), cell)
    trained = summary(result["stamps"], result["batches"], branch.settings.critic_warmup_updates, judged)
    return trained, ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def description(cell: Cell, branch: BranchRun) -> dict[str, Any]:
    """What TRL's side needs to play and train the same."""
    run = ladder_run(cell)
    items = [item for update in range(cell.updates) for _, item in hands(branch, update)]
    dialogue, form = Dialogue(branch.tokenizer), branch.rollout.prompt_format
    prompts = [dialogue.prompt_ids(branch.task.episode(item, form, 1, "none").prompt) for item in items]
    return {
        "seed": cell.seed,
        "updates": cell.updates,
        "episodes": branch.episodes,
        "start": str(parent_of(run)),
        "reference": str(run.output("base")),
        "settings": branch.settings.model_dump(mode="json"),
        "max_new_tokens": branch.rollout.sampling.max_new_tokens,
        "task": run.params.task_spec.model_dump(mode="json"),
        "prompt_format": form,
        "prompts": prompts,
        "items": items,
    }


def hands(branch: BranchRun, update: int) -> list[tuple[str, str]]:
    """Those our trainer plays in ``update``."""
    rows = draw_hands(len(branch.prompts), branch.episodes, branch.rollout.seed, update)
    return [branch.prompts[row] for row in rows]


@torch.no_grad()
def judge(branch: BranchRun, cell: Cell) -> tuple[float, float, float]:
    """Mean reward, its standard error and the share solved.

    On the hands behind the last update, which are new while the table lasts.
    """
    engine, dialogue = TransformersEngine(branch.policy, branch.tokenizer, 256), Dialogue(branch.tokenizer)
    records = [
        record
        for update in range(cell.updates, cell.updates + TESTS)
        for record in collect(engine, dialogue, branch.task, hands(branch, update), branch.rollout, update)
    ]
    rewards = [record.total_reward for record in records]
    error = statistics.stdev(rewards) / len(rewards) ** 0.5
    return statistics.fmean(rewards), error, statistics.fmean(record.solved for record in records)


def summary(
    stamps: Sequence[Sequence[float]],
    batches: Sequence[dict[str, float]],
    warm_up: int,
    judged: tuple[float, float, float],
) -> Trained:
    """Rates over the updates behind the warm-up, rewards over all."""
    tokens = sum(batch["tokens"] for batch in batches[warm_up:])
    cpu, wall = (stamps[-1][kind] - stamps[warm_up][kind] for kind in (0, 1))
    times = [after[0] - before[0] for before, after in zip(stamps[warm_up:], stamps[warm_up + 1 :], strict=False)]
    episodes = sum(batch["episodes"] for batch in batches)
    return Trained(
        tokens_per_cpu=tokens / cpu,
        tokens_per_second=tokens / wall,
        update=statistics.median(times),
        response=sum(batch["tokens"] for batch in batches) / episodes,
        played=sum(batch["reward"] for batch in batches) / episodes,
        reward=judged[0],
        error=judged[1],
        solved=judged[2],
    )


def report(cells: Sequence[Cell], results: Sequence[dict[str, Any]]) -> None:
    """Two rows for every cell, and one for every arm and factor."""
    columns = list(asdict(results[0]["ours"]))
    print("| arm, rates, seed | trainer | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell, result in zip(cells, results, strict=True):
        groups.setdefault((cell.arm, cell.factor), []).append(result)
        for trainer in ("ours", "trl"):
            numbers = " | ".join(f"{number:.4g}" for number in asdict(result[trainer]).values())
            print(f"| {cell.arm}, × {cell.factor:g}, {cell.seed} | {trainer} | {numbers} |")
    print("\n| arm, rates | tokens/s, ours over TRL (goal ≥ 1) | reward: start, ours, TRL | ours - TRL (goal ≥ 0) |")
    print("|---|---|---|---|")
    for (arm, factor), group in groups.items():
        print(conclusion(f"{arm}, × {factor:g}", group))


def conclusion(label: str, results: Sequence[dict[str, Any]]) -> str:
    """One row of the second table: the median ratio and mean rewards over seeds, and in brackets each seed."""
    speed = [result["ours"].tokens_per_cpu / result["trl"].tokens_per_cpu for result in results]
    rewards = [(result["start"][0], result["ours"].reward, result["trl"].reward) for result in results]
    gaps = [ours - theirs for _, ours, theirs in rewards]
    means = ", ".join(f"{statistics.fmean(column):.3f}" for column in zip(*rewards, strict=True))
    each = ", ".join(f"{ratio:.2f}" for ratio in speed)
    by_seed = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return (
        f"| {label} | **{statistics.median(speed):.2f}** ({each}) | {means} "
        f"| **{statistics.fmean(gaps):+.3f}** ({by_seed}) |"
    )


if __name__ == "__main__":
    main()
