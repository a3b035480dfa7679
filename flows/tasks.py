"""The Prefect side of a stage: one task run each, whose state is DVC's verdict."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect import allow_failure, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import StageProgress
from rlheals.errors import EXIT_BAD_INPUT, UserError
from rlheals.orchestration.execute import clear_outputs, execute, stop_all
from rlheals.orchestration.job import Job, JobResult, Node, Verdict
from rlheals.orchestration.slots import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prefect.client.schemas.objects import State
    from prefect.task_runners import TaskRunner

Runner = Literal["thread", "ray"]
CANCEL_POLL_SECONDS = 1.0


class StageFailed(Exception):
    """An attempt at a stage failed; carries how it ended."""

    def __init__(self, name: str, result: JobResult) -> None:
        super().__init__(name, result)
        self.result = result

    def __str__(self) -> str:
        """The last words of the stage, for the state's message."""
        return f"exit code {self.result.returncode}: {self.result.last_line}"


class RunCancelled(Exception):
    """The flow run was cancelled in the user interface or by `prefect flow-run cancel`."""


def worth_another_attempt(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether Prefect should retry: not when the stage says that its input is bad, nor when the run is ending."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, StageFailed):
        return False
    return error.result.returncode != EXIT_BAD_INPUT and not error.result.stopped


@task(name="stage", cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=worth_another_attempt)
def run_stage(job: Job) -> JobResult:
    """Run the commands of a stage; its output is the task run's log, its progress a progress artifact."""
    logger = get_run_logger()
    if task_run.run_count > 1:
        clear_outputs(job)
    result = execute(job, on_line=logger.info, on_progress=StageProgress(job.name).update)
    if result.returncode or result.timed_out or result.stopped:
        raise StageFailed(job.name, result)
    return result


@task(name="verdict", cache_policy=NO_CACHE, persist_result=False)
def show_verdict(verdict: Verdict, message: str) -> State[None]:
    """A stage whose command did not run: its state is the verdict."""
    return (Completed if verdict.good else Failed)(name=verdict.value, message=message or None)


def make_runner(runner: Runner, address: str | None) -> TaskRunner[Any]:
    """The task runner: threads of this process that each watch a child, or a Ray cluster.

    Args:
        runner: ``thread`` or ``ray``.
        address: of a Ray cluster, for example ``auto`` for the one this machine belongs to; None starts one here.

    Raises:
        UserError: Ray is not installed, or an address was given for threads.
    """
    if runner == "thread":
        if address is not None:
            raise UserError("--address names a Ray cluster; give --runner ray with it, or leave it out.")
        return ThreadPoolTaskRunner()
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise UserError("--runner ray needs the ray extra; install it with `pip install 'rlheals[ray]'`.") from error
    # Not its own argument: it takes "auto" and None for the same.
    ray: TaskRunner[Any] = RayTaskRunner(init_kwargs={"address": address or "local"})
    return ray


@contextmanager
def started(runner: TaskRunner[Any], nodes: Sequence[Node]) -> Iterator[TaskRunner[Any]]:
    """Start a task runner and, of a Ray cluster, check that it has a place for every stage.

    Raises:
        UserError: no cluster answers at the address, or none of its machines is large enough for a stage.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers: {' '.join(str(error).split())}") from error
        if not isinstance(runner, ThreadPoolTaskRunner):
            import ray

            machines: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
            check_places(nodes, [machine["Resources"] for machine in machines if machine["Alive"]])
        yield runner


def check_places(nodes: Sequence[Node], machines: Sequence[Mapping[str, float]]) -> None:
    """Refuse stages that no machine of a Ray cluster could ever take; they would wait without a word.

    Args:
        nodes: the plan.
        machines: resources of each machine as Ray counts them (``CPU``, ``GPU``, ``memory`` in bytes).

    Raises:
        UserError: the stage and what it reserves are named.
    """
    for node in nodes:
        need = node.resources
        wanted = {"CPU": need.cpus, "GPU": need.gpus, "memory": need.memory_gib * GIB}
        if not any(all(machine.get(name, 0) >= amount for name, amount in wanted.items()) for machine in machines):
            raise UserError(
                f"stage {node.name} reserves {need.cpus} core(s), {need.gpus} GPU(s) and {need.memory_gib:g} GiB, and "
                "no machine of the Ray cluster has that much; lower resources or compute.threads in params.yaml."
            )


class CancelWatch:
    """Looks at the state of the current flow run, at most once in `CANCEL_POLL_SECONDS`."""

    def __init__(self) -> None:
        self._client = get_client(sync_client=True)
        self._polled = time.monotonic()

    def check(self) -> None:
        """Look, if it is time.

        Raises:
            RunCancelled: somebody is cancelling the run, and no runner may be there to do it.
        """
        if time.monotonic() - self._polled < CANCEL_POLL_SECONDS:
            return
        self._polled = time.monotonic()
        try:
            state = self._client.read_flow_run(UUID(flow_run.get_id())).state
        except Exception as error:
            logging.getLogger(__name__).debug("the flow run's state could not be read: %s", error)
            return
        if state is not None and (state.is_cancelling() or state.is_cancelled()):
            raise RunCancelled


class PrefectBackend:
    """Runs jobs as tasks of the current flow run (a `rlheals.orchestration.schedule.Backend`)."""

    def __init__(self, runner: TaskRunner[Any], *, on_ray: bool) -> None:
        """Args: a started task runner, and whether it places tasks by their resources."""
        self._runner, self._on_ray = runner, on_ray
        self._runs: dict[str, Any] = {}
        self._client = get_client(sync_client=True)
        self.check = CancelWatch().check

    def submit(self, node: Node, job: Job, done: Callable[[str], None]) -> None:
        """Submit the job as one task run, with edges from the task runs of its upstream."""
        prepared = run_stage.with_options(
            task_run_name=node.name, retries=node.resources.retries, tags=["gpu"] if node.resources.gpus else []
        )
        with self._resources(node):
            future = self._runner.submit(prepared, {"job": job}, wait_for=self._wait_for(node))
        self._runs[node.name] = future
        future.add_done_callback(lambda _: done(node.name))

    def result(self, name: str) -> JobResult:
        """How the job ended; a crash of the runner itself counts as a failure with its message."""
        future = self._runs[name]
        future.wait()  # the state lags behind the callback
        found = future.result(raise_on_failure=False)
        if isinstance(found, StageFailed):
            return found.result
        return (
            found if isinstance(found, JobResult) else JobResult(1, 0.0, last_line=f"{type(found).__name__}: {found}")
        )

    def settled(self, node: Node, verdict: Verdict, message: str) -> None:
        """Show a verdict reached without a task run; correct one whose outputs DVC could not record."""
        run = self._runs.get(node.name)
        if run is None:
            shown = show_verdict.with_options(task_run_name=node.name)
            self._runs[node.name] = shown(verdict, message, wait_for=self._wait_for(node), return_state=True)
        elif not verdict.good and run.state.is_completed():
            self._client.set_task_run_state(run.task_run_id, Failed(message=message), force=True)

    def stop(self) -> None:
        """Stop every child of this process; a cluster stops its tasks when this driver disconnects."""
        stop_all()

    def _wait_for(self, node: Node) -> list[Any]:
        return [allow_failure(self._runs[name]) for name in node.upstream]

    def _resources(self, node: Node) -> Any:
        if not self._on_ray:
            return nullcontext()
        from prefect_ray.context import remote_options

        needs = node.resources
        memory = {"memory": int(needs.memory_gib * GIB)} if needs.memory_gib else {}
        # Retries are Prefect's: Ray's own would begin beside the outputs of the lost attempt.
        return remote_options(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=0, **memory)
