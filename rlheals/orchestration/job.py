"""Plain data that travels between the driver, the scheduler and whatever machine runs a stage."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlheals.errors import UserError


class Verdict(StrEnum):
    """What became of a stage in one run of the driver; the value is the name of its Prefect state."""

    CACHED = "Cached"
    """Nothing it depends on has changed: it was not run."""
    RESTORED = "Restored"
    """An earlier run with the same inputs is in DVC's cache: its outputs were checked out (or pulled)."""
    COMPLETED = "Completed"
    """Its command ran and DVC has recorded the outputs."""
    FAILED = "Failed"
    """Its command failed, ran out of time, or did not write what it declares."""
    UPSTREAM_FAILED = "UpstreamFailed"
    """A stage it depends on failed, so it was not started."""
    NOT_STARTED = "NotStarted"
    """The driver stopped before its turn."""

    @property
    def good(self) -> bool:
        """Whether the stage's outputs are up to date."""
        return self in (Verdict.CACHED, Verdict.RESTORED, Verdict.COMPLETED)


class Resources(BaseModel):
    """What a stage needs while it runs: DVC's free-form ``meta`` of the stage.

    Attributes:
        gpus: GPUs, whole ones.
        cpus: CPU cores.
        memory_gib: main memory, in GiB.
        timeout: seconds after which an attempt is stopped; None is no limit.
        retries: further attempts after a failure.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[int, Field(ge=1)] = 1
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    timeout: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def of(cls, stage: str, meta: Any) -> Resources:
        """Resources of ``stage`` from its ``meta`` in dvc.yaml; nothing declared means one core and no limit.

        Raises:
            UserError: ``meta`` is no mapping, or a key or value in it is not known; the stage and key are named.
        """
        try:
            return cls.model_validate(meta or {})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, ("meta", *first["loc"])))
            known = ", ".join(cls.model_fields)
            raise UserError(
                f"stage {stage} in dvc.yaml: {key} is not usable ({first['msg']}); meta may hold {known}."
            ) from error


@dataclass(frozen=True)
class Node:
    """A stage of the plan.

    Attributes:
        name: DVC's address, for example ``sft@mini-tiny-0``.
        upstream: names of the stages it waits for, all in the same plan.
        resources: what it needs while it runs.
    """

    name: str
    upstream: tuple[str, ...]
    resources: Resources


@dataclass(frozen=True)
class Job:
    """One command of a stage, to be run anywhere that sees the same files; plain data that pickles.

    Attributes:
        name: the stage's address.
        commands: argument vectors run one after the other, each the shell call DVC would make.
        cwd: absolute working directory.
        environment: variables added to those of the process that runs the job.
        outputs: absolute paths removed before an attempt after a failed one; what the stage keeps is not among them.
        log: absolute path of the log file; attempts are appended.
        timeout: seconds for one attempt over all commands; None is no limit.
        launcher: prefix of each command, for example ``("srun", "--gres=gpu:1")``.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    cwd: str
    environment: dict[str, str]
    outputs: tuple[str, ...]
    log: str
    timeout: float | None = None
    launcher: tuple[str, ...] = ()

    @property
    def progress(self) -> str:
        """Path of the JSON lines the stage reports its progress in, beside the log and readable while it runs."""
        return str(Path(self.log).with_suffix(".progress.jsonl"))

    def on_gpus(self, gpus: tuple[str, ...]) -> Job:
        """The same job, seeing only these GPUs (indices or UUIDs, as CUDA_VISIBLE_DEVICES takes them)."""
        return replace(self, environment=self.environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})

    def launched_by(self, launcher: tuple[str, ...], *, limited_here: bool = True) -> Job:
        """The same job with a prefix for its commands, without a time limit where the launcher has taken that over."""
        return replace(self, launcher=launcher, timeout=self.timeout if limited_here else None)


@dataclass(frozen=True)
class JobResult:
    """How one attempt at a job ended.

    Attributes:
        returncode: exit code of the first command that failed, else 0; negative for a signal.
        seconds: wall time of the attempt.
        timed_out: it was stopped because it ran over its time limit.
        stopped: it was stopped because the driver is ending.
        last_line: the last line it printed that is not blank, for messages.
    """

    returncode: int
    seconds: float
    timed_out: bool = False
    stopped: bool = False
    last_line: str = ""


@dataclass(frozen=True)
class ProgressLine:
    """One line of the progress protocol.

    Attributes:
        label: what is being counted, for example ``sft``.
        done: units done.
        total: units in all; 0 where that is unknown.
        unit: name of a unit in the singular, for example ``step``.
        note: anything short, for example the loss.
        eta: estimated seconds left; None where unknown.
    """

    label: str
    done: int
    total: int
    unit: str = "step"
    note: str = ""
    eta: float | None = None

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


def machine_cpus() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
