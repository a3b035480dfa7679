"""What the models of a pair compute, beside what their weights are: function drift with its noise band."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.spectra.reader import Weights
from rlheals.spectra.results import Finding
from rlheals.spectra.settings import FUNCTION_NULLS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rlheals.spectra.function_drift import Batch
    from rlheals.spectra.results import ResultCache
    from rlheals.spectra.settings import DiagnoseSettings, Pair

SMALL_MODEL = 2 * 2**30
"""Bytes of weights from which on two models in memory are a burden that the user must ask for."""
BATCH = 32
SAMPLED = "sampled from base"
FROM_FILE = "prompts"
LONGEST = 512
COLUMNS: dict[str, type[pl.DataType]] = {
    "layer": pl.Int64,
    "quantity": pl.String,
    "value": pl.Float64,
    "noise_low": pl.Float64,
    "noise_high": pl.Float64,
    "tokens": pl.Int64,
}
Texts = dict[str, list[list[int]]]
"""Token ids of the texts of each condition."""


def function_drift_table(
    models: Mapping[str, Path],
    pairs: Sequence[Pair],
    texts: Texts,
    settings: DiagnoseSettings,
    results: ResultCache,
    *,
    columns: Mapping[str, Any],
    dtype: str = "float32",
) -> pl.DataFrame:
    """Function drift of each pair on each condition's texts (schema ``function_drift``); two models are held at most.

    Raises:
        UserError: a folder does not load as a causal language model, or the pair's vocabularies differ.
    """
    from rlheals.progress import Progress
    from rlheals.spectra.noise import seed_of

    draws = min(settings.nulls, FUNCTION_NULLS)
    bar = Progress("function drift", len(pairs) * len(texts), unit="comparison")
    digests = {name: weights_digest(path) for name, path in models.items()}
    tables = []
    for pair in pairs:
        folders = models[pair.reference], models[pair.target]
        for condition, ids in texts.items():
            ends = (digests[pair.reference], digests[pair.target])
            decides = ["function", ends, ids, draws, settings.seed, dtype, settings.device]
            answer = partial(
                _answer, folders[0], folders[1], ids, draws, seed_of(settings.seed, *ends), dtype, settings.device
            )
            found = results.finding(decides, answer)
            names = {**columns, "pair": pair.name, "condition": condition}
            types = SCHEMAS["function_drift"]
            literals = [pl.lit(value, types[name]).alias(name) for name, value in names.items()]
            tables.append(found.table.with_columns(literals).select(list(types)))
            bar.update(note=f"{pair.name}, {condition}")
    whole = pl.concat(tables) if tables else pl.DataFrame(schema=SCHEMAS["function_drift"])
    return check(whole, "function_drift", "the function drift")


def weights_digest(path: Path) -> str:
    """One sha256 over names and contents of all tensors of a folder, and its config.

    Raises:
        UserError: the folder is unreadable.
    """
    with Weights(path) as weights:
        texts = [f"{name} {weights.digest(name)}" for name in sorted(weights.shapes)]
    config = (path / "config.json").read_text()
    return hashlib.sha256("\n".join([*texts, config]).encode()).hexdigest()


def prompts_of(base: Path, prompts: Path | None, settings: DiagnoseSettings, results: ResultCache) -> Texts:
    """Token ids of the texts to compare on: the lines of a file, or sequences sampled from ``base`` and then kept.

    Lines are tokenised as they stand, without a chat template; the first 512 tokens count.

    Raises:
        UserError: the file is unreadable or has no text, or ``base`` does not load.
    """
    if prompts is None:
        return {SAMPLED: _sampled(base, settings, results)}
    from rlheals.models.checkpoint import load_tokenizer

    try:
        lines = [line for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {prompts} is no readable text file; name one with a prompt on each line."
        ) from error
    if not lines:
        raise UserError(f"--prompts {prompts} has no text; write one prompt on each line.")
    ids = load_tokenizer(base)(lines)["input_ids"]
    return {FROM_FILE: [each[:LONGEST] for each in ids]}


def _sampled(base: Path, settings: DiagnoseSettings, results: ResultCache) -> list[list[int]]:
    from rlheals.spectra.sampled_texts import sample_texts, start_of

    first = start_of(base)
    decides = ["texts", weights_digest(base), first, settings.seed, settings.device]
    found = results.finding(
        decides, lambda: Finding(pl.DataFrame(), {"ids": sample_texts(base, first, settings.seed, settings.device)})
    )
    ids: list[list[int]] = found.facts["ids"]
    return ids


def as_batches(texts: Sequence[Sequence[int]]) -> list[Batch]:
    """Texts padded on the right, in batches of `BATCH`."""
    import torch

    from rlheals.spectra.function_drift import Batch

    batches = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in part])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in part])
        batches.append(Batch(ids, mask))
    return batches


def _answer(
    reference: Path, target: Path, texts: Sequence[Sequence[int]], draws: int, seed: int, dtype: str, device: str
) -> Finding:
    from rlheals.models.checkpoint import load_model, quiet_library
    from rlheals.spectra.function_drift import function_drift

    base, tuned = (load_model(folder, dtype, device) for folder in (reference, target))
    with quiet_library():  # running a model has it advise on masks and caches, too
        rows = function_drift(base, tuned, as_batches(texts), draws=draws, seed=seed)
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    return Finding(pl.DataFrame(columns, schema=COLUMNS), {})
