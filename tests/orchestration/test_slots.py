from __future__ import annotations

import pytest

from rlheals.errors import UserError
from rlheals.orchestration.job import Node, Resources
from rlheals.orchestration.slots import Slots, Unlimited, parse_gpus, visible_gpus


def node(**resources: float) -> Node:
    return Node("stage", (), Resources.of("stage", resources))


def test_gpus_are_handed_out_once_and_come_back() -> None:
    slots = Slots(cpus=8, memory_gib=8, gpus=("0", "1", "GPU-abc"))
    assert slots.take("a", Resources(gpus=2)) == ("0", "1")
    assert slots.take("b", Resources(gpus=2)) is None
    assert slots.take("b", Resources(gpus=1)) == ("GPU-abc",)
    slots.give_back("a")
    assert slots.take("c", Resources(gpus=1)) == ("0",)


def test_cores_memory_and_jobs_limit() -> None:
    slots = Slots(jobs=2, cpus=4, memory_gib=8)
    assert slots.take("a", Resources(cpus=3, memory_gib=2)) == ()
    assert slots.take("b", Resources(cpus=2)) is None
    assert slots.take("b", Resources(memory_gib=7)) is None
    assert slots.take("b", Resources()) == ()
    assert slots.take("c", Resources(memory_gib=1)) is None, "two at a time"
    slots.give_back("a")
    slots.give_back("never there")
    assert slots.take("c", Resources(cpus=3)) == ()


def test_a_stage_that_wants_more_cores_than_there_are_gets_all() -> None:
    slots = Slots(cpus=2, memory_gib=8)
    assert slots.take("a", Resources(cpus=16)) == ()
    assert slots.take("b", Resources()) is None


@pytest.mark.parametrize(
    ("resources", "expected"),
    [({"gpus": 2}, r"reserves 2 GPU\(s\) and 1 can be used here"), ({"memory_gib": 9.5}, "reserves 9.5 GiB")],
)
def test_a_plan_that_could_never_finish_is_refused(resources: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Slots(cpus=2, memory_gib=8, gpus=("0",)).check([node(), node(**resources)])
    Unlimited().check([node(**resources)])


def test_a_cluster_limits_only_the_number_of_jobs() -> None:
    slots = Unlimited(jobs=1)
    assert slots.take("a", Resources(gpus=8, cpus=500)) == ()
    assert slots.take("b", Resources()) is None


def test_gpus_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == parse_gpus(None) == parse_gpus("auto") == ("2", "3")
    assert parse_gpus("0, 1") == ("0", "1")
    assert parse_gpus("none") == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    for wrong in ("0,0", "0,,1"):
        with pytest.raises(UserError, match="twice or an empty one"):
            parse_gpus(wrong)
