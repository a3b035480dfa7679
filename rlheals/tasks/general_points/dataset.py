"""All tables of a GeneralPoints study, as pure functions of (spec, format, sizes, seed)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS
from rlheals.tasks.core import CONDITIONS, DatasetSizes, TaskData
from rlheals.tasks.general_points.hands import value_multisets
from rlheals.tasks.general_points.leakage import leakage_report
from rlheals.tasks.general_points.rules import DECKS
from rlheals.tasks.general_points.solver import count_solutions
from rlheals.tasks.general_points.splits import Hand, Splits, impossible, key_of, rule_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rlheals.tasks.core import PromptFormat
    from rlheals.tasks.general_points.spec import GeneralPointsSpec

# Beyond, multisets and solutions are too many to list, and only the hands in use appear in the hands table.
_LISTED_CARDS = 4
_LOSS_SERIES = {"id": "test_id", "ood": "ood"}


def build(spec: GeneralPointsSpec, prompt_format: PromptFormat, sizes: DatasetSizes, seed: int) -> TaskData:
    """Draw every table; see `rlheals.tasks.core.Task.build`."""
    splits = Splits(spec, prompt_format, seed)
    every = _every_multiset(splits) if spec.cards <= _LISTED_CARDS else []
    if every and not any(splits.is_solvable(values) for values in every):
        raise impossible(spec)
    if every and all(splits.solution(values) is None for values in every if splits.is_solvable(values)):
        raise UserError(
            f"task.target is {spec.target}, but the {prompt_format.name} format cannot write a solution of any hand "
            "(its running results are whole numbers of limited size); choose another target or prompt_format."
        )
    training = splits.hands("sft", sizes.sft_rows, distinct=False, key="dataset.sft_rows")
    rollouts = splits.hands("rl_prompts", sizes.rl_prompts, distinct=False, key="dataset.rl_prompts")
    pools = {condition: _pool(splits, condition, sizes) for condition in CONDITIONS}
    played = [hand.values for part in (training, rollouts, *pools.values()) for hand in part]
    hands = _hands_table(splits, every or sorted(set(played)))
    sft = _sft_table(splits, training)
    rl_prompts = _rl_table(splits, rollouts)
    probes = _probe_table(splits, pools, sizes)
    loss_sets = _loss_table(splits, training[: sizes.loss_rows], pools, sizes)
    leakage = leakage_report(hands, sft, rl_prompts, probes, loss_sets) | {"excluded": _excluded(splits, hands)}
    return TaskData(hands, sft, rl_prompts, probes, loss_sets, leakage)


def item(hand: Hand, stream: str) -> str:
    """JSON payload that `Task.episode` plays from."""
    return json.dumps({"cards": list(hand.cards), "rule": rule_name(stream)})


def _every_multiset(splits: Splits) -> list[tuple[int, ...]]:
    """Every multiset of values that the deck has under either rule."""
    symbols, spec = DECKS[splits.spec.deck], splits.spec
    return list(value_multisets([spec.rule("id").values(symbols), spec.rule("ood").values(symbols)], spec.cards))


def _pool(splits: Splits, condition: str, sizes: DatasetSizes) -> list[Hand]:
    """Different hands for select, then confirm, then the teacher-forced losses of the conditions that have one."""
    wanted = sizes.select + sizes.confirm + (sizes.loss_rows if condition in _LOSS_SERIES else 0)
    return splits.hands(condition, wanted, distinct=True, key="dataset.probe")


def _table(schema: str, rows: Iterable[tuple[Any, ...]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SCHEMAS[schema], orient="row")


def _hands_table(splits: Splits, multisets: Iterable[tuple[int, ...]]) -> pl.DataFrame:
    target, listed = splits.spec.target, splits.spec.cards <= _LISTED_CARDS
    rows = []
    for values in multisets:
        key, solvable = key_of(values), splits.is_solvable(values)
        count = count_solutions(values, target) if listed else None
        expressible = solvable and splits.solution(values) is not None
        rows.append((key, list(values), solvable, count, expressible, splits.is_held_out(key)))
    return _table("hands", rows)


def _prompter(splits: Splits, stream: str) -> Callable[[Hand], str]:
    rule = splits.rule(stream)
    return lambda hand: splits.prompt_format.prompt(hand.cards, rule)


def _completion(splits: Splits, stream: str, hand: Hand) -> str:
    return splits.prompt_format.response(hand.cards, splits.rule(stream), splits.solution(hand.values))


def _sft_table(splits: Splits, hands: list[Hand]) -> pl.DataFrame:
    prompt = _prompter(splits, "sft")
    return _table(
        "sft",
        ((i, h.hand_id, h.hand_key, prompt(h), _completion(splits, "sft", h)) for i, h in enumerate(hands)),
    )


def _rl_table(splits: Splits, hands: list[Hand]) -> pl.DataFrame:
    prompt = _prompter(splits, "rl_prompts")
    return _table(
        "rl_prompts", ((i, h.hand_id, h.hand_key, prompt(h), item(h, "rl_prompts")) for i, h in enumerate(hands))
    )


def _probe_table(splits: Splits, pools: dict[str, list[Hand]], sizes: DatasetSizes) -> pl.DataFrame:
    rows = []
    for condition, pool in pools.items():
        prompt = _prompter(splits, condition)
        for place, hand in enumerate(pool[: sizes.select + sizes.confirm]):
            split = "select" if place < sizes.select else "confirm"
            rows.append((condition, split, hand.hand_id, hand.hand_key, prompt(hand), item(hand, condition)))
    return _table("probes", rows)


def _loss_table(
    splits: Splits, training: list[Hand], pools: dict[str, list[Hand]], sizes: DatasetSizes
) -> pl.DataFrame:
    """Rows of ``train_id``, ``test_id`` and ``ood``; formats with a mismatched template add ``ood_mismatched``."""
    parts = {"train_id": ("sft", training)}
    parts |= {series: (name, pools[name][sizes.select + sizes.confirm :]) for name, series in _LOSS_SERIES.items()}
    rows = []
    for series, (stream, hands) in parts.items():
        prompt = _prompter(splits, stream)
        rows += [(series, hand.hand_id, prompt(hand), _completion(splits, stream, hand)) for hand in hands]
    mismatched = getattr(splits.prompt_format, "mismatched", None)
    if mismatched is not None:
        rule = splits.rule("ood")
        for hand in parts["ood"][1]:
            rows.append(("ood_mismatched", hand.hand_id, *mismatched(hand.cards, rule, splits.solution(hand.values))))
    return _table("loss_sets", rows)


def _excluded(splits: Splits, hands: pl.DataFrame) -> dict[str, Any]:
    """What the format could not express: solvable value multisets, and draws of each stream."""
    return {
        "solvable value multisets without an expressible solution": hands.filter(
            pl.col("solvable") & ~pl.col("expressible")
        ).height,
        "draws dropped": dict(splits.excluded),
    }
