"""What a checkpoint answers on the probe hands, and the summary with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.evaluation.episodes import AttemptRecord, run_episodes
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.stats import wilson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.inference import Engine, Sampling
    from rlheals.tasks import Task

RUNG = ["profile", "model", "seed", "stage", "checkpoint_step", "cell_id"]


@dataclass(frozen=True)
class Prober:
    """All that stays the same while the weights behind ``engine`` change.

    Attributes:
        engine: the live model.
        dialogue: its chat template.
        task: makes the graded episodes.
        prompt_format: name of the task's prompt format.
        sampling: randomness and token budget of a response.
        context: tokens the model can hold.
    """

    engine: Engine
    dialogue: Dialogue
    task: Task
    prompt_format: str
    sampling: Sampling
    context: int

    def answers(
        self,
        rows: pl.DataFrame,
        attempts: int,
        columns: Mapping[str, Any],
        on_finished: Callable[[int], None] = lambda count: None,
    ) -> pl.DataFrame:
        """Every attempt on the probe ``rows`` (schema ``probes``) as a table of schema ``answers``.

        Args:
            rows: the hands to play.
            attempts: graded attempts allowed on each.
            columns: values of the columns profile … cell_id, which name the checkpoint behind the engine.
            on_finished: progress, see `run_episodes`.

        Raises:
            UserError: a prompt does not fit into the model's context.
        """
        hands = rows.to_dicts()
        episodes = [
            self.task.episode(hand["item"], self.prompt_format, attempts, self.task.spec.feedback) for hand in hands
        ]
        played = run_episodes(self.engine, self.dialogue, episodes, self.sampling, self.context, on_finished)
        tail = {"engine": self.engine.name, "sampling": describe(self.sampling)}
        records = [
            {**columns, **_row(hand, record), **tail}
            for hand, attempts_made in zip(hands, played, strict=True)
            for record in attempts_made
        ]
        return check(pl.DataFrame(records, schema=SCHEMAS["answers"]), "answers", "the probe's answers")


def describe(sampling: Sampling) -> str:
    """``greedy``, or the settings that differ from plain sampling, e.g. ``temperature=0.6,top_p=0.9,seed=0``.

    A repetition penalty and stop strings are told in both cases.
    """
    parts = ["greedy"] if sampling.temperature == 0 else [f"temperature={sampling.temperature:g}"]
    if sampling.temperature:
        parts += [f"top_p={sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"top_k={sampling.top_k}"] if sampling.top_k else []
        parts.append(f"seed={sampling.seed}")
    parts += [f"repetition_penalty={sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
    parts += [f"stop={list(sampling.stop)}"] if sampling.stop else []
    return ",".join(parts)


def _row(hand: Mapping[str, Any], record: AttemptRecord) -> dict[str, Any]:
    turn = record.turn
    return {
        "condition": hand["condition"],
        "split": hand["split"],
        "hand_id": hand["hand_id"],
        "attempt": record.attempt,
        "response": record.response,
        "verdict": turn.verdict,
        "reward": float(turn.reward),
        "solved": turn.solved,
        "solved_first_try": turn.solved and record.attempt == 1,
        "solved_under_training_rule": turn.solved_under_training_rule,
        "format_error": turn.format_error,
        "fields_ok": turn.fields_ok,
        "tokens": record.tokens,
    }


def summarise(answers: pl.DataFrame, allowed: Sequence[int] = (1,)) -> pl.DataFrame:
    """Accuracy with Wilson intervals, one row per rung x condition x split x attempts allowed.

    Args:
        answers: schema ``answers``.
        allowed: numbers of attempts to report; an attempt counts when its number does not exceed it.

    Returns:
        Schema ``probe_summary``, in the order of ``answers``.
    """
    tables = [_summarise(answers, attempts) for attempts in dict.fromkeys(allowed)]
    return check(pl.concat(tables), "probe_summary", "the probe summary")


def _summarise(answers: pl.DataFrame, attempts: int) -> pl.DataFrame:
    keys = [*RUNG, "condition", "split"]
    first = pl.col("attempt") == 1
    hands = (
        answers.filter(pl.col("attempt") <= attempts)
        .group_by([*keys, "hand_id"], maintain_order=True)
        .agg(
            solved=pl.col("solved").any(),
            first_solved=pl.col("solved_first_try").any(),
            format_error=pl.col("format_error").filter(first).any(),
            training_rule=pl.col("solved_under_training_rule").filter(first).any(),
            fields_ok=pl.col("fields_ok").filter(first).first(),
            reward=pl.col("reward").filter(first).first(),
        )
    )
    later = (pl.col("solved") & ~pl.col("first_solved")).sum() / (~pl.col("first_solved")).sum()
    table = hands.group_by(keys, maintain_order=True).agg(
        attempts=pl.lit(attempts, pl.Int64).first(),
        n=pl.len().cast(pl.Int64),
        solved=pl.col("solved").sum().cast(pl.Int64),
        accuracy=pl.col("solved").mean(),
        format_error_rate=pl.col("format_error").mean(),
        training_rule_rate=pl.col("training_rule").mean(),
        fields_ok_rate=pl.col("fields_ok").mean(),
        mean_reward=pl.col("reward").mean(),
        solved_later_given_first_failed=later if attempts > 1 else pl.lit(None, pl.Float64).first(),
    )
    bounds = [wilson(k, n) for k, n in table.select("solved", "n").iter_rows()]
    return table.with_columns(
        pl.Series("wilson_low", [low for low, _ in bounds], pl.Float64),
        pl.Series("wilson_high", [high for _, high in bounds], pl.Float64),
        # 0 / 0 where every hand was solved at once: there is no first failure to condition on.
        pl.col("solved_later_given_first_failed").fill_nan(None),
    ).select(list(SCHEMAS["probe_summary"]))
