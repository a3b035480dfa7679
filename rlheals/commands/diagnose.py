"""``rlheals diagnose``: what turned between two checkpoints, and can it be told from noise."""

from __future__ import annotations

from math import isfinite
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlheals.commands._shared import Json, default_cache, device_named, factor_store, print_json
from rlheals.errors import EXIT_BAD_INPUT, EXIT_OK, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from rlheals.spectra.coverage import Coverage
    from rlheals.spectra.diagnose import Caches, Diagnosis
    from rlheals.spectra.plan import Estimate, Forecast
    from rlheals.spectra.settings import DiagnoseSettings

EXIT_CHANGED = 1
EPILOG = (
    f"Exit codes: {EXIT_OK} every matrix is unchanged or indistinguishable from same-norm noise and what was not "
    f"compared is equal, {EXIT_CHANGED} a matrix changed in a way that noise of its size would not (structured or "
    "magnitude, however small), or something that was not compared differs; an internal error, which prints a "
    f"traceback, exits {EXIT_CHANGED} too, {EXIT_BAD_INPUT} bad input (the message says what to change)."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("diagnose", epilog=EPILOG)(diagnose)


def diagnose(
    base: Annotated[Path, typer.Argument(help="Hugging Face folder of the model before.")],
    tuned: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[TUNED]...", help="Folders of the model after; several make a ladder, in their order."),
    ] = None,
    modules: Annotated[str | None, typer.Option(help="Matrices, e.g. q_proj,v_proj; all of a block if absent.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, e.g. 0-9,12; all if absent.")] = None,
    k: Annotated[
        str, typer.Option("--k", help="Subspace sizes: shares of the rank (0.25), or numbers of vectors (64).")
    ] = "0.125,0.25,0.5",
    nulls: Annotated[int, typer.Option(min=0, help="Random changes of the same norm behind each null band.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 0,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Analyse the embedding and the head too.")] = False,
    gauge: Annotated[
        bool, typer.Option(help="Separate function-preserving change of whole blocks from the rest.")
    ] = True,
    function: Annotated[
        bool | None,
        typer.Option(
            "--function/--no-function",
            help="Run both models and compare what they compute; by default when each is below 2 GiB.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Texts for the function drift, one a line; sampled from BASE if absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for index.html and the tables.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for finished work.", show_default="~/.cache/rlheals")
    ] = None,
    cache_gib: Annotated[float, typer.Option(min=0.001, help="Largest size of the decompositions kept there.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Print every matrix and every warning, not one line a module or kind; with --plan the paper's two "
            "models, too.",
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only print how much processor time it would take, here and on a GPU; needs no TUNED."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the weights of BASE with those of TUNED, each number beside what chance alone would do.

    For each matrix: singular values, principal angles of the leading, trailing and middle singular vectors, stretch and
    rotation of the change, and a verdict against Gaussian noise of the same norm (5 %, Holm's correction over the
    matrices): unchanged, like noise, structured or magnitude. Beside it stands whether the leading singular vectors
    turned less than, as, or more than such noise turns them. The last lines say what follows and the next command.
    Reads one tensor at a time. Finished work is kept in the cache, so the same question is answered at once.
    """
    from rlheals.models.topology import parse_layers, parse_modules
    from rlheals.publish import check_target
    from rlheals.spectra.settings import DiagnoseSettings, parse_ks

    settings = DiagnoseSettings(
        modules=None if modules is None else parse_modules(modules),
        layers=None if layers is None else tuple(parse_layers(layers)),
        embeddings=embeddings,
        ks=parse_ks(k),
        nulls=nulls,
        seed=seed,
        gauge=gauge,
        device=device_named(device),
    )
    if plan:
        forecast = _plan(base, max(1, len(tuned or [])), settings, function, every)
        if as_json:
            print_json(plan_content(forecast))
            return
        from rlheals.commands._diagnosis_text import show_plan

        show_plan(forecast)
        return
    if not tuned:
        raise UserError("name at least one TUNED folder to compare BASE with; --plan alone needs none.")
    from rlheals.commands._diagnosis_text import show_diagnosis
    from rlheals.commands._diagnosis_words import follow_up
    from rlheals.spectra.diagnose import diagnose as diagnose_models

    if out is not None:
        check_target(out)
    caches = _caches(cache or default_cache(), cache_gib, settings.device)
    found = diagnose_models(base, tuned, settings, caches, function=function, prompts=prompts)
    follows = follow_up(found, base, tuned)
    if out is not None:
        _write(found, out, follows)
    if as_json:
        print_json(as_content(found, caches, follows))
    else:
        used = caches.factors.factorised or caches.factors.hits
        counters = [caches.told(), *([caches.factors.told()] if used else [])]
        show_diagnosis(found, "\n".join(counters), follows, every)
    if found.changed:
        raise typer.Exit(EXIT_CHANGED)


def _caches(directory: Path, cap_gib: float, device: str) -> Caches:
    from rlheals.spectra.diagnose import Caches
    from rlheals.spectra.results import ResultCache

    results = ResultCache(directory)
    return Caches(factor_store(directory, cap_gib, device), results)


def _write(found: Diagnosis, out: Path, follows: Sequence[str]) -> None:
    """Tables and page, all or nothing."""
    from rlheals.publish import publish
    from rlheals.reporting.diagnosis_page import write_page
    from rlheals.reporting.schemas import write_table

    with publish(out) as directory:
        for schema, table in found.tables().items():
            write_table(table, schema, directory / f"{schema}.parquet")
        notes = [*found.covered, *found.notes]
        write_page(found.tables(), directory, left_out=found.left_out, notes=notes, follows=follows)


def as_content(found: Diagnosis, caches: Caches, follows: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` prints: verdicts, leading angles and gauge with their bands, function drift, and the rest."""
    from rlheals.spectra.turn import leading_angles

    return {
        "changed": found.changed,
        "follows": list(follows),
        "verdicts": _records(found.verdicts),
        "leading_angles": _records(leading_angles(found.spectra)),
        "gauge": _records(found.gauge),
        "function_drift": _records(found.function_drift),
        "left_out": dict(found.left_out),
        "coverage": {pair: as_coverage(each) for pair, each in found.coverage.items()},
        "notes": list(found.notes),
        "factorised": caches.factors.factorised,
        "factors_from_cache": caches.factors.hits,
        "measured": caches.results.computed,
        "answers_from_cache": caches.results.hits,
        "factor_cache": str(caches.factors.directory),
        "factor_cache_bytes": caches.factors.bytes_on_disk(),
    }


def as_coverage(found: Coverage) -> dict[str, Any]:
    """How much of a pair was compared, and what differs of the rest; an infinite relative change becomes null."""
    return {
        "share_compared": found.share,
        "weights": found.elements,
        "compared": found.compared,
        "not_compared": len(found.rest),
        "differing": [
            {
                "tensor": each.name,
                "part": each.part,
                "reason": each.reason,
                "relative_change": each.relative if isfinite(each.relative) else None,
                "understood": not each.unknown,
            }
            for each in found.differing
        ],
    }


def _records(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows without the columns that only a study fills; numbers that JSON does not have become null."""
    rows = table.drop("profile", "model", "seed").to_dicts()
    return [{name: None if _unwritable(value) else value for name, value in row.items()} for row in rows]


def _unwritable(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _plan(base: Path, checkpoints: int, settings: DiagnoseSettings, function: bool | None, known: bool) -> Forecast:
    """What the run would cost, and what is left out of that."""
    from dataclasses import replace
    from time import process_time

    import transformers  # noqa: F401  a run imports it, and that takes seconds

    from rlheals.spectra.diagnose import small_enough
    from rlheals.spectra.plan import KNOWN, Forecast, calibrate, plan, workload_of
    from rlheals.spectra.plan_function import function_cost

    start_up = process_time()
    chosen = settings.modules, settings.layers
    own = workload_of(base, *chosen, embeddings=settings.embeddings, gauge=settings.gauge)
    rates = calibrate(settings.device)
    left_out = ""
    if not (small_enough([base]) if function is None else function):
        left_out = "function drift, which this run would not measure"
    else:
        try:
            own = replace(own, function=function_cost(base, settings.device))
        except UserError as error:
            left_out = f"function drift, whose time is not known: {error}"
    estimates = plan([own, *(KNOWN if known else ())], rates, checkpoints, settings.nulls, start_up)
    return Forecast(tuple(estimates), rates.busy, left_out)


def plan_content(found: Forecast) -> dict[str, Any]:
    """What ``--plan --json`` prints; the estimates of other models, where asked for, come after the model's own."""
    from dataclasses import asdict

    from rlheals.spectra.plan import FEW_NULLS

    def content(each: Estimate) -> dict[str, Any]:
        times = {"first_run": each.first_run(), "second_run": each.second_run, "nulls": each.nulls()}
        return {**asdict(each), **times, f"first_run_with_{FEW_NULLS}_nulls": each.first_run(FEW_NULLS)}

    return {
        "estimates": [content(each) for each in found.estimates],
        "clock_over_processor": found.busy,
        "left_out": found.left_out,
    }
