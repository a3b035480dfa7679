"""The rolling state of a branch: everything that the next update depends on, complete or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError, disk_errors
from rlheals.publish import newest_intact, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STATES = "states"
PROGRESS = "progress.json"
"""Update, world size, identity and curves, beside what accelerate saves."""


@dataclass
class Curves:
    """What was measured on the way, without the run's columns.

    Attributes:
        training: one row an update (schema ``rl_training``).
        advantages: histogram of the advantages before normalisation (schema ``advantages``).
    """

    training: list[dict[str, Any]] = field(default_factory=list)
    advantages: list[dict[str, Any]] = field(default_factory=list)


def save_state(accelerator: Any, scratch: Path, update: int, identity: Mapping[str, Any], curves: Curves) -> None:
    """Write ``states/state-<update>``, rename it into place when whole, and drop the older ones.

    Every process calls this. A kill at any moment leaves the previous state or this one, never half of one.

    Args:
        accelerator: has prepared model and optimiser.
        scratch: of the branch.
        update: number of updates done.
        identity: what the run is; `load_state` refuses another.
        curves: so far.

    Raises:
        UserError: the disk is full or not writable.
    """
    final = scratch / STATES / f"state-{update}"
    partial = final.with_name(f".{final.name}.partial")
    with disk_errors(scratch):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {
                "update": update,
                "world_size": accelerator.num_processes,
                "identity": dict(identity),
                **asdict(curves),
            }
            (partial / PROGRESS).write_text(json.dumps(progress))
            write_manifest(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _drop_others(final)
        accelerator.wait_for_everyone()


def _drop_others(newest: Path) -> None:
    for other in newest.parent.glob("state-*"):
        if other != newest:
            shutil.rmtree(other)


def load_state(accelerator: Any, scratch: Path, identity: Mapping[str, Any]) -> tuple[int, Curves]:
    """Restore the newest intact state; (number of updates done, curves), which is (0, empty) without one.

    Raises:
        UserError: the state was written by another number of processes or by a run with another ``identity``.
    """
    if accelerator.is_main_process:
        newest_intact((scratch / STATES).glob("state-*"))
    accelerator.wait_for_everyone()
    states = sorted((scratch / STATES).glob("state-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    if not states:
        return 0, Curves()
    state = states[0]
    progress = json.loads((state / PROGRESS).read_text())
    _refuse_other_world(state, progress["world_size"], accelerator.num_processes)
    _refuse_other_run(state, progress["identity"], json.loads(json.dumps(dict(identity))))
    accelerator.load_state(str(state))
    return int(progress["update"]), Curves(progress["training"], progress["advantages"])


def _refuse_other_world(state: Path, saved: int, now: int) -> None:
    if saved != now:
        raise UserError(
            f"{state} was written by {saved} processes and cannot go on with {now}, which would divide the episodes "
            f"differently; start {saved} processes, or delete {state.parent} to begin anew."
        )


def _refuse_other_run(state: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if different:
        key = different[0]
        raise UserError(
            f"{state} belongs to a run with another {key} ({_short(saved.get(key))}, now {_short(now.get(key))}); "
            f"restore it, or delete {state.parent} to begin anew."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
