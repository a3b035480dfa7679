"""``rlheals eval``: how a model of yours does on a probe, in and out of distribution."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlheals.commands._shared import EPILOG, Json, print_json

if TYPE_CHECKING:
    import polars as pl

    from rlheals.inference import Engine
    from rlheals.params import Params
    from rlheals.stages.common import Run

SHOWN = (
    "condition",
    "attempts",
    "n",
    "solved",
    "accuracy",
    "wilson_low",
    "wilson_high",
    "format_error_rate",
    "training_rule_rate",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", epilog=EPILOG)(evaluate)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model with its tokenizer.")],
    probe: Annotated[str, typer.Option(help="Task to probe with.")] = "general_points",
    n: Annotated[int, typer.Option("--n", help="Hands a condition.", min=1, max=2000)] = 300,
    attempts: Annotated[int, typer.Option(help="Graded attempts on a hand; 5 as in the paper.", min=1)] = 1,
    prompt_format: Annotated[
        Literal["auto", "paper", "compact"],
        typer.Option("--format", help="Wording; auto takes compact when the tokenizer knows all its words."),
    ] = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Weights; auto: as saved.")] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="What answers: transformers, vllm, or the address of a server that holds MODEL, such as "
            "http://host:8000/v1 (see docs/inference.md)."
        ),
    ] = "transformers",
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together (transformers).", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Decides the hands; the seed of a run of yours avoids what it saw.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default data/eval/<model>.")] = None,
    as_json: Json = False,
) -> None:
    """Probe a model: accuracy in and out of distribution, each with its 95 % Wilson interval. Decoding is greedy.

    A server is asked for log-probabilities first, and refused where they are not those of the weights in MODEL.
    Every answer is written to OUTPUT/answers.parquet, the summary to OUTPUT/probe_summary.parquet.
    """
    from rlheals.publish import check_target, publish
    from rlheals.reporting.schemas import write_table
    from rlheals.stages.common import Run, quiet_environment

    params = _params(model, probe, prompt_format, dtype, device, engine, batch_size)
    target = output or Path("data") / "eval" / model.resolve().name
    check_target(target)
    quiet_environment(params.compute.threads)
    run = Run(params, "probed", seed)
    answers, summary = _probe(run, model, n, attempts)
    with publish(target) as directory:
        write_table(answers, "answers", directory / "answers.parquet")
        write_table(summary, "probe_summary", directory / "probe_summary.parquet")
    used = {
        "model": str(model),
        "format": run.spec.prompt_format,
        "dtype": run.spec.dtype,
        "engine": params.inference.engine,
        "output": str(target),
    }
    if as_json:
        print_json({**used, "results": summary.select(SHOWN).to_dicts()})
    else:
        _show(used, summary)


def _params(
    model: Path, probe: str, prompt_format: str, dtype: str, device: str, engine: str, batch_size: int
) -> Params:
    """Params of the complete preset with ``model`` as the only model, called ``probed``."""
    from ruamel.yaml import YAML

    from rlheals.errors import UserError
    from rlheals.params import parse_params
    from rlheals.profile import COMPLETE, render

    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a Hugging Face model folder: it has no config.json.")
    raw: dict[str, Any] = YAML(typ="safe").load(render(COMPLETE).text)
    raw["task"]["name"] = probe
    raw["compute"]["device"] = device
    raw["inference"]["engine"] = engine
    raw["inference"]["batch_size"] = batch_size
    raw["models"] = ["probed"]
    raw["model"] = {
        "probed": {
            "source": str(model),
            "prompt_format": "paper" if prompt_format == "auto" else prompt_format,
            "dtype": _saved_dtype(model) if dtype == "auto" else dtype,
        }
    }
    params = parse_params(raw, Path("rlheals eval"))
    if prompt_format == "auto" and _speaks_compact(model, params):
        raw["model"]["probed"]["prompt_format"] = "compact"
        return parse_params(raw, Path("rlheals eval"))
    return params


def _saved_dtype(model: Path) -> str:
    """``bfloat16`` when the folder was saved in a 16-bit type (float16 is cast), else ``float32``."""
    import json

    from rlheals.errors import UserError

    try:
        config = json.loads((model / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{model / 'config.json'} is not valid JSON ({error}).") from error
    saved = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "bfloat16" if saved in ("bfloat16", "float16") else "float32"


def _speaks_compact(model: Path, params: Params) -> bool:
    """Whether every word of the compact format is one token of the model's tokenizer."""
    from rlheals.models.checkpoint import load_tokenizer
    from rlheals.tasks import make_task

    known = set(load_tokenizer(model).get_vocab())
    return known.issuperset(make_task(params.task_spec).vocabulary())


def _probe(run: Run, model: Path, n: int, attempts: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Answers and their summary on ``n`` hands of each of the conditions id and ood."""
    import polars as pl

    from rlheals.evaluation.probes import summarise
    from rlheals.progress import Progress
    from rlheals.stages.probe_sft import make_prober
    from rlheals.tasks import DatasetSizes, make_task

    sizes = DatasetSizes(sft_rows=1, rl_prompts=1, select=1, confirm=n, loss_rows=1)
    probes = make_task(run.params.task_spec).build(run.spec.prompt_format, sizes, run.seed).probes
    hands = probes.filter(pl.col("condition").is_in(["id", "ood"]), pl.col("split") == "confirm")
    columns = {
        "profile": "eval",
        "model": model.resolve().name,
        "seed": run.seed,
        "stage": "eval",
        "checkpoint_step": _step(model),
        "cell_id": "",
    }
    prober = make_prober(run, model)
    with closing(prober.engine):
        _check_weights(prober.engine, model, run.spec.dtype)
        answers = prober.answers(hands, attempts, columns, Progress("eval", len(hands), "hand").update)
    return answers, summarise(answers, (1, attempts)).sort("condition", "attempts")


def _check_weights(engine: Engine, model: Path, dtype: str) -> None:
    """Make sure that an engine which reads its weights by itself has those of ``model``, whole and finite.

    Raises:
        UserError: it has others, or they are damaged.
    """
    from rlheals.inference.live import serve
    from rlheals.models.checkpoint import load_model

    if engine.name != "transformers":  # that one is made around such a model
        serve(engine, load_model(model, dtype), str(model), dtype)


def _step(model: Path) -> int:
    """The step in a folder name such as ``checkpoint-320``, else 0."""
    tail = model.resolve().name.rpartition("checkpoint-")[2]
    return int(tail) if tail.isdecimal() else 0


def _show(used: dict[str, str], summary: pl.DataFrame) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, caption="old rule: right had the prompt stated the training rule")
    for heading in ("condition", "attempts", "n", "accuracy", "95 %", "unreadable", "old rule"):
        table.add_column(heading, justify="left" if heading == "condition" else "right", no_wrap=True)
    for row in summary.to_dicts():
        table.add_row(
            row["condition"],
            str(row["attempts"]),
            str(row["n"]),
            f"{row['accuracy']:.3f}",
            f"{row['wilson_low']:.3f}–{row['wilson_high']:.3f}",
            f"{row['format_error_rate']:.3f}",
            f"{row['training_rule_rate']:.3f}",
        )
    typer.echo(f"{used['model']}: {used['format']} prompts, {used['dtype']}, greedy, {used['engine']}")
    Console().print(table)
    typer.echo(f"answers: {used['output']}/answers.parquet")
