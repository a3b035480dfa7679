"""Stage ``base``: the model SFT starts from, pretrained from scratch or loaded strictly from a folder."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from rlheals.publish import publish
from rlheals.stages.common import Run, resolve_device, run_stage

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES = "base"


def base(run: Run) -> None:
    """Publish ``data/<profile>/base/<model>/<seed>``: an HF folder and ``training.parquet``."""
    scratch = run.scratch(STATES, run.params.base, run.params.task, run.spec, run.params.compute)
    if run.spec.source == "pretrain":
        model, tokenizer, curve = _pretrained(run, scratch)
    else:
        model, tokenizer, curve = *_loaded(run), []
    _publish(run, model, tokenizer, curve)
    shutil.rmtree(scratch, ignore_errors=True)


def _pretrained(run: Run, scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[dict[str, Any]]]:
    """A tiny Llama trained on the task's mixture; seeded by the run's seed, resumed from ``scratch``."""
    import numpy as np
    import torch

    from rlheals.models.tiny import tiny_llama, tiny_tokenizer
    from rlheals.tasks import make_task
    from rlheals.training.pretrain import pretrain

    assert run.spec.architecture is not None
    settings, task = run.params.base, make_task(run.params.task_spec)
    words, special = task.vocabulary(), task.special_words()
    tokenizer = tiny_tokenizer(words, **special)
    torch.manual_seed(run.seed)
    model = tiny_llama(run.spec.architecture, tokenizer).to(resolve_device(run.params.compute.device))

    def rows(step: int) -> list[list[tuple[str, bool]]]:
        return task.pretraining_rows(settings.mixture, np.random.default_rng([run.seed, step]), settings.batch_size)

    ids = {word: i for i, word in enumerate(words)}
    curve = pretrain(model, rows, ids, ids[special["pad"]], settings, scratch)
    return model, tokenizer, curve


def _loaded(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The user's folder, every tensor accounted for."""
    from rlheals.models.checkpoint import load_model, load_tokenizer

    folder = run.root / os.path.expanduser(run.spec.source)  # noqa: PTH111  Path.expanduser would break a relative root
    return load_model(folder, run.spec.dtype, "cpu"), load_tokenizer(folder)


def _publish(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, curve: list[dict[str, Any]]) -> None:
    import polars as pl

    from rlheals.models.checkpoint import save_model
    from rlheals.reporting.schemas import SCHEMAS, write_table

    rows = [{**run.columns(), "stage": "base", **record} for record in curve]
    with publish(run.output("base")) as directory:
        save_model(model, tokenizer, directory)
        write_table(pl.DataFrame(rows, schema=SCHEMAS["training"]), "training", directory / "training.parquet")


if __name__ == "__main__":
    run_stage(base)
