"""What turned between base, SFT_MaxOOD, SFT_End and one RL branch, and along the ladder; each beside its nulls."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.progress import Progress
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import SCHEMAS, check, read_table, write_table
from rlheals.stages.common import Run, quiet_environment, resolve_device, run_stage

if TYPE_CHECKING:
    from rlheals.spectra.diagnose import Caches, Diagnosis
    from rlheals.spectra.settings import DiagnoseSettings, Pair

BASE, MAX_OOD, END, RL = "base", "sft_max_ood", "sft_end", "rl"
PAIRS = ((BASE, MAX_OOD), (MAX_OOD, END), (END, RL), (BASE, END), (BASE, RL), (MAX_OOD, RL))
RUNG = "checkpoint-"
GIB = 2**30


def spectra(run: Run) -> None:
    """Publish ``data/<profile>/spectra/<model>/<seed>``: spectra, verdicts, gauge, function_drift and ladder."""
    inputs = [verify(run.output(stage)) for stage in ("dataset", "base", "sft", "probe_sft")]
    inputs.append(verify(run.branch(run.params.spectra.rl_arm, run.params.spectra.rl_start)))
    scratch = run.scratch("spectra", run.params.spectra, run.params.compute, run.params.task, run.spec, inputs)
    models, settings = folders(run), settings_of(run)
    share_out(run, models, settings, scratch)
    caches = make_caches(run, scratch)
    found = compare_all(run, models, settings, caches)
    function_drift = drift_of(run, models, settings, caches, study_pairs())
    _publish(run, found, function_drift)
    print(f"spectra: {caches.told()}", file=sys.stderr)
    shutil.rmtree(scratch, ignore_errors=True)


def folders(run: Run) -> dict[str, Path]:
    """Folder of every model, by the name it has in the tables.

    Raises:
        UserError: probe_sft chose a rung that is not there, or the RL branch lacks its last update.
    """
    settings, ladder = run.params.spectra, run.output("sft")
    chosen = json.loads((run.output("probe_sft") / "selection.json").read_text())
    branch = run.branch(settings.rl_arm, settings.rl_start)
    models = {
        BASE: run.output("base"),
        MAX_OOD: ladder / f"{RUNG}{chosen['max_ood']}",
        END: ladder / f"{RUNG}{chosen['end']}",
        RL: branch / f"update-{run.params.ppo.updates}",
        **{f"{RUNG}{step}": ladder / f"{RUNG}{step}" for step in run.params.sft.checkpoints},
    }
    for name, folder in models.items():
        if not folder.is_dir():
            raise UserError(f"{folder}, which is {name} here, does not exist; run `dvc repro` to write it.")
    return models


def settings_of(run: Run) -> DiagnoseSettings:
    """The block ``spectra`` of the params as the diagnosis takes it."""
    from rlheals.models.topology import parse_layers
    from rlheals.spectra.settings import DiagnoseSettings

    block = run.params.spectra
    return DiagnoseSettings(
        modules=tuple(block.modules),
        layers=None if block.layers == "all" else tuple(parse_layers(block.layers)),
        embeddings=block.embeddings,
        ks=tuple(block.subspaces),
        nulls=block.nulls,
        seed=run.seed,
        device=resolve_device(run.params.compute.device),
    )


def make_caches(run: Run, scratch: Path) -> Caches:
    """Factors and finished measures in the stage's scratch: a killed run goes on where it stopped."""
    from rlheals.spectra.diagnose import Caches
    from rlheals.spectra.results import ResultCache
    from rlheals.spectra.store import FactorStore

    device = resolve_device(run.params.compute.device)
    cap = round(run.params.spectra.cache_gib * GIB)
    return Caches(FactorStore(scratch / "factors", cap, device), ResultCache(scratch))


def study_pairs() -> list[Pair]:
    """The pairs of the study."""
    from rlheals.spectra.settings import Pair

    return [Pair(reference, target) for reference, target in PAIRS]


def compare_all(run: Run, models: dict[str, Path], settings: DiagnoseSettings, caches: Caches) -> Diagnosis:
    """The pairs of the study and every rung against the base, in one pass over the matrices."""
    from rlheals.spectra.diagnose import compare
    from rlheals.spectra.settings import Pair

    rungs = [Pair(BASE, f"{RUNG}{step}", rung=True) for step in run.params.sft.checkpoints]
    return compare(models, [*study_pairs(), *rungs], settings, caches, run.columns())


def drift_of(
    run: Run, models: dict[str, Path], settings: DiagnoseSettings, caches: Caches, pairs: list[Pair]
) -> pl.DataFrame:
    """Function drift of some of the study's pairs."""
    from rlheals.spectra.function_question import function_drift_table

    named = {name: models[name] for name in (BASE, MAX_OOD, END, RL)}
    prompts, columns = encoded_prompts(run), run.columns()
    return function_drift_table(named, pairs, prompts, settings, caches.results, columns=columns, dtype=run.spec.dtype)


def share_out(run: Run, models: dict[str, Path], settings: DiagnoseSettings, scratch: Path) -> None:
    """Answer the questions about small models in ``compute.threads`` processes, into the cache of results.

    A matrix of a small model is too small to keep two cores busy. Each process uses one thread, and each answer depends
    on the bytes it is about alone, so the tables are those of one process with one thread.
    """
    from rlheals.spectra.diagnose import small_enough

    workers = run.params.compute.threads
    if workers < 2 or settings.device != "cpu" or not small_enough(models.values()):
        return
    tasks = tasks_of(models[BASE], settings)
    bar = Progress("spectra, in parallel", len(tasks), unit="part")
    quiet_environment(threads=1)  # inherited: a process that starts with more keeps them for its linear algebra
    try:
        with get_context("spawn").Pool(min(workers, len(tasks)), _quiet) as pool:
            for _ in pool.imap_unordered(partial(_part, run, models, settings, scratch), tasks):
                bar.update()
    finally:
        quiet_environment(workers)


def tasks_of(base: Path, settings: DiagnoseSettings) -> list[tuple[DiagnoseSettings | None, list[Pair]]]:
    """Parts of the work that share no tensor: blocks one by one (the first with the embeddings), and pairs to run."""
    from dataclasses import replace

    from rlheals.models.topology import select
    from rlheals.spectra.reader import Weights

    with Weights(base) as weights:
        chosen = select(weights.topology, settings.modules, settings.layers, embeddings=False)
    layers = sorted({matrix.layer for matrix in chosen})
    parts = [
        replace(settings, layers=(layer,), embeddings=settings.embeddings and not place)
        for place, layer in enumerate(layers)
    ]
    return [*((part, []) for part in parts), *((None, [pair]) for pair in study_pairs())]


def _quiet() -> None:
    """Set up a process of `share_out`: no progress of its own."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    for name in [name for name in os.environ if name.startswith("RLHEALS_PROGRESS")]:
        del os.environ[name]


def _part(
    run: Run,
    models: dict[str, Path],
    settings: DiagnoseSettings,
    scratch: Path,
    task: tuple[DiagnoseSettings | None, list[Pair]],
) -> None:
    """One part of the work, for what it leaves in the cache."""
    part, pairs = task
    caches = make_caches(run, scratch)
    if part is None:
        drift_of(run, models, settings, caches, pairs)
    else:
        compare_all(run, models, part, caches)


def encoded_prompts(run: Run) -> dict[str, list[list[int]]]:
    """Token ids of the first prompt of the first ``spectra.prompts`` select hands of each condition.

    Raises:
        UserError: there are no select hands.
    """
    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.models.checkpoint import load_tokenizer
    from rlheals.tasks import make_task

    path = run.output("dataset") / "probes.parquet"
    hands = read_table(path, "probes").filter(pl.col("split") == "select")
    if hands.is_empty():
        raise UserError(f"{path} has no select hands, which the function drift is measured on; run `dvc repro`.")
    dialogue, task = Dialogue(load_tokenizer(run.output("base"))), make_task(run.params.task_spec)
    prompts: dict[str, list[list[int]]] = {}
    for (condition,), rows in hands.group_by("condition", maintain_order=True):
        items = rows["item"].head(run.params.spectra.prompts)
        episodes = (task.episode(item, run.spec.prompt_format, 1, task.spec.feedback) for item in items)
        prompts[str(condition)] = [dialogue.prompt_ids(episode.prompt) for episode in episodes]
    return prompts


def ladder_table(found: pl.DataFrame) -> pl.DataFrame:
    """Schema ``spectra_ladder`` from the rows of the rungs (schema ``spectra``): summary numbers, no curves."""
    prefix = f"{BASE} → {RUNG}"
    rungs = found.filter(pl.col("pair").str.starts_with(prefix) & pl.col("index").is_null())
    named = rungs.with_columns(
        checkpoint_step=pl.col("pair").str.strip_prefix(prefix).cast(pl.Int64), reference=pl.lit(BASE)
    )
    return check(named.select(list(SCHEMAS["spectra_ladder"])), "spectra_ladder", "the ladder")


def _publish(run: Run, found: Diagnosis, function_drift: pl.DataFrame) -> None:
    pairs = [pair.name for pair in study_pairs()]
    tables: dict[str, tuple[str, Any]] = {
        "spectra": ("spectra", found.spectra.filter(pl.col("pair").is_in(pairs))),
        "verdicts": ("spectra_verdicts", found.verdicts.filter(pl.col("pair").is_in(pairs))),
        "gauge": ("gauge", found.gauge),
        "function_drift": ("function_drift", function_drift),
        "ladder": ("spectra_ladder", ladder_table(found.spectra)),
    }
    with publish(run.output("spectra")) as directory:
        for name, (schema, table) in tables.items():
            write_table(table, schema, directory / f"{name}.parquet")


if __name__ == "__main__":
    run_stage(spectra)
