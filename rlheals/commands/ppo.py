"""``rlheals ppo``: look into RL runs."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from rlheals.commands._shared import Json, print_json
from rlheals.errors import EXIT_BAD_INPUT, EXIT_OK

if TYPE_CHECKING:
    import polars as pl

EXIT_ERROR_FOUND = 1
EPILOG = (
    f"Exit codes: {EXIT_OK} no finding of level error, {EXIT_ERROR_FOUND} at least one, {EXIT_BAD_INPUT} bad input "
    "(the message says what to change)."
)
TRAINING, ADVANTAGES = "rl_training", "advantages"
BARS = " ▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Look into RL runs.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_group)  # keeps `doctor` a subcommand while it is the only one
    group.command("doctor", epilog=EPILOG)(doctor)
    app.add_typer(group, name="ppo")


def _group() -> None:
    """Look into RL runs."""


def doctor(
    run: Annotated[
        Path, typer.Argument(help="Folder with rl_training.parquet: a branch (data/<profile>/ppo/…) or a probe_rl run.")
    ],
    everything: Annotated[bool, typer.Option("--all", help="Show passed checks too.")] = False,
    advantages: Annotated[
        bool, typer.Option("--advantages", help="Show the shape of the advantages of each update.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Examine a branch's training curves: what went wrong, the likely cause, and the parameter to change.

    The first question is whether the branch raised its own reward: one that did not says nothing about what RL does
    elsewhere. Errors set the exit code; a note is a fact to know, not a fault. Reads tables only, so it works on a
    finished run without its models. RUN may hold several branches.
    """
    import polars as pl

    from rlheals.reporting.schemas import read_table
    from rlheals.training.ppo.doctor import ERROR, OK, diagnose

    findings = diagnose(read_table(run / f"{TRAINING}.parquet", TRAINING))
    shown = findings if everything else findings.filter(pl.col("level") != OK)
    shapes = _shapes(run / f"{ADVANTAGES}.parquet") if advantages else None
    if as_json:
        told = {"run": str(run), "checks": findings.height, "findings": shown.to_dicts()}
        print_json(told if shapes is None else {**told, "advantages": shapes.to_dicts()})
    else:
        _show(run, findings, shown)
        if shapes is not None:
            _show_shapes(shapes)
    if (findings["level"] == ERROR).any():
        raise typer.Exit(EXIT_ERROR_FOUND)


def _shapes(path: Path) -> pl.DataFrame:
    from rlheals.reporting.schemas import read_table
    from rlheals.training.ppo.doctor import advantage_shapes

    return advantage_shapes(read_table(path, ADVANTAGES))


def _show(run: Path, findings: pl.DataFrame, shown: pl.DataFrame) -> None:
    from rlheals.training.ppo.checks import LEVELS

    counts = {level: int((findings["level"] == level).sum()) for level in reversed(LEVELS)}
    typer.echo(f"{run}: " + ", ".join(f"{count} {level}" for level, count in counts.items()))
    for (arm, step), rows in shown.group_by("arm", "checkpoint_step", maintain_order=True):
        typer.echo(f"{arm} from step {step}")
        for row in rows.to_dicts():
            typer.echo(
                f"  {row['level']:<8}{row['check']:<22}{row['value']:>10.4g}  limit {row['limit']:.4g}, "
                f"update {row['update']}"
            )
            if row["cause"]:
                typer.echo(f"          {row['cause']}; change {row['parameter']}.")


def _show_shapes(shapes: pl.DataFrame) -> None:
    typer.echo("advantages   n    mean     std    skew  kurtosis  positive  entropy  from Gaussian")
    for row in shapes.to_dicts():
        typer.echo(
            f"update {row['update']:>3}{row['n']:>6}{row['mean']:>8.3f}{row['std']:>8.3f}{row['skew']:>8.2f}"
            f"{row['kurtosis']:>10.2f}{row['positive_share']:>10.2f}{row['entropy']:>9.2f}"
            f"{row['gaussian_distance']:>8.2f}  {bars(row['histogram'])}"
        )


def bars(counts: list[int]) -> str:
    """A histogram as one character a bin; an occupied bin is never blank."""
    highest = max([1, *counts])
    return "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in counts)
