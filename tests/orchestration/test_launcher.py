from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.orchestration.job import Resources
from rlheals.orchestration.launcher import launcher_prefix

FULL = Resources(gpus=2, cpus=8, memory_gib=30.5, timeout=90)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", ()),
        ("srun --gres=gpu:{gpus} -c {cpus}", ("srun", "--gres=gpu:2", "-c", "8")),
        ("srun --mem={memory_gib}G -t {timeout_minutes} -J {name}", ("srun", "--mem=31G", "-t", "2", "-J", "sft@a b")),
        ("ssh node 'cd /x y;'", ("ssh", "node", "cd /x y;")),
        ("docker run --gpus {{{gpus}}}", ("docker", "run", "--gpus", "{2}")),
    ],
)
def test_fields_are_filled_in(template: str, expected: tuple[str, ...]) -> None:
    assert launcher_prefix(template, FULL, "sft@a b") == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("srun --gres=gpu:{gpus} -c {cpus}", ("srun", "-c", "1")),
        ("srun --gres gpu:{gpus} -c {cpus}", ("srun", "-c", "1")),
        ("srun -G {gpus} -c {cpus}", ("srun", "-c", "1")),
        ("srun -G{gpus}", ("srun",)),
        ("srun --mem={memory_gib}G --time={timeout_minutes}", ("srun",)),
        ("srun --mem {memory_gib}G -t {timeout_minutes} --exclusive", ("srun", "--exclusive")),
        # No option, so nothing that could be left out.
        ("mine {gpus} x", ("mine", "0", "x")),
        ("mine --quiet=1 {gpus}", ("mine", "--quiet=1", "0")),
        ("sh -c 'mine {gpus}'", ("sh", "-c", "mine 0")),
    ],
)
def test_what_a_stage_does_not_ask_for_is_left_out(template: str, expected: tuple[str, ...]) -> None:
    assert launcher_prefix(template, Resources()) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("srun --gres=gpu:{gpu}", r"\{gpu\} is not known; it may hold \{gpus\}, \{cpus\}, \{memory_gib\}"),
        ("srun {}", r"\{\} is not known"),
        ("srun {0}", r"\{0\} is not known"),
        ("srun {cpus.real}", r"\{cpus.real\} is not known"),
        ("srun {name[0]}", r"is not known"),
        ("srun 'x", "No closing quotation.*close its quotation marks"),
        ("srun {cpus", "expected '}'"),
        ("srun cpus}", "Single '}'"),
        ("srun {cpus:{cpus}d}", "only its name"),
        ("srun {cpus!r}", "only its name"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launcher_prefix(template, FULL)


@given(st.text(), st.text(max_size=10))
def test_any_text_is_filled_in_or_refused(template: str, name: str) -> None:
    try:
        filled = launcher_prefix(template, FULL, name)
    except UserError:
        return
    assert all(isinstance(argument, str) for argument in filled)


@given(st.text(alphabet=" '\"$;{}ab", max_size=10))
def test_a_name_stays_one_argument(name: str) -> None:
    assert launcher_prefix("srun -J {name} -c {cpus}", FULL, name) == ("srun", "-J", name, "-c", "8")
