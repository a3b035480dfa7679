"""The constants of an RL branch: two complete presets, and what ``params.yaml`` and the arm change in them."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlheals.errors import UserError
from rlheals.inference.engine import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from rlheals.params import PARAMS_FILE, Beta, Count, Nonnegative, Number, Positive, Probability, Rate, Seed

if TYPE_CHECKING:
    from rlheals.params import Ppo

Arm = Literal["ppo", "reward_only", "kl_only", "reinforce", "grpo"]
Ratio = Literal["turn", "token"]
Above1 = Annotated[Number, Field(gt=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
SampledTemperature = Annotated[Number, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)]


class PpoSettings(BaseModel):
    """Every constant of a branch. Lengths are in updates, batches in episodes, KL and entropy in nats a token."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    temperature: SampledTemperature
    """Of sampling; log-probabilities, entropy and KL are those of the distribution at this temperature."""
    top_p: Share
    top_k: Count
    """0 is off. Neither cut is part of the log-probabilities, so a fair ratio needs both off."""
    clip: Rate | None
    """Half-width of the interval around 1 the ratio is clipped to; None is off."""
    value_clip: Rate | None
    """Farthest a value may move from the old one before the loss counts the clipped error; None is off."""
    value_coefficient: Nonnegative
    entropy_coefficient: Nonnegative
    gamma: Probability
    """Discount between turns."""
    lam: Probability
    """GAE's lambda."""
    advantage: Literal["gae", "batch_mean"]
    """``batch_mean`` has no critic: discounted return minus the mean of the update's returns."""
    epochs: Positive
    """Passes over the episodes of an update."""
    micro_batch: Positive
    """Episodes of a forward pass of one process; changes memory and speed only."""
    minibatch: Positive
    """Episodes of an optimiser step, over all processes."""
    learning_rate: Rate
    final_learning_rate: Nonnegative
    """Where ``linear`` and ``cosine`` would arrive after the last update; unused by ``constant``."""
    schedule: Literal["constant", "linear", "cosine"]
    critic_learning_rate: Rate
    """Of the value head; follows the schedule in proportion."""
    critic_warmup_updates: Count
    """First updates in which the policy stands still and only the critic learns. They count in every arm, so that all
    arms of a start move the policy in the same updates."""
    adam_betas: tuple[Beta, Beta]
    adam_epsilon: Rate
    weight_decay: Nonnegative
    max_grad_norm: Nonnegative
    """0 is off."""
    ratio: Ratio
    """``turn``: of the probabilities of whole responses, a product over tokens; ``token``: of each token by itself."""
    thought_weight: Nonnegative
    """Weight of the log-probabilities of the tokens before the answer field; the rest weigh 1."""
    detach_value: bool
    """Whether the value loss leaves the shared backbone alone."""
    kl_reference: Literal["base", "start"]
    """Model the policy is pulled to: the base, or the rung the branch starts from."""
    kl_where: Literal["loss", "reward"]
    """``loss``: exact KL(policy || reference) over the vocabulary; ``reward``: its sampled estimate, in each turn."""
    kl_coefficient: Nonnegative
    """Price of a nat of KL, of a response's (summed over its tokens) with the ratio ``turn``, of a token's with
    ``token``. With ``kl_where: reward`` it is paid in reward. With ``loss`` it is weighed against the policy term,
    whose advantages are normalised unless ``normalise_advantages`` is off, so it is in standard deviations of the
    update's advantages: the same number pulls harder, in reward, where rewards vary more. 0 loads no reference."""
    kl_limit: Rate | None
    """Mean KL(old || new) of one update that ends the run as failed; None is off."""
    ratio_limit: Above1 | None
    """A ratio above it counts by its clipped term alone, whatever the sign of the advantage; None is off."""
    reward: Literal["task", "none"]
    """``none``: the policy, value and advantage terms are off, and only the KL term moves the policy."""
    normalise_advantages: bool
    """Mean 0 and standard deviation 1 over all turns of an update, of all processes."""
    least_readable: Probability
    """Smallest share of readable answers in the first update; below it the reward grades nothing but the format."""
    critic_seed: Seed
    """Of the critic's first weights; the same in every branch."""

    @field_validator("adam_betas", mode="before")
    @classmethod
    def _yaml_has_no_tuples(cls, betas: Any) -> Any:
        return tuple(betas) if isinstance(betas, list) else betas

    @model_validator(mode="after")
    def _fits_together(self) -> PpoSettings:
        if self.minibatch % self.micro_batch:
            raise ValueError(f"minibatch, {self.minibatch}, must be a multiple of micro_batch, {self.micro_batch}")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(f"final_learning_rate must not exceed learning_rate, {self.learning_rate:g}")
        if self.ratio_limit is not None and self.clip is not None and self.ratio_limit < 1 + self.clip:
            raise ValueError(f"ratio_limit must not be below 1 + clip, {1 + self.clip:g}")
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the arm learns values."""
        return self.advantage == "gae" and self.reward == "task"

    def rate_factor(self, update: int, updates: int) -> float:
        """Factor of both learning rates in the update with 0-based index ``update`` of ``updates``.

        A pure function of the index: no scheduler has state to save, or is stepped once a process, which let the
        authors' cosine arrive four times too early and rise again on four GPUs.
        """
        if self.schedule == "constant":
            return 1.0
        done = min(update / updates, 1.0)
        shape = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        floor = self.final_learning_rate / self.learning_rate
        return floor + (1 - floor) * shape


SANE = PpoSettings(
    temperature=1.0,  # with both cuts off: the log-probabilities are those of the sampling distribution
    top_p=1.0,
    top_k=0,
    clip=0.2,  # Schulman et al. 2017, table 3
    value_clip=None,  # no gain from it in Andrychowicz et al. 2021
    value_coefficient=0.1,  # the backbone is shared, and the first critic knows nothing
    entropy_coefficient=0.0,
    gamma=1.0,  # a later success is worth as much; episodes are a few turns
    lam=0.95,  # Schulman et al. 2017
    advantage="gae",
    epochs=2,
    micro_batch=32,
    minibatch=64,
    learning_rate=2e-4,  # for a million parameters; a real model wants 1e-6
    final_learning_rate=0.0,
    schedule="constant",
    critic_learning_rate=1e-3,
    critic_warmup_updates=2,  # a random critic's gradients damage the policy in the first updates
    adam_betas=(0.9, 0.999),
    adam_epsilon=1e-8,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ratio="turn",
    thought_weight=1.0,
    detach_value=False,
    kl_reference="base",
    kl_where="loss",
    kl_coefficient=0.1,
    kl_limit=1.0,  # healthy updates stay far below 0.1
    ratio_limit=None,
    reward="task",
    normalise_advantages=True,
    least_readable=0.005,
    critic_seed=0,
)
"""What the literature and trials on small models advise."""

# "Code" is github.com/xiaodanguoguo/RL_Heals_SFT at 4b263ff (arXiv 2508.16546, 2509.12235); where its configuration and
# what it does differ, both are named.
PAPER = PpoSettings(
    temperature=0.2,  # code: rollouts
    top_p=0.9,  # generation_config of Llama-3.2-Instruct; Qwen2.5-Instruct has 0.8. Not in the log-probabilities.
    top_k=50,  # default of the transformers release the authors used; Qwen2.5-Instruct has 20
    clip=0.1,  # code: clip_param
    value_clip=0.1,  # code: the clip of the policy serves the values, too
    value_coefficient=0.5,  # code: value_loss_coef
    entropy_coefficient=0.0,  # configured as 0.01, but the code never adds it to the loss
    gamma=0.9,  # code
    lam=0.95,  # code
    advantage="gae",
    epochs=4,  # code: ppo_epoch
    micro_batch=1,  # code: mini_batch_size
    minibatch=512,  # code: grad_accum_steps 128 on 4 processes, one optimiser step an epoch; turns there, episodes here
    learning_rate=1e-6,  # code: init_lr
    final_learning_rate=1e-9,  # code: end_lr
    schedule="cosine",  # code: over lr_max_steps updates, here over the updates of the run
    critic_learning_rate=1e-6,  # one optimiser for policy and critic
    critic_warmup_updates=0,
    adam_betas=(0.9, 0.999),  # torch's defaults
    adam_epsilon=1e-7,  # code: opt_eps
    weight_decay=0.0,  # code
    max_grad_norm=0.01,  # code; under the authors' DeepSpeed the configured clipping, 1.0, acted instead
    ratio="turn",  # code
    thought_weight=0.5,  # code: thought_prob_coef
    detach_value=False,  # code: shared backbone
    kl_reference="base",
    kl_where="loss",
    kl_coefficient=0.0,  # code: no reference model
    kl_limit=None,
    ratio_limit=10.0,  # code
    reward="task",
    normalise_advantages=True,  # code: over one process's turns; here over all
    least_readable=0.0,  # code: no such check
    critic_seed=0,
)
"""The published constants. What differs from the authors' code on purpose: turns of one episode never bootstrap from
the next episode, log-probabilities are float32 sums over all response tokens, and non-finite numbers end the run."""

PRESETS = {"sane": SANE, "paper": PAPER}


def settings_of(block: Ppo, arm: str) -> PpoSettings:
    """The constants of one arm: preset of ``fidelity``, then ``change``, then what makes the arm.

    A preset's batch larger than the update's episodes is the whole update.

    Raises:
        UserError: an unknown key (the nearest is named) or a wrong value in ``ppo.change``, episodes that do not divide
            into minibatches, or ``kl_only`` with nothing to be pulled to.
    """
    preset = PRESETS[block.fidelity].model_dump()
    minibatch = min(preset["minibatch"], block.episodes)
    preset |= {"minibatch": minibatch, "micro_batch": min(preset["micro_batch"], minibatch)}
    settings = _validated({**preset, **block.change})
    check_batches(settings, block.episodes)
    if arm == "kl_only" and (not settings.kl_coefficient or settings.kl_reference == "start"):
        raise UserError(
            f"{PARAMS_FILE}: the arm kl_only has nothing to learn from: kl_coefficient is {settings.kl_coefficient:g} "
            f"and kl_reference is {settings.kl_reference}; give a coefficient above 0 and the reference base in "
            "ppo.change, or drop the arm."
        )
    return _validated({**settings.model_dump(), **_arm_changes(arm)})


def check_batches(settings: PpoSettings, episodes: int, processes: int = 1) -> None:
    """Check that every process makes the same number of full forward passes and optimiser steps in an update.

    Raises:
        UserError: ``episodes`` is no multiple of the minibatch, or that none of micro-batch times processes.
    """
    if episodes % settings.minibatch:
        raise UserError(
            f"{PARAMS_FILE}: ppo.episodes, {episodes}, does not divide into minibatches of {settings.minibatch}; "
            "change it or ppo.change.minibatch."
        )
    together = settings.micro_batch * processes
    if settings.minibatch % together:
        raise UserError(
            f"{PARAMS_FILE}: a minibatch of {settings.minibatch} episodes does not divide into micro-batches of "
            f"{settings.micro_batch} on {processes} processes; change ppo.change.minibatch, ppo.change.micro_batch or "
            "the number of processes."
        )


def _arm_changes(arm: str) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "ppo": {},
        "grpo": {},
        "reward_only": {"kl_coefficient": 0.0},
        "kl_only": {"reward": "none", "kl_where": "loss", "value_coefficient": 0.0, "entropy_coefficient": 0.0},
        "reinforce": {"advantage": "batch_mean", "clip": None, "ratio_limit": None, "epochs": 1}
        | {"value_coefficient": 0.0},
    }
    return changes[arm]


def _validated(values: dict[str, Any]) -> PpoSettings:
    """`PpoSettings` of ``values``, or one sentence about the first that is wrong."""
    try:
        return PpoSettings.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    key = ".".join(map(str, ("ppo", "change", *first["loc"])))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), PpoSettings.model_fields, n=1)
        hint = f"did you mean ppo.change.{near[0]}?" if near else "remove it."
        raise UserError(f"{PARAMS_FILE}: {key} is not a known key; {hint}")
    got = f" (got {first['input']!r})" if len(str(first["input"])) < 80 else ""
    raise UserError(f"{PARAMS_FILE}: {key}: {first['msg'].removeprefix('Value error, ')}{got}.")
