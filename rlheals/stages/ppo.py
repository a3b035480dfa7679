"""Train one RL branch: one arm from one rung of the ladder, on in-distribution prompts only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.publish import MANIFEST, publish, sha256_file, verify
from rlheals.reporting.schemas import SCHEMAS, read_table, write_table
from rlheals.stages.common import Run, resolve_device, run_stage

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.inference import Engine
    from rlheals.params import Params
    from rlheals.training.ppo.settings import PpoSettings
    from rlheals.training.ppo.state import Curves
    from rlheals.training.ppo.trainer import BranchRun

BRANCH = "branch.json"


def ppo(run: Run) -> None:
    """Publish ``data/<profile>/ppo/<model>/<seed>/<arm>/<rung>``: weights at declared updates, curves, diagnosis."""
    from rlheals.training.ppo.settings import settings_of
    from rlheals.training.ppo.trainer import UPDATES

    settings = settings_of(run.params.ppo, run.arm)
    dataset, parent = run.output("dataset"), parent_of(run)
    inputs: dict[str, Any] = {
        "dataset": verify(dataset),
        "parent": weights_digest(parent),
        "reference": weights_digest(reference_folder(run, settings)) if settings.kl_coefficient > 0 else None,
    }
    params = run.params
    asked = params.ppo
    decides = [asked.updates, asked.episodes, asked.attempts, asked.checkpoints, asked.rollouts]
    scratch = run.scratch(
        "ppo",
        decides,
        settings.model_dump(),
        params.task,
        run.answering(rollout_engine(params)),
        params.compute,
        inputs,
    )
    identity = {"parent": str(parent), "parent_sha256": inputs["parent"], "settings": settings.model_dump()}
    branch = make_branch(run, settings, scratch, identity)
    curves = train(run.arm, branch)
    if is_main_process():
        _publish(run, scratch / UPDATES, curves, {**identity, "reference_sha256": inputs["reference"]})
        shutil.rmtree(scratch, ignore_errors=True)


def is_main_process() -> bool:
    """Whether this is the only process, or the first that the launcher started."""
    return os.environ.get("RANK", "0") == "0"


def parent_of(run: Run) -> Path:
    """Folder of the rung the branch starts from.

    Raises:
        UserError: the ladder or this rung of it is missing or was never completed.
    """
    ladder = run.output("sft")
    folder = ladder / f"checkpoint-{run.start}"
    if not folder.is_dir() or not (ladder / MANIFEST).is_file():
        raise UserError(
            f"{folder}, the parent of this branch, does not exist or was never completed; run the stage that writes it "
            f"(`dvc repro sft`), with {run.start} in sft.checkpoints."
        )
    return folder


def reference_folder(run: Run, settings: PpoSettings) -> Path:
    """Folder of the model that the KL term holds on to: the base, or the branch's own start."""
    return parent_of(run) if settings.kl_reference == "start" else run.output("base")


def weights_digest(folder: Path) -> str:
    """One sha256 for all weights of a model folder: the file's own, or that of the shards' in order.

    Raises:
        UserError: the folder has no safetensors.
    """
    from rlheals.models.checkpoint import weight_files

    digests = [sha256_file(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def make_branch(run: Run, settings: PpoSettings, scratch: Path, identity: dict[str, Any]) -> BranchRun:
    """Everything the training needs, loaded and checked.

    Raises:
        UserError: a folder does not load or differs from its manifest.
    """
    import torch

    from rlheals.inference import Sampling
    from rlheals.inference.fingerprint import context_of
    from rlheals.models.checkpoint import load_model, load_tokenizer
    from rlheals.tasks import make_task
    from rlheals.training.ppo.reference import load_reference
    from rlheals.training.ppo.rollout import RolloutSettings
    from rlheals.training.ppo.trainer import BranchRun

    params, parent = run.params, parent_of(run)
    device = resolve_device(params.compute.device)
    if device == "cuda":  # every process of a launcher has a GPU of its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    task = make_task(params.task_spec)
    # Weights stay float32 whatever the model's dtype: a step of 1e-6 is lost in the rounding of a bfloat16 weight.
    policy = load_model(parent, "float32", device)
    prompts = read_table(run.output("dataset") / "rl_prompts.parquet", "rl_prompts")
    sampling = Sampling(
        max_new_tokens=task.format(run.spec.prompt_format).max_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    return BranchRun(
        policy=policy,
        reference=load_reference(settings, policy, run.output("base"), parent, run.spec.dtype),
        tokenizer=load_tokenizer(parent),
        make_engine=lambda model, tokenizer: engine_around(run, parent, model, tokenizer),
        task=task,
        prompts=list(prompts.select("hand_id", "item").iter_rows()),
        settings=settings,
        updates=params.ppo.updates,
        episodes=params.ppo.episodes,
        checkpoints=params.ppo.checkpoints,
        state_every=params.ppo.state_every,
        rollout=RolloutSettings(
            prompt_format=run.spec.prompt_format,
            attempts=params.ppo.attempts,
            sampling=sampling,
            context=min(context_of(policy.config), params.inference.max_context),
            seed=run.seed,
        ),
        scratch=scratch,
        identity=identity,
        bfloat16=run.spec.dtype == "bfloat16",
        device=device,
        label=f"{run.arm}@{run.start}",
        engine_dtype=run.spec.dtype,
    )


ROLLOUT_MEMORY = 0.3
"""Share of the GPU for an engine beside the model in training."""


def rollout_engine(params: Params) -> str:
    """Name of the engine that plays the episodes."""
    return "vllm" if params.ppo.rollouts == "vllm" else params.inference.engine


def engine_around(run: Run, parent: Path, model: Any, tokenizer: Any) -> Engine:
    """Who plays the episodes: the model in training itself, or a copy that gets its weights before every update.

    ``ppo.rollouts: vllm`` serves the copy by a vLLM in this process, one a process of the training; with ``policy``,
    another ``inference.engine`` than transformers serves it all the same.

    Raises:
        UserError: the engine is missing, does not serve the model, or cannot swap weights.
    """
    from rlheals.inference import make_engine
    from rlheals.inference.transformers_engine import TransformersEngine

    inference = run.params.inference
    name = rollout_engine(run.params)
    if name == TransformersEngine.name:
        return TransformersEngine(model, tokenizer, inference.batch_size, str(model.device))
    memory = min(ROLLOUT_MEMORY, inference.memory_fraction)
    engine = make_engine(run.params, parent, run.spec.dtype, engine=name, tensor_parallel=1, memory_fraction=memory)
    if not engine.capabilities.swap:
        raise UserError(
            f"inference.engine is {name}, whose weights cannot be changed, so it cannot play for a model in training; "
            "set inference.engine: transformers or vllm."
        )
    return engine


def train(arm: str, branch: BranchRun) -> Curves:
    """Train with the algorithm of ``arm``: TRL's for grpo, ours for the rest."""
    if arm == "grpo":
        from rlheals.training.grpo import train_grpo

        return train_grpo(branch)
    from rlheals.training.ppo.trainer import train_branch

    return train_branch(branch)


def _publish(run: Run, updates: Path, curves: Curves, branch: dict[str, Any]) -> None:
    from rlheals.training.ppo.doctor import diagnose

    columns = {**run.columns(), "checkpoint_step": run.start, "arm": run.arm}
    training = _table("rl_training", [{**columns, **row} for row in curves.training])
    with publish(run.branch(run.arm, run.start or 0)) as directory:
        for update in run.params.ppo.checkpoints:
            shutil.copytree(updates / f"update-{update}", directory / f"update-{update}")
        write_table(training, "rl_training", directory / "rl_training.parquet")
        write_table(
            _table("advantages", [{**columns, **row} for row in curves.advantages]),
            "advantages",
            directory / "advantages.parquet",
        )
        write_table(diagnose(training), "doctor", directory / "doctor.parquet")
        (directory / BRANCH).write_text(json.dumps(branch, indent=1) + "\n")


def _table(schema: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMAS[schema])


if __name__ == "__main__":
    run_stage(ppo, per_branch=True)
