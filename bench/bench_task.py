"""Speed of the GeneralPoints task on one core, as a markdown table: ``python bench/bench_task.py``.

Answers are all different and graded without a result cache; times are processor times of one core. The worst case is
over texts of the greatest length the verifier reads, made to hurt: deep brackets, long digits, repeated keys, nesting.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from itertools import combinations_with_replacement, permutations
from typing import TYPE_CHECKING

import numpy as np

from rlheals.tasks.general_points.compact import chain_text
from rlheals.tasks.general_points.hands import Draw, draw_solvable
from rlheals.tasks.general_points.paper_verifier import known_solutions
from rlheals.tasks.general_points.rules import Rule
from rlheals.tasks.general_points.solver import expressions, integer_chains, solution_table
from rlheals.tasks.general_points.verifier import MAX_CHARS, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RULE = Rule.faces_as_10(24)
FORMS = ("compact", "paper")


def symbol(value: int) -> str:
    """A number card of ``value`` 1..10."""
    return "A" if value == 1 else str(value)


def hands() -> Iterator[tuple[int, ...]]:
    """Solvable ordered hands of number cards, in a fixed random order."""
    solvable = [values for values, count in solution_table(range(1, 11), 4, RULE.target).items() if count]
    ordered = sorted({order for values in solvable for order in permutations(values)})
    random.Random(0).shuffle(ordered)
    yield from ordered


def answers(form: str, count: int) -> list[tuple[str, list[str]]]:
    """``count`` different (answer, cards) pairs, about half of them right."""
    found: dict[str, list[str]] = {}
    change = random.Random(1)
    for values in hands():
        cards = [symbol(value) for value in values]
        if form == "compact":
            formulas = [chain_text(chain) for chain in integer_chains(values, RULE.target)]
            head = f'{{ "cards" {" ".join(cards)} "number" {" ".join(map(str, values))} "formula" '
            texts = [f"{head}{formula} }}" for formula in formulas]
            texts += [text.replace("= 24 }", f"= {change.randrange(145)} }}") for text in texts]
        else:
            head = f'{{\n  "cards": {cards},\n  "number": {list(values)},\n  "formula": "'
            formulas = list(expressions(values, RULE.target))
            texts = [f'{head}{formula}=24",\n}}' for formula in formulas]
            texts += [text.replace("*", "+", 1) for text in texts]
        found.update(dict.fromkeys(texts, cards))
        if len(found) >= count:
            break
    pairs = list(found.items())[:count]
    change.shuffle(pairs)
    return pairs


def grade_all(pairs: list[tuple[str, list[str]]], form: str) -> None:
    """Grade every answer once."""
    for text, cards in pairs:
        verify(text, cards, RULE, form)


def hostile() -> dict[str, str]:
    """Texts of `MAX_CHARS` characters that are slow for a careless verifier."""
    fill = MAX_CHARS - 64
    formulas = {
        "open brackets": "(" * fill,
        "bracket pairs": "(" * (fill // 2) + ")" * (fill // 2),
        "one long number": "9" * fill,
        "long sum": "9+" * (fill // 2),
        "powers": "9**" * (fill // 3),
        "leading zeros": "0" * (fill - 1) + "8",
        "white space": "1" + " " * fill,
    }
    texts = {name: f'{{"cards": [], "number": [], "formula": "{formula}"}}' for name, formula in formulas.items()}
    words = {"many steps": "1 + 1 = 2 , ", "long numbers": f"{'9' * 900} * {'9' * 900} = {'9' * 900} , "}
    texts |= {
        name: f'{{ "cards" "number" "formula" {step * (fill // len(step))}1 + 1 = 2 }}' for name, step in words.items()
    }
    for name, piece in {
        "JSON nesting": "[",
        "keys": '"formula": ',
        "lists": '"cards":[',
        "open keys": '"formula":"',
    }.items():
        texts[name] = piece * (MAX_CHARS // len(piece))
    return texts


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Least processor time of ``repeats`` runs of ``work``, which other load on the machine disturbs little."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def bench(count: int) -> list[tuple[str, str]]:
    """(what, measured) rows."""
    rows = [
        (
            "solver table, all 1,820 four-card multisets of 1..13",
            f"{seconds(lambda: solution_table(range(1, 14), 4, 24)):.2f} s",
        )
    ]
    for form in FORMS:
        pairs = answers(form, count)
        taken = seconds(partial(grade_all, pairs, form), 3)
        rows.append((f"verdicts, {form}, {len(pairs):,} different answers", f"{len(pairs) / taken:,.0f} /s"))
    draw, rng = Draw(), np.random.default_rng(0)
    first = seconds(lambda: draw_solvable(rng, 1, draw, RULE))
    taken = seconds(lambda: draw_solvable(rng, 1_000_000, draw, RULE), 3)
    rows.append((f"hands drawn and filtered (after {first:.2f} s for the table)", f"{1_000_000 / taken:,.0f} /s"))
    cards = ["A", "2", "3", "4"]
    worst = {}
    for name, text in hostile().items():
        for form in FORMS:
            for fidelity in ("exact", "official"):
                worst[f"{name}, {form}, {fidelity}"] = seconds(partial(verify, text, cards, RULE, form, fidelity), 5)
    slowest = max(worst, key=lambda name: worst[name])
    rows.append((f"slowest hostile answer of {MAX_CHARS} characters ({slowest})", f"{1000 * worst[slowest]:.2f} ms"))
    known_solutions((1, 2, 3, 4), RULE.target)  # its templates are made once
    look_up = known_solutions.__wrapped__
    every = combinations_with_replacement(range(1, 14), 4)
    cold = max(seconds(partial(look_up, values, RULE.target), 3) for values in every)
    rows.append(("slowest first look-up of a hand's known solutions (official)", f"{1000 * cold:.2f} ms"))
    return rows


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="different answers per form")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = bench(arguments.count)
    if arguments.json:
        print(json.dumps(dict(rows), indent=1))
        return
    print("| what | measured |\n|---|---|")
    for what, measured in rows:
        print(f"| {what} | {measured} |")


if __name__ == "__main__":
    main()
