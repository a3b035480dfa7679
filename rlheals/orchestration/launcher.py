"""The prefix that has a cluster's own launcher (``srun``, ``qsub -I``, ``docker run``) start a stage's command."""

from __future__ import annotations

import math
import shlex
import string
from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from rlheals.orchestration.job import Resources

FIELDS = ("gpus", "cpus", "memory_gib", "timeout_minutes", "name")
"""What may stand in braces in a template."""
_NOT_ASKED_FOR = ("gpus", "memory_gib", "timeout_minutes")


def launcher_prefix(template: str, resources: Resources, name: str = "") -> tuple[str, ...]:
    """Argument vector of ``template`` with a stage's resources filled in.

    Memory is rounded up to whole GiB and time up to whole minutes, as Slurm takes no fractions. An option about GPUs,
    memory or time that the stage does not ask for is left out, because a zero is not "nothing" to a launcher: Slurm
    refuses ``--gres=gpu:0`` where a partition has no GPUs, and takes ``--mem=0`` as all the memory of the node. Left
    out are ``--option=...`` and ``-o...`` in one word, and ``-o ...`` in two words.

    >>> from rlheals.orchestration.job import Resources
    >>> launcher_prefix("srun --gres=gpu:{gpus} -c {cpus}", Resources(gpus=2, cpus=8))
    ('srun', '--gres=gpu:2', '-c', '8')
    >>> launcher_prefix("srun --gres=gpu:{gpus} -c {cpus}", Resources(cpus=8))
    ('srun', '-c', '8')

    Args:
        template: a command line with fields in braces, split as a shell would; empty for no launcher.
        resources: what the stage declares in dvc.yaml.
        name: the stage's address.

    Raises:
        UserError: a field is not known, or a quotation mark or brace is not closed.
    """
    values = {
        "gpus": str(resources.gpus),
        "cpus": str(resources.cpus),
        "memory_gib": str(math.ceil(resources.memory_gib)),
        "timeout_minutes": str(math.ceil((resources.timeout or 0) / 60)),
        "name": name,
    }
    missing = {field for field in _NOT_ASKED_FOR if values[field] == "0"}
    filled: list[str] = []
    try:
        # Split before filling in, so that a value stays one argument whatever it holds.
        for argument in shlex.split(template):
            fields = _fields(argument, template)
            if fields & missing and _drop_option(argument, filled):
                continue
            filled.append(argument.format_map(values))
    except ValueError as error:
        raise UserError(
            f"--launcher {template!r} cannot be read ({error}); close its quotation marks and braces."
        ) from error
    return tuple(filled)


def _fields(argument: str, template: str) -> set[str]:
    """Names of the fields in one argument."""
    known = ", ".join(f"{{{name}}}" for name in FIELDS)
    found: set[str] = set()
    for _, field, form, conversion in string.Formatter().parse(argument):
        if field is None:
            continue
        if field not in FIELDS:
            raise UserError(f"--launcher {template!r}: {{{field}}} is not known; it may hold {known}.")
        if form or conversion:
            raise UserError(f"--launcher {template!r}: {{{field}}} takes only its name between the braces.")
        found.add(field)
    return found


def _drop_option(argument: str, before: list[str]) -> bool:
    """Whether ``argument`` is an option or the value of the one before, which is then removed."""
    if argument.startswith("-"):
        return True
    option = bool(before) and before[-1].startswith("-") and "=" not in before[-1] and " " not in argument
    if option:
        before.pop()
    return option
