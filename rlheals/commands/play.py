"""``rlheals play``: one hand of the card game, graded by the verifier that grades the models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlheals.commands._shared import EPILOG, Json, print_json

if TYPE_CHECKING:
    from rlheals.tasks.general_points.rewards import Verdict
    from rlheals.tasks.general_points.rules import Rule

EXPLANATIONS = {
    "solved": "Right.",
    "format": "That is not a formula of numbers, + - * / and brackets.",
    "truncated": "That formula breaks off.",
    "empty": "There is no formula.",
    "wrong_number": "It uses a number that is not on the hand, or uses one too often: {detail}.",
    "unused_number": "It leaves a number unused: {detail}.",
    "wrong_value": "It does not give {target}.",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("play", epilog=EPILOG)(play)


def play(
    formula: Annotated[str | None, typer.Argument(help="Answer, e.g. '(10-4)*4*1'.", show_default=False)] = None,
    cards: Annotated[str | None, typer.Option(help="Hand, e.g. 'A 4 J K'; dealt when not given.")] = None,
    rule: Annotated[Literal["id", "ood"], typer.Option(help="id: J, Q, K count 10; ood: 11, 12, 13.")] = "id",
    seed: Annotated[int, typer.Option(help="Decides the hand that is dealt.", min=0)] = 0,
    target: Annotated[int, typer.Option(help="Number to reach.", min=0)] = 24,
    solutions: Annotated[bool, typer.Option("--solutions", help="Show every solution and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Deal a hand and check a formula, with the rules and the verifier the models are graded by.

    Without FORMULA it asks for one until it is right or you leave with an empty line.
    """
    from rlheals.tasks.general_points.rules import Rule
    from rlheals.tasks.general_points.solver import expressions

    face_values = Rule.faces_as_10(target) if rule == "id" else Rule.faces_as_11_12_13(target)
    hand = _hand(cards, face_values, seed, faces=rule == "ood")
    values = face_values.values(hand)
    content = {"cards": hand, "values": values, "rule": rule, "target": target}
    if solutions:
        _show_solutions(content, expressions(values, target), as_json)
    elif formula is not None:
        _show_verdict(content, formula, _grade(formula, hand, face_values), as_json)
    elif as_json:
        print_json(content)
    else:
        _ask(hand, face_values)


def _hand(cards: str | None, rule: Rule, seed: int, *, faces: bool) -> list[str]:
    """The hand named by ``cards``, or a solvable one dealt from ``seed``."""
    import numpy as np

    from rlheals.errors import UserError
    from rlheals.tasks.general_points.hands import Draw, draw_solvable, symbols_of

    if cards is not None:
        hand = cards.replace(",", " ").upper().split()
        if not 2 <= len(hand) <= 6:
            raise UserError(f"--cards names {len(hand)} cards; give 2 to 6, for example --cards 'A 4 J K'.")
        return hand
    draw = Draw(faces=faces)
    dealt = symbols_of(draw_solvable(np.random.default_rng(seed), 512, draw, rule), draw)
    if not dealt:
        raise UserError(f"no hand dealt with --seed {seed} reaches {rule.target}; choose another --target.")
    return list(dealt[0])


def _grade(formula: str, hand: list[str], rule: Rule) -> Verdict:
    import json

    from rlheals.tasks.general_points.verifier import verify

    answer = {"cards": hand, "number": list(rule.values(hand)), "formula": formula}
    return verify(json.dumps(answer), hand, rule, "paper")


def _explain(verdict: Verdict, target: int) -> str:
    return EXPLANATIONS[verdict.code].format(detail=", ".join(verdict.detail), target=target)


def _show_solutions(content: dict[str, object], found: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        print_json({**content, "solutions": found})
        return
    typer.echo("\n".join(found) if found else f"There is no solution: nothing reaches {content['target']}.")


def _show_verdict(content: dict[str, object], formula: str, verdict: Verdict, as_json: bool) -> None:
    target = int(str(content["target"]))
    if as_json:
        print_json({**content, "formula": formula, "verdict": verdict.code, "solved": verdict.solved})
    else:
        typer.echo(_explain(verdict, target))


def _ask(hand: list[str], rule: Rule) -> None:
    """Prompt until the formula is right or the line is empty."""
    typer.echo(f"Cards: {' '.join(hand)}. {rule.description()} Reach {rule.target}; an empty line ends the game.")
    while formula := _prompt():
        verdict = _grade(formula, hand, rule)
        typer.echo(_explain(verdict, rule.target))
        if verdict.solved:
            return


def _prompt() -> str:
    """One line; the end of input counts as an empty one."""
    try:
        return str(typer.prompt("formula", default="", show_default=False))
    except typer.Abort:
        typer.echo()
        return ""
