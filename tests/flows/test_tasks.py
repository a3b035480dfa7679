from __future__ import annotations

import pytest

from flows.tasks import check_places
from rlheals.errors import UserError
from rlheals.orchestration.job import Node, Resources

GIB = 2**30
MACHINES = [{"CPU": 8.0, "memory": 16.0 * GIB}, {"CPU": 4.0, "GPU": 2.0, "memory": 64.0 * GIB}]


def test_a_stage_that_one_machine_of_a_ray_cluster_can_take_is_accepted() -> None:
    check_places([Node("a", (), Resources(cpus=4, gpus=2, memory_gib=64)), Node("b", (), Resources(cpus=8))], MACHINES)


@pytest.mark.parametrize("need", [{"cpus": 9}, {"gpus": 3}, {"cpus": 8, "gpus": 1}, {"memory_gib": 65.0}])
def test_a_stage_that_no_machine_can_take_is_refused_instead_of_waiting(need: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"stage a reserves .* no machine of the Ray cluster has that much"):
        check_places([Node("a", (), Resources.of("a", need))], MACHINES)
