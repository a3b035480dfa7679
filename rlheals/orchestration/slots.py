"""What this machine has to give to stages that run at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rlheals.errors import UserError
from rlheals.orchestration.job import Node, Resources, machine_cpus

GIB = 2**30


def machine_memory_gib() -> float:
    """Main memory this process may use, in GiB: the machine's, or less in a container."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        allowed = installed
    return min(installed, allowed) / GIB


def visible_gpus() -> tuple[str, ...]:
    """GPUs this process may use: CUDA_VISIBLE_DEVICES where set, else the indices that ``nvidia-smi`` lists."""
    declared = os.environ.get("CUDA_VISIBLE_DEVICES")
    if declared is not None:
        return tuple(name.strip() for name in declared.split(",") if name.strip())
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    return tuple(str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU "))


def parse_gpus(text: str | None) -> tuple[str, ...]:
    """The GPUs of ``--gpus``: ``0,1``; ``none``; or None or ``auto`` for `visible_gpus`.

    Raises:
        UserError: one of them is named twice or is empty.
    """
    if text is None or text == "auto":
        return visible_gpus()
    if text in ("", "none"):
        return ()
    gpus = tuple(name.strip() for name in text.split(","))
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus {text} names a GPU twice or an empty one; write, say, --gpus 0,1 or --gpus none.")
    return gpus


@dataclass
class Slots:
    """Free places, cores, memory and GPUs; a stage starts when all it needs is free.

    Attributes:
        jobs: stages at a time; None is no limit of its own.
        cpus: cores; a stage that wants more than there are gets all of them.
        memory_gib: main memory, in GiB.
        gpus: names for CUDA_VISIBLE_DEVICES; the first free ones are handed out.
    """

    jobs: int | None = None
    cpus: int = field(default_factory=machine_cpus)
    memory_gib: float = field(default_factory=machine_memory_gib)
    gpus: tuple[str, ...] = ()
    _held: dict[str, tuple[Resources, tuple[str, ...]]] = field(default_factory=dict)
    hands_out_gpus: ClassVar[bool] = True
    """Whether a stage sees the GPUs it was given and no others; none when it reserves none."""

    def check(self, nodes: list[Node]) -> None:
        """Refuse a plan that could never finish here.

        Raises:
            UserError: a stage needs more GPUs or memory than there are; the stage and the numbers are named.
        """
        for node in nodes:
            need = node.resources
            if need.gpus > len(self.gpus):
                raise UserError(
                    f"stage {node.name} reserves {need.gpus} GPU(s) and {len(self.gpus)} can be used here; lower "
                    "resources.gpus in params.yaml, name more with --gpus, or use --launcher or --runner ray."
                )
            if need.memory_gib > self.memory_gib:
                raise UserError(
                    f"stage {node.name} reserves {need.memory_gib:g} GiB of memory and this machine has "
                    f"{self.memory_gib:.1f}; lower resources.memory_gib in params.yaml, or use --launcher or "
                    "--runner ray."
                )

    def take(self, name: str, need: Resources) -> tuple[str, ...] | None:
        """Reserve ``need`` for stage ``name``; its GPUs, or None while something is missing."""
        held = [resources for resources, _ in self._held.values()]
        cores = min(need.cpus, self.cpus)
        used_cores = sum(min(other.cpus, self.cpus) for other in held)
        free = self._free_gpus()
        if (
            (self.jobs is not None and len(held) >= self.jobs)
            or used_cores + cores > self.cpus
            or sum(other.memory_gib for other in held) + need.memory_gib > self.memory_gib
            or len(free) < need.gpus
        ):
            return None
        gpus = free[: need.gpus]
        self._held[name] = (need, gpus)
        return gpus

    def give_back(self, name: str) -> None:
        """Free what ``name`` holds, if anything."""
        self._held.pop(name, None)

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {gpu for _, gpus in self._held.values() for gpu in gpus}
        return tuple(gpu for gpu in self.gpus if gpu not in taken)


@dataclass
class Unlimited(Slots):
    """No local limit but ``jobs``: a cluster places the stages and chooses their GPUs."""

    hands_out_gpus: ClassVar[bool] = False

    def check(self, nodes: list[Node]) -> None:
        """Nothing to refuse: what the cluster has is not known here."""

    def take(self, name: str, need: Resources) -> tuple[str, ...] | None:
        """A place when fewer than ``jobs`` are taken; never GPUs."""
        if self.jobs is not None and len(self._held) >= self.jobs:
            return None
        self._held[name] = (need, ())
        return ()
