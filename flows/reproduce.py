"""Run the pipeline of ``dvc.yaml`` in parallel, one Prefect task a stage: ``python -m flows.reproduce``.

It runs what `dvc repro` would run and leaves the workspace up to date for it, and the other way round. DVC decides what
is out of date, and records results; Prefect runs, retries, shows and schedules.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer
from prefect import flow, get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows import artifacts
from flows.tasks import CancelWatch, PrefectBackend, RunCancelled, make_runner, started
from flows.terminal import bad_input, begin, listeners, on_terminal, run_folder
from rlheals.errors import UserError
from rlheals.orchestration.driver_lock import DriverLock, driver_lock
from rlheals.orchestration.job import Verdict
from rlheals.orchestration.launcher import launcher_prefix
from rlheals.orchestration.pipeline import Pipeline
from rlheals.orchestration.schedule import Row, Schedule
from rlheals.orchestration.slots import Slots, Unlimited, parse_gpus
from rlheals.params import PARAMS_FILE
from rlheals.profile import current_profile, render, replace_text, with_overrides, write_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prefect.client.schemas.objects import State


@flow(name="reproduce", persist_result=False)
def reproduce(
    targets: list[str] | None = None,
    profile: str | None = None,
    overrides: list[str] | None = None,
    jobs: int | None = None,
    gpus: str | None = None,
    keep_going: bool = True,
    force: bool = False,
    pull: bool = False,
    single_item: bool = False,
    runner: Literal["thread", "ray"] = "thread",
    address: str | None = None,
    launcher: str | None = None,
    wait: bool = False,
) -> Any:
    """Bring the stages of dvc.yaml up to date.

    Args:
        targets: stages or groups of stages, for example `report` or `sft@mini-tiny-0`; nothing means all.
        profile: write params.yaml from this preset first.
        overrides: `key=value` changes to params.yaml, for example `sft.learning_rate=5e-4`.
        jobs: stages at a time; nothing means as many as cores, memory and GPUs allow.
        gpus: GPUs to hand out, for example `0,1`; `none`; or `auto` for all that are visible.
        keep_going: after a failure, run what does not depend on it; otherwise start nothing more.
        force: run every stage even when nothing has changed.
        pull: fetch missing outputs from the DVC remote instead of computing them, where it has them.
        single_item: only the targets, not what they depend on.
        runner: `thread` (children of this process) or `ray`.
        address: of a Ray cluster, for example `auto`; nothing starts one on this machine.
        launcher: prefix of every stage's command, for example `srun --gres=gpu:{gpus} -c {cpus}`.
        wait: wait for another run in this workspace to end instead of failing.
    """
    say = begin()
    root = Path.cwd()
    logs = run_folder(root)
    try:
        places = _slots(jobs, gpus, everywhere=runner == "ray" or launcher is not None)
        ready = make_runner(runner, address)
        with (
            driver_lock(root, wait=wait, say=say, check=CancelWatch().check) as lock,
            _params_written(root / PARAMS_FILE, profile, overrides or [], say) as keep,
        ):
            _take_over(lock)
            pipeline = Pipeline(root, force=force, pull=pull)
            try:
                nodes = pipeline.plan(targets or [], single_item=single_item)
                launchers = {node.name: launcher_prefix(launcher or "", node.resources, node.name) for node in nodes}
                places.check(nodes)
                with started(ready, nodes) as task_runner:
                    keep()
                    backend = PrefectBackend(task_runner, on_ray=runner == "ray")
                    rows = Schedule(
                        stages=pipeline,
                        nodes=nodes,
                        backend=backend,
                        slots=places,
                        logs=logs,
                        listeners=listeners(nodes),
                        keep_going=keep_going,
                        launchers=launchers,
                        limited_here="{timeout_minutes}" not in (launcher or ""),
                    ).run()
            finally:
                pipeline.close()
    except UserError as error:
        return bad_input(error)
    except RunCancelled:
        return Cancelled(message="cancelled; what had finished is recorded")
    return _conclude(root, rows, logs)


def _take_over(lock: DriverLock) -> None:
    """Record this flow run as the holder, and mark the run of a killed driver as crashed: nobody else will."""
    with get_client(sync_client=True) as client:
        previous = lock.previous()
        # A run that is tried again keeps its id. One that has ended in another way keeps its state, too.
        if previous is not None and previous.flow_run_id not in ("", str(flow_run.get_id())):
            try:
                client.set_flow_run_state(UUID(previous.flow_run_id), Crashed(message="its driver was killed"))
            except Exception as error:
                get_run_logger().info("the killed run %s is not known here: %s", previous.flow_run_id, error)
    lock.annotate(flow_run_id=str(flow_run.get_id()))


@contextmanager
def _params_written(
    path: Path, profile: str | None, overrides: Sequence[str], say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Write params.yaml as asked for; put the old one back unless the function that is yielded has been called."""
    if profile is None and not overrides:
        yield lambda: None
        return
    rendered = with_overrides(path, overrides) if profile is None else render(profile, overrides)
    before = path.read_text() if path.is_file() else rendered.text
    backup = write_profile(rendered.text, path)
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            replace_text(before, path)
        for note in rendered.notes if kept else []:
            say(note)
        if kept and backup:
            say(f"params.yaml had been edited: its former content is in {backup}")


def _slots(jobs: int | None, gpus: str | None, *, everywhere: bool) -> Slots:
    if jobs is not None and jobs < 1:
        raise UserError(f"-j {jobs} leaves nothing to run with; give 1 or more.")
    return Unlimited(jobs=jobs) if everywhere else Slots(jobs=jobs, gpus=parse_gpus(gpus))


def _conclude(root: Path, rows: list[Row], logs: Path) -> State[Any]:
    """``verdicts.json`` beside the logs, artifacts in Prefect, and the final state."""
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "verdicts.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    artifacts.verdict_table(rows)
    profile = current_profile(root / PARAMS_FILE)
    # Not an earlier report, when this run did not come that far.
    drawn = profile is not None and any(row.name == f"report@{profile}" and row.verdict.good for row in rows)
    if profile and drawn:
        artifacts.figures(profile, root)
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    summary = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    where = f"; report: reports/{profile}/index.html" if drawn else ""
    good = all(row.verdict.good for row in rows)
    return (Completed if good else Failed)(message=f"{summary or 'dvc.yaml has no stages'}{where}")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages or groups; nothing means all.")] = None,
    profile: Annotated[str | None, typer.Option(help="Write params.yaml from this preset first.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Change params.yaml first.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Stages at a time; default: what cores, memory, GPUs allow.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs to hand out, e.g. 0,1; none; default: all visible.")] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going/--fail-fast", help="After a failure, run what does not depend on it.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", "-f", help="Run even what is up to date.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch from the DVC remote what it has.")] = False,
    single_item: Annotated[
        bool, typer.Option("--single-item", "-s", help="Only the targets, not what they depend on.")
    ] = False,
    runner: Annotated[str, typer.Option(help="thread or ray.")] = "thread",
    address: Annotated[str | None, typer.Option(help="Ray cluster, e.g. auto; default: start one here.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help='Prefix of the commands, e.g. "srun --gres=gpu:{gpus} -c {cpus}".')
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another run in this folder to end.")] = False,
) -> None:
    """Bring the stages of dvc.yaml up to date, in parallel.

    Exit codes: 0 all is up to date, 1 a stage failed, 2 bad input (the message says what to change), 130 stopped.
    """
    if runner not in ("thread", "ray"):
        raise typer.BadParameter("use thread or ray", param_hint="--runner")
    on_terminal(
        lambda: reproduce(
            targets=targets,
            profile=profile,
            overrides=overrides,
            jobs=jobs,
            gpus=gpus,
            keep_going=keep_going,
            force=force,
            pull=pull,
            single_item=single_item,
            runner=runner,
            address=address,
            launcher=launcher,
            wait=wait,
            return_state=True,
        )
    )


if __name__ == "__main__":
    # Under its own name: Ray workers import what a flow refers to, and what __main__ defines cannot be imported.
    from flows.reproduce import app as command

    command(prog_name="python -m flows.reproduce")
