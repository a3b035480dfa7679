"""Ask the probe hands at every rung, choose SFT_MaxOOD and SFT_End on ``select``, and report on ``confirm``."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import disk_errors
from rlheals.evaluation.probes import Prober, summarise
from rlheals.evaluation.selection import choose_rungs, selection_table
from rlheals.progress import Progress
from rlheals.publish import publish, verify
from rlheals.reporting.schemas import read_table, write_table
from rlheals.stages.common import Run, run_stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlheals.inference.fingerprint import Proof
    from rlheals.params import ProbeSft

BASE_CELL = ""


def probe_sft(run: Run) -> None:
    """Publish ``data/<profile>/probe_sft/<model>/<seed>``: answers, summary, selection, and the ladder's losses."""
    dataset, ladder = run.output("dataset"), run.output("sft")
    inputs = [verify(dataset), verify(ladder)]
    params = run.params
    scratch = run.scratch("probe_sft", params.probe_sft, run.answering(), params.task, params.compute, inputs)
    probes = read_table(dataset / "probes.parquet", "probes")
    losses = read_table(ladder / "losses.parquet", "losses")
    answers, chosen = _play(run, ladder, probes, scratch)
    summary = summarise_attempts(answers, chosen, params.probe_sft)
    with publish(run.output("probe_sft")) as directory:
        write_table(answers, "answers", directory / "answers.parquet")
        write_table(summary, "probe_summary", directory / "probe_summary.parquet")
        write_table(selection_table(answers, losses), "selection", directory / "selection.parquet")
        write_table(losses, "losses", directory / "losses.parquet")
        (directory / "selection.json").write_text(json.dumps(chosen) + "\n")
    shutil.rmtree(scratch, ignore_errors=True)


def summarise_attempts(answers: pl.DataFrame, chosen: Mapping[str, int], settings: ProbeSft) -> pl.DataFrame:
    """First tries everywhere; several attempts only where several were allowed (schema ``probe_summary``)."""
    tables = [summarise(answers)]
    if settings.select_attempts > 1:
        tables.append(summarise(answers.filter(pl.col("split") == "select"), [settings.select_attempts]))
    if settings.confirm_attempts > 1:
        played = (pl.col("split") == "confirm") & pl.col("checkpoint_step").is_in(list(chosen.values()))
        tables.append(summarise(answers.filter(played), [settings.confirm_attempts]))
    return pl.concat(tables)


def _play(run: Run, ladder: Path, probes: pl.DataFrame, scratch: Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """Both passes over the ladder: ``select`` at every rung, the choice, ``confirm`` at every rung."""
    steps, settings = run.params.sft.checkpoints, run.params.probe_sft
    bar = Progress("probe_sft", len(steps) * len(probes), "hand")
    prober = make_prober(run, ladder / f"checkpoint-{steps[0]}")
    rungs = Rungs(run, ladder, scratch, prober, bar)
    select = probes.filter(pl.col("split") == "select")
    confirm = probes.filter(pl.col("split") == "confirm")
    with closing(prober.engine):
        tables = [rungs.answers(step, "select", select, settings.select_attempts) for step in steps]
        chosen = choose_rungs(pl.concat(tables))
        for step in steps:
            attempts = settings.confirm_attempts if step in chosen.values() else 1
            tables.append(rungs.answers(step, "confirm", confirm, attempts))
    return pl.concat(tables), chosen


def make_prober(run: Run, model_dir: Path) -> Prober:
    """The engine for ``model_dir`` with everything needed to play the run's task on it.

    Raises:
        UserError: unknown engine, or the folder does not load.
    """
    from transformers import AutoConfig

    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.inference import make_engine
    from rlheals.inference.fingerprint import context_of
    from rlheals.inference.sampling import sampling_of
    from rlheals.models.checkpoint import load_tokenizer
    from rlheals.tasks import make_task

    inference, task = run.params.inference, make_task(run.params.task_spec)
    budget = task.format(run.spec.prompt_format).max_response_tokens
    return Prober(
        engine=make_engine(run.params, model_dir, run.spec.dtype),
        dialogue=Dialogue(load_tokenizer(model_dir)),
        task=task,
        prompt_format=run.spec.prompt_format,
        sampling=sampling_of(inference, model_dir, budget, run.seed),
        context=min(context_of(AutoConfig.from_pretrained(model_dir, local_files_only=True)), inference.max_context),
    )


@dataclass
class Rungs:
    """One live engine that takes the weights of rung after rung; answers already in scratch are not asked again."""

    run: Run
    ladder: Path
    scratch: Path
    prober: Prober
    bar: Progress
    live: int | None = None
    proof: Proof | None = None

    def answers(self, step: int, split: str, hands: pl.DataFrame, attempts: int) -> pl.DataFrame:
        """Schema ``answers`` of one rung on the hands of one split."""
        file = self.scratch / f"{split}-{step}-{attempts}.parquet"
        if file.is_file():
            self.bar.update(len(hands))
            return read_table(file, "answers")
        self._make_live(step)
        columns: Mapping[str, Any] = {
            **self.run.columns(),
            "stage": "sft",
            "checkpoint_step": step,
            "cell_id": BASE_CELL,
        }
        table = self.prober.answers(hands, attempts, columns, lambda count: self.bar.update(count, f"rung {step}"))
        with disk_errors(file):
            self.scratch.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            write_table(table, "answers", partial)
            partial.rename(file)
        return table

    def _make_live(self, step: int) -> None:
        from rlheals.inference.live import serve
        from rlheals.models.checkpoint import load_model

        if step == self.live:
            return
        folder, dtype = self.ladder / f"checkpoint-{step}", self.run.spec.dtype
        self.proof = serve(self.prober.engine, load_model(folder, dtype), str(folder), dtype, self.proof)
        self.live = step


if __name__ == "__main__":
    run_stage(probe_sft)
