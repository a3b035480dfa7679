"""Compare settings: ``python -m flows.sweep sft.learning_rate=1e-4,5e-4 seeds=[0],[1] --profile smoke -j 2``.

Every combination becomes a DVC experiment, run in a clone of the repository, one Prefect task each. The workspace is
only read. Inside an experiment plain `dvc repro` runs the stages: one at a time, without the time limits and retries of
dvc.yaml's `meta`. The comparison is written to ``reports/sweeps/<name>/table.csv``; `dvc exp show`, `dvc exp apply
NAME` and `dvc exp branch NAME` work on the experiments as on any other.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from flows import artifacts
from flows.tasks import PrefectBackend, RunCancelled, make_runner
from flows.terminal import bad_input, begin, listeners, on_terminal, run_folder
from rlheals.errors import UserError
from rlheals.orchestration.comparison import comparison, differences, write_tables
from rlheals.orchestration.schedule import Row, Schedule
from rlheals.orchestration.slots import Slots, parse_gpus
from rlheals.orchestration.sweep import Experiments, Sweep, plan_sweep, sweep_lock

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from rlheals.orchestration.job import Node


@flow(name="sweep", persist_result=False)
def sweep(
    grid: list[str],
    profile: str | None = None,
    targets: list[str] | None = None,
    jobs: int | None = None,
    gpus: str | None = None,
    name: str | None = None,
    force: bool = False,
) -> Any:
    """Run every combination of a grid of parameters as an isolated DVC experiment, and compare them.

    Args:
        grid: `key=value,value` texts, for example `sft.learning_rate=1e-4,5e-4`; all combinations are run.
        profile: preset to start from; nothing means params.yaml as it is.
        targets: stages to bring up to date in each experiment; nothing means all.
        jobs: experiments at a time; nothing means one, or one for each GPU.
        gpus: GPUs to share out evenly, for example `0,1`; `none`; or `auto` for all that are visible.
        name: of the sweep, whose earlier tables are overwritten; nothing means one made from the grid.
        force: run everything again, even what is there.
    """
    begin()
    root = Path.cwd()
    with ExitStack() as stack:
        try:
            plan = plan_sweep(root, grid, profile=profile, targets=targets or [], name=name)
            experiments = Experiments(plan, force=force)
            slots = slots_for(jobs, parse_gpus(gpus))
            nodes = experiments.nodes(len(slots.gpus) // (slots.jobs or 1))
            slots.check(nodes)
            stack.enter_context(sweep_lock(root))
        except UserError as error:
            return bad_input(error)
        try:
            return _conclude(plan, _run(plan, experiments, nodes, slots))
        except UserError as error:
            # Not bad input: experiments have run, and those that are done are kept.
            return Failed(message=f"the sweep could not be concluded: {error} Run the same command again to go on.")
        except RunCancelled:
            return Cancelled(message="cancelled; the experiments that had finished are kept")


def slots_for(jobs: int | None, gpus: tuple[str, ...]) -> Slots:
    """Places for experiments, which look after cores and memory themselves.

    Raises:
        UserError: no place, or more places than GPUs.
    """
    places = jobs if jobs is not None else max(len(gpus), 1)
    if places < 1:
        raise UserError(f"-j {places} leaves nothing to run with; give 1 or more.")
    if gpus and places > len(gpus):
        raise UserError(
            f"-j {places} wants more experiments at a time than there are GPUs ({','.join(gpus)}); give a smaller -j, "
            "or --gpus none."
        )
    return Slots(jobs=places, cpus=places, memory_gib=math.inf, gpus=gpus)


def _run(plan: Sweep, experiments: Experiments, nodes: list[Node], slots: Slots) -> list[Row]:
    with make_runner("thread", None) as runner:
        return Schedule(
            stages=experiments,
            nodes=nodes,
            backend=PrefectBackend(runner, on_ray=False),
            slots=slots,
            logs=run_folder(plan.root),
            listeners=listeners(nodes),
            launchers=experiments.launchers(),
        ).run()


def _conclude(plan: Sweep, rows: list[Row]) -> State[Any]:
    """The tables, as files and artifacts, and the final state."""
    table = comparison(plan, rows)
    path = write_tables(plan, table)
    artifacts.publish_table(table.to_dicts(), f"sweep-{plan.name}", f"{len(rows)} experiments, also in {path}.")
    changes = differences(table).to_dicts()
    artifacts.publish_table(changes, f"sweep-{plan.name}-diff", "Parameters and metrics that differ.")
    failed = [row.name for row in rows if not row.verdict.good]
    get_run_logger().info("the comparison is in %s", path)
    if failed:
        return Failed(message=f"{len(failed)} of {len(rows)} experiments failed: {', '.join(failed)}; table: {path}")
    return Completed(message=f"{len(rows)} experiments; table: {path}")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    words: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE,VALUE... [TARGET]...", help="The grid, then stages; default all.")
    ],
    profile: Annotated[str | None, typer.Option(help="Preset to start from; default: params.yaml as it is.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Experiments at a time; default: one, or one for each GPU.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs to share out, e.g. 0,1; none; default: all visible.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; default: made from the grid.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Run everything again.")] = False,
) -> None:
    """Run every combination of a grid of parameters as an isolated DVC experiment, and compare them.

    Exit codes: 0 all experiments are there, 1 one failed, 2 bad input (the message says what to change), 130 stopped.
    """
    on_terminal(
        lambda: sweep(
            grid=[word for word in words if "=" in word],
            targets=[word for word in words if "=" not in word],
            profile=profile,
            jobs=jobs,
            gpus=gpus,
            name=name,
            force=force,
            return_state=True,
        )
    )


if __name__ == "__main__":
    # As in flows.reproduce: under its own name.
    from flows.sweep import app as command

    command(prog_name="python -m flows.sweep")
