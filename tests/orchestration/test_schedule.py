"""The loop, with stages that finish when the test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rlheals.errors import UserError
from rlheals.orchestration.job import Job, JobResult, Node, ProgressLine, Resources, Verdict
from rlheals.orchestration.schedule import Schedule
from rlheals.orchestration.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRAPH = {"data": (), "train": ("data",), "a": ("train",), "b": ("train",), "c": ("b",), "report": ("a", "c")}


class World:
    """DVC, backend and terminal in one: records every call, ends jobs in the order they were given."""

    def __init__(self, folder: Path, cached: set[str] = frozenset(), results: dict[str, Any] | None = None) -> None:
        self.folder, self.cached, self.results = folder, cached, results or {}
        self.calls: list[tuple[str, str]] = []
        self.running: dict[str, Callable[[str], None]] = {}
        self.most = 0
        self.shown: dict[str, tuple[Verdict, str]] = {}

    def settle(self, name: str) -> Verdict | None:
        self.calls.append(("settle", name))
        return Verdict.CACHED if name in self.cached else None

    def begin(self, name: str, log: Path) -> Job:
        self.calls.append(("begin", name))
        if self.results.get(name) == "no input":
            raise UserError("an input is missing")
        return Job(name, (("true",),), str(self.folder), {}, (), str(log))

    def finish(self, name: str) -> list[str]:
        self.calls.append(("finish", name))
        if self.results.get(name) == "no output":
            raise UserError("it wrote nothing")
        return ["input.txt"] if self.results.get(name) == "edited" else []

    def abandon(self, name: str) -> None:
        self.calls.append(("abandon", name))

    def submit(self, node: Node, job: Job, done: Callable[[str], None]) -> None:
        self.calls.append(("submit", node.name))
        self.running[node.name] = done
        self.most = max(self.most, len(self.running))

    def result(self, name: str) -> JobResult:
        found = self.results.get(name)
        return found if isinstance(found, JobResult) else JobResult(0, 1.0)

    def stop(self) -> None:
        self.calls.append(("stop", ""))

    def check(self) -> None:
        """Called when nothing else is to be done: the oldest job ends."""
        name, done = next(iter(self.running.items()))
        del self.running[name]
        done(name)

    def started(self, name: str, gpus: tuple[str, ...], log: str) -> None:
        pass

    def settled(self, node: Any, verdict: Verdict, *rest: Any) -> None:
        self.shown[node if isinstance(node, str) else node.name] = (verdict, rest[-1])

    def tick(self, progress: dict[str, ProgressLine]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def schedule(world: World, slots: Slots | None = None, **options: Any) -> Schedule:
    nodes = [Node(name, upstream, Resources()) for name, upstream in GRAPH.items()]
    return Schedule(world, nodes, world, slots or Slots(cpus=8, memory_gib=8), world.folder, [world], **options)


def verdicts(world: World, slots: Slots | None = None, **options: Any) -> dict[str, str]:
    return {row.name: row.verdict.value for row in schedule(world, slots, **options).run()}


def names(world: World, call: str) -> list[str]:
    return [name for kind, name in world.calls if kind == call]


def test_everything_runs_after_its_upstream_and_as_wide_as_the_slots(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert set(verdicts(world).values()) == {"Completed"}
    assert names(world, "submit") == list(GRAPH)
    assert world.most == 2
    narrow = World(tmp_path)
    verdicts(narrow, Slots(jobs=1, cpus=8, memory_gib=8))
    assert narrow.most == 1


def test_what_ended_is_recorded_before_anything_is_begun(tmp_path: Path) -> None:
    world = World(tmp_path)
    verdicts(world, Slots(jobs=1, cpus=8, memory_gib=8))
    order = [call for call in world.calls if call[0] in ("begin", "finish")]
    assert order == [(call, name) for name in GRAPH for call in ("begin", "finish")]


def test_a_cached_stage_takes_no_slot(tmp_path: Path) -> None:
    world = World(tmp_path, cached={"data", "train", "b"})
    slots = Slots(jobs=1, cpus=1, memory_gib=1)
    assert verdicts(world, slots)["b"] == "Cached"
    assert names(world, "submit") == ["a", "c", "report"]
    settled = world.calls.index(("settle", "b"))
    assert settled < world.calls.index(("finish", "a")), "it did not wait for the only slot, which a held"


def test_a_failure_fails_only_what_depends_on_it(tmp_path: Path) -> None:
    world = World(tmp_path, results={"b": JobResult(3, 1.0, last_line="out of memory")})
    found = verdicts(world)
    assert found == {
        "data": "Completed",
        "train": "Completed",
        "a": "Completed",
        "b": "Failed",
        "c": "UpstreamFailed",
        "report": "UpstreamFailed",
    }
    assert world.shown["b"][1].startswith("exit code 3: out of memory; log: ")
    assert world.shown["report"][1] == "it depends on c"
    assert ("abandon", "b") in world.calls
    assert ("finish", "b") not in world.calls


def test_fail_fast_starts_nothing_more_and_records_what_runs(tmp_path: Path) -> None:
    world = World(tmp_path, results={"a": JobResult(1, 1.0)})
    found = verdicts(world, keep_going=False)
    assert (found["a"], found["b"], found["c"], found["report"]) == (
        "Failed",
        "Completed",
        "NotStarted",
        "UpstreamFailed",
    )


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("no input", "an input is missing"),
        ("no output", "it wrote nothing"),
        (JobResult(-9, 1.0), "signal 9"),
        (JobResult(0, 1.0, stopped=True), "stopped"),
    ],
)
def test_every_kind_of_failure_is_a_verdict(tmp_path: Path, result: Any, told: str) -> None:
    world = World(tmp_path, results={"train": result})
    assert verdicts(world)["train"] == "Failed"
    assert told in world.shown["train"][1]


def test_inputs_edited_meanwhile_are_told(tmp_path: Path) -> None:
    world = World(tmp_path, results={"data": "edited"})
    assert verdicts(world)["data"] == "Completed"
    assert "input.txt changed while it ran" in world.shown["data"][1]


def test_what_had_ended_before_a_cancel_is_recorded(tmp_path: Path) -> None:
    world = World(tmp_path)

    def ended_and_cancelled() -> None:
        name, done = world.running.popitem()
        done(name)
        raise KeyboardInterrupt

    world.check = ended_and_cancelled  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        schedule(world).run()
    assert ("finish", "data") in world.calls
    assert ("abandon", "data") not in world.calls


@pytest.mark.parametrize("call", ["settle", "begin", "finish"])
def test_an_error_of_the_system_fails_one_stage_and_no_other(tmp_path: Path, call: str) -> None:
    world = World(tmp_path)
    original = getattr(world, call)

    def broken(name: str, *rest: Any) -> Any:
        if name == "a":
            raise OSError(5, "Input/output error")
        return original(name, *rest)

    setattr(world, call, broken)
    found = verdicts(world)
    assert (found["a"], found["c"], found["report"]) == ("Failed", "Completed", "UpstreamFailed")
    assert world.shown["a"][1].startswith("OSError: ")


def test_a_cluster_that_keeps_the_time_is_left_to_it(tmp_path: Path) -> None:
    job = Job("a", (("true",),), str(tmp_path), {}, (), "log", timeout=60)
    assert job.launched_by(("srun",)).timeout == 60
    assert job.launched_by(("srun",), limited_here=False).timeout is None


def test_whatever_ends_the_run_stops_what_runs_and_frees_the_locks(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.check = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        schedule(world).run()
    assert world.calls[-2:] == [("stop", ""), ("abandon", "data")]
