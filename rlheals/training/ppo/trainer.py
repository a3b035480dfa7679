"""Turn-level PPO and its controls on `accelerate`: one branch, resumable to the last byte.

An update is a function of (weights, optimiser, update index): hands, sampling, shuffles and learning rates come from
counters, so a resumed run needs no state of random generators and all branches of a seed draw the same numbers.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlheals.errors import UserError, disk_errors
from rlheals.evaluation.dialogue import Dialogue
from rlheals.models.checkpoint import save_model
from rlheals.progress import Progress
from rlheals.training.ppo.actor_critic import make_actor_critic, token_log_probs
from rlheals.training.ppo.batches import Batch, Scored, estimate_advantages, make_batch, tokens_of
from rlheals.training.ppo.doctor import histogram
from rlheals.training.ppo.learner import Learner, make_optimizer
from rlheals.training.ppo.losses import kl_penalty
from rlheals.training.ppo.metrics import Facts, advantages_of, facts_of, loss_columns, rollout_columns
from rlheals.training.ppo.rollout import RolloutSettings, collect, draw_hands, plays_itself, synchronise
from rlheals.training.ppo.settings import check_batches
from rlheals.training.ppo.state import Curves, load_state, save_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from rlheals.inference import Engine
    from rlheals.inference.fingerprint import Proof
    from rlheals.tasks import Task
    from rlheals.training.ppo.actor_critic import Evaluation
    from rlheals.training.ppo.reference import Reference
    from rlheals.training.ppo.rollout import EpisodeRecord
    from rlheals.training.ppo.settings import PpoSettings

UPDATES = "updates"
KEPT_LOGITS = 2**30
"""Bytes of reference logits one process keeps from scoring to training; more are computed again in every epoch."""


@dataclass(frozen=True)
class BranchRun:
    """Everything a branch needs; `rlheals.training.grpo` takes the same.

    Attributes:
        policy: the parent checkpoint's model, float32; trained in place.
        reference: what the KL term pulls to; None when it is off.
        tokenizer: saved with every checkpoint.
        make_engine: from (policy, tokenizer) to the engine that plays; it may hold the live module.
        task: grades.
        prompts: (hand_id, item) rows of ``rl_prompts``.
        settings: constants of the arm.
        updates: number of policy updates.
        episodes: of an update, over all processes.
        checkpoints: numbers of updates after which the weights are kept.
        state_every: updates between resumable states.
        rollout: how episodes are played; the rank is filled in.
        scratch: gets ``updates/update-<n>`` and the rolling state; the same folder resumes.
        identity: what the branch is (parent, settings); a state of another one is refused.
        bfloat16: compute in bfloat16 (autocast) with float32 weights.
        device: ``cpu`` or ``cuda``.
        label: shown by the progress bar.
        engine_dtype: of the weights of an engine beside the policy.
    """

    policy: Any
    reference: Reference | None
    tokenizer: Any
    make_engine: Callable[[Any, Any], Engine]
    task: Task
    prompts: Sequence[tuple[str, str]]
    settings: PpoSettings
    updates: int
    episodes: int
    checkpoints: Sequence[int]
    state_every: int
    rollout: RolloutSettings
    scratch: Path
    identity: Mapping[str, Any]
    bfloat16: bool = False
    device: str = "cpu"
    label: str = "ppo"
    engine_dtype: str = "float32"


def train_branch(run: BranchRun) -> Curves:
    """Train the policy and return the curves; the checkpoints are in ``scratch/updates``.

    Resumes from the newest intact state in scratch; the weights are the same to the last byte as without a break.

    Raises:
        UserError: episodes do not divide among minibatches and processes, the state is of another run or world size,
            the start cannot write the answer format, an update exceeds the KL limit, a number is not finite, or the
            disk is full.
    """
    trainer = Trainer(run)
    done, curves = load_state(trainer.accelerator, run.scratch, trainer.identity)
    bar = Progress(run.label, run.updates, "update", start=done) if trainer.accelerator.is_main_process else None
    with disk_errors(run.scratch), closing(trainer.engine):
        for update in range(done, run.updates):
            row, advantages = trainer.update(update)
            curves.training.append(row)
            curves.advantages += advantages
            if bar is not None:
                bar.update(note=f"solved {row['solved_rate']:.2f}, reward {row['reward_mean']:.2f}")
            _keep(trainer, curves, update + 1)
    return curves


def _keep(trainer: Trainer, curves: Curves, done: int) -> None:
    """Checkpoint and state, where they are due after ``done`` updates."""
    run = trainer.run
    if done in run.checkpoints and trainer.accelerator.is_main_process:
        save_checkpoint(run.policy, run.tokenizer, run.scratch / UPDATES / f"update-{done}")
    if done % run.state_every == 0 or done == run.updates:
        save_state(trainer.accelerator, run.scratch, done, trainer.identity, curves)


def save_checkpoint(policy: Any, tokenizer: Any, final: Path) -> None:
    """A folder that loads by itself; renamed into place when whole."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(policy, tokenizer, partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def check_readable(label: str, format_errors: float, least: float) -> None:
    """Raise `UserError` when the start of branch ``label`` is below the format threshold.

    Args:
        label: names the branch.
        format_errors: share of unreadable answers in its first update.
        least: share of readable answers that is enough.
    """
    if 1 - format_errors < least:
        raise UserError(
            f"the start of {label} writes {100 * (1 - format_errors):.1f} % readable answers, below the format "
            f"threshold of {100 * least:g} %, so there is no reward to learn from; start from a later rung "
            "(ppo.starts in params.yaml) or sample closer to greedy (ppo.change.temperature)."
        )


class Trainer:
    """Model, optimiser and engine of one process, and the three parts of an update."""

    def __init__(self, run: BranchRun) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self.run, self.settings = run, run.settings
        self.accelerator = Accelerator(
            cpu=run.device == "cpu",
            mixed_precision="bf16" if run.bfloat16 else "no",
            # Warm-up of the critic leaves all of the policy without a gradient.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=run.settings.critic_warmup_updates > 0)
            ],
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        check_batches(run.settings, run.episodes, self.world)
        together = run.settings.micro_batch * self.world
        self.accelerator.gradient_accumulation_steps = run.settings.minibatch // together
        self.identity = {
            **run.identity,
            "seed": run.rollout.seed,
            "episodes": run.episodes,
            "updates": run.updates,
            "attempts": run.rollout.attempts,
            "settings": run.settings.model_dump(mode="json"),
        }
        self.actor_critic = make_actor_critic(run.policy, run.settings)
        self.actor_critic.value_head.requires_grad_(run.settings.has_critic)
        self.learner = self._learner()
        self.actor_critic.eval()  # dropout would move the first ratio away from 1
        self.engine = run.make_engine(run.policy, run.tokenizer)
        self.proof: Proof | None = None
        self.dialogue = Dialogue(run.tokenizer)

    def _learner(self) -> Learner:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:  # it usually learns this from a data loader, and there is none
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.settings.micro_batch
            plugin.deepspeed_config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        model, optimizer = self.accelerator.prepare(self.actor_critic, make_optimizer(self.actor_critic, self.settings))
        run = self.run
        return Learner(
            accelerator=self.accelerator,
            model=model,
            optimizer=optimizer,
            actor_critic=self.actor_critic,
            reference=run.reference,
            settings=self.settings,
            updates=run.updates,
            seed=run.rollout.seed,
            label=run.label,
        )

    def update(self, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Play, score and train once.

        Args:
            index: of the update, from 0.

        Returns:
            Row of ``rl_training`` and rows of ``advantages``, whose ``update`` counts from 1.

        Raises:
            UserError: see `train_branch`.
        """
        clock = [time.perf_counter()]
        records = self.play(index)
        clock.append(time.perf_counter())
        episodes = self.score(records)
        clock.append(time.perf_counter())
        facts = self._share(episodes)
        columns = rollout_columns(facts, self.settings.has_critic, self.settings.reward == "task")
        if index == 0:
            check_readable(self.run.label, columns["format_error_rate"], self.settings.least_readable)
        losses = self.learner.train(episodes, index)
        columns |= loss_columns(self._gather([losses]), self.settings.reward == "task", self.settings.has_critic)
        columns["grad_norm_limit"] = self.settings.max_grad_norm
        clock.append(time.perf_counter())
        seconds = dict(zip(("seconds_rollout", "seconds_score", "seconds_train"), np.diff(clock).tolist(), strict=True))
        row = {"update": index + 1, **columns, "learning_rate": self.learner.rates(index)[0], **seconds}
        self._check_step_size(row)
        return row, histogram(advantages_of(facts), index + 1) if self.settings.reward == "task" else []

    def play(self, index: int) -> list[EpisodeRecord]:
        """This process's episodes of update ``index``."""
        self.proof = synchronise(self.engine, self.run.policy, self.run.engine_dtype, self.proof)
        rows = draw_hands(len(self.run.prompts), self.run.episodes, self.run.rollout.seed, index)
        items = [self.run.prompts[row] for row in rows[self.rank :: self.world]]
        compared = self.engine.capabilities.logprobs and not plays_itself(self.engine, self.run.policy)
        sampling = replace(self.run.rollout.sampling, logprobs=compared)
        rollout = replace(self.run.rollout, rank=self.rank, sampling=sampling)
        return collect(self.engine, self.dialogue, self.run.task, items, rollout, index)

    @torch.no_grad()
    def score(self, records: Sequence[EpisodeRecord]) -> list[Scored]:
        """Log-probabilities and values of the model in training, and from them advantages (not yet normalised)."""
        found: dict[int, Scored] = {}
        vocabulary = self.run.policy.get_output_embeddings().weight.shape[0]
        keep = sum(map(tokens_of, records)) * vocabulary * 4 <= KEPT_LOGITS and self.settings.kl_where == "loss"
        order = sorted(range(len(records)), key=lambda place: len(records[place].token_ids))
        for start in range(0, len(order), self.settings.micro_batch):
            places = order[start : start + self.settings.micro_batch]
            chosen = [records[place] for place in places]
            found.update(zip(places, self._score(chosen, keep), strict=True))
        episodes = [found[place] for place in range(len(records))]
        estimate_advantages(episodes, self.settings)
        return episodes

    def _score(self, records: Sequence[EpisodeRecord], keep: bool) -> list[Scored]:
        batch = self._batch(records, bootstrap=True)
        logits = self.run.reference.logits(*batch.inputs()) if self.run.reference else None
        seen: Evaluation = self.learner.model(*batch.inputs(), batch.state_positions, logits)
        penalties = self._penalties(batch, seen, logits, sum(len(record.turns) for record in records))
        tokens = [tokens_of(record) for record in records]
        deviations = torch.split(self._engine_deviation(records, batch, seen), tokens)
        logps, entropies = torch.split(seen.token_logp, tokens), torch.split(seen.entropy, tokens)
        kls = torch.split(seen.kl, tokens) if seen.kl is not None else [None] * len(records)
        kept = torch.split(logits, tokens) if keep and logits is not None else [None] * len(records)
        values = seen.values.double().cpu().numpy()
        episodes, state, turn = [], 0, 0
        for place, record in enumerate(records):
            count = len(record.turns)
            behind = float(values[state + count]) if record.truncated else 0.0
            nothing = np.zeros(count)
            episodes.append(
                Scored(
                    record=record,
                    logp=logps[place],
                    entropy=entropies[place],
                    values=values[state : state + count],
                    bootstrap=behind,
                    kl=kls[place],
                    penalty=penalties[turn : turn + count],
                    reference=kept[place],
                    advantages=nothing,
                    returns=nothing,
                    engine_deviation=float(deviations[place].max()) if tokens[place] else float("nan"),
                )
            )
            state, turn = state + count + int(record.truncated), turn + count
        return episodes

    def _engine_deviation(self, records: Sequence[EpisodeRecord], batch: Batch, seen: Evaluation) -> Tensor:
        """(tokens,) |p(token) by the trainer / p(token) by the engine that sampled it - 1|; NaN where unknown."""
        told = [logp for record in records for turn in record.turns for logp in turn.engine_logp or ()]
        if len(told) != len(seen.token_logp):
            return torch.full_like(seen.token_logp, float("nan"))
        tokens = batch.ids[batch.response_positions[:, 0], batch.response_positions[:, 1]]
        own = token_log_probs(seen.logits * self.settings.temperature, tokens)
        return torch.expm1(own - torch.tensor(told, device=own.device)).abs()

    def _penalties(self, batch: Batch, seen: Evaluation, logits: Tensor | None, turns: int) -> Any:
        """(turns,) float64 taken off the rewards: the sampled KL where it belongs there, else 0."""
        if logits is None or self.settings.kl_where == "loss":
            return np.zeros(turns)
        tokens = batch.ids[batch.response_positions[:, 0], batch.response_positions[:, 1]]
        sampled = kl_penalty(seen.token_logp, token_log_probs(logits, tokens), batch.turn_index, turns)
        return self.settings.kl_coefficient * sampled.double().cpu().numpy()

    def _batch(self, records: Sequence[EpisodeRecord], bootstrap: bool = False) -> Batch:
        return make_batch(records, self.settings.thought_weight, self.accelerator.device, bootstrap)

    def _gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, joined in the order of ranks."""
        from accelerate.utils import gather_object

        return list(gather_object(mine))

    def _share(self, episodes: Sequence[Scored]) -> list[Facts]:
        """Facts of the episodes of all processes; afterwards advantages are centred and scaled over all of them."""
        facts: list[Facts] = self._gather([facts_of(episode) for episode in episodes])
        if self.settings.advantage == "batch_mean":
            baseline = float(np.mean([value for episode in facts for value in episode.returns]))
            facts = [each._replace(advantages=[value - baseline for value in each.returns]) for each in facts]
            for episode in episodes:
                episode.advantages = episode.returns - baseline
        if self.settings.normalise_advantages:
            every = np.array(advantages_of(facts))
            for episode in episodes:
                episode.advantages = (episode.advantages - every.mean()) / (every.std() + 1e-8)
        return facts

    def _check_step_size(self, row: dict[str, Any]) -> None:
        limit = self.settings.kl_limit
        if limit is not None and row["kl_old"] > limit:
            raise UserError(
                f"update {row['update']} of {self.run.label} moved the policy by a KL of {row['kl_old']:.3g} nats a "
                f"token, above ppo.change.kl_limit of {limit:g}; lower ppo.change.learning_rate or raise the limit "
                "(the last saved state is intact)."
            )
