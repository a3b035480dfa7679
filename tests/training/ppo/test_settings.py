from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlheals.errors import UserError
from rlheals.params import Ppo
from rlheals.profile import preset_names
from rlheals.training.ppo.settings import PAPER, PRESETS, SANE, Arm, PpoSettings, check_batches, settings_of
from tests.common import make_params

ARMS = get_args(Arm)


def block(fidelity: str = "sane", episodes: int = 128, **change: Any) -> Ppo:
    return make_params().ppo.model_copy(update={"fidelity": fidelity, "episodes": episodes, "change": change})


def test_presets_are_what_the_arm_ppo_runs() -> None:
    assert settings_of(block(), "ppo") == SANE
    assert settings_of(block("paper", 512), "ppo") == PAPER


def test_paper_has_the_published_constants() -> None:
    published = {
        "temperature": 0.2,
        "clip": 0.1,
        "value_clip": 0.1,
        "value_coefficient": 0.5,
        "gamma": 0.9,
        "lam": 0.95,
        "epochs": 4,
        "learning_rate": 1e-6,
        "critic_learning_rate": 1e-6,
        "final_learning_rate": 1e-9,
        "schedule": "cosine",
        "adam_epsilon": 1e-7,
        "weight_decay": 0.0,
        "max_grad_norm": 0.01,
        "ratio": "turn",
        "thought_weight": 0.5,
        "kl_coefficient": 0.0,
        "ratio_limit": 10.0,
        "micro_batch": 1,
        "minibatch": 4 * 128,
    }
    assert {key: getattr(PAPER, key) for key in published} == published


def test_sane_log_probabilities_are_those_of_the_sampler() -> None:
    assert (SANE.temperature, SANE.top_p, SANE.top_k) == (1.0, 1.0, 0)


def test_arms_of_params_are_those_of_the_settings() -> None:
    assert get_args(get_args(Ppo.model_fields["arms"].annotation)[0]) == ARMS
    assert set(PRESETS) == set(get_args(Ppo.model_fields["fidelity"].annotation))


@pytest.mark.parametrize("preset", preset_names())
def test_shipped_presets_have_settings_for_each_of_their_arms(preset: str) -> None:
    ppo = make_params(preset=preset).ppo
    for arm in ppo.arms:
        assert settings_of(ppo, arm).minibatch <= ppo.episodes


def changed(arm: str) -> dict[str, Any]:
    before, after = SANE.model_dump(), settings_of(block(), arm).model_dump()
    return {key: after[key] for key in after if after[key] != before[key]}


def test_arms_change_nothing_but_what_makes_them() -> None:
    assert changed("ppo") == changed("grpo") == {}
    assert changed("reward_only") == {"kl_coefficient": 0.0}
    assert changed("kl_only") == {"reward": "none", "value_coefficient": 0.0}
    reinforce = {"advantage": "batch_mean", "clip": None, "epochs": 1, "value_coefficient": 0.0}
    assert changed("reinforce") == reinforce
    assert [arm for arm in ARMS if settings_of(block(), arm).has_critic] == ["ppo", "reward_only", "grpo"]


def test_change_is_laid_over_the_preset_and_under_the_arm() -> None:
    change = {"kl_coefficient": 0.5, "learning_rate": 1, "clip": None, "adam_betas": [0.9, 0.98]}
    settings = settings_of(block(**change), "ppo")
    assert settings == SANE.model_copy(update={**change, "adam_betas": (0.9, 0.98)})
    assert settings_of(block(**change), "reward_only").kl_coefficient == 0.0


def test_a_preset_batch_shrinks_to_a_small_update_but_a_declared_one_does_not() -> None:
    small = settings_of(block(episodes=16), "ppo")
    assert (small.minibatch, small.micro_batch) == (16, 16)
    with pytest.raises(UserError, match=r"ppo\.episodes, 16, does not divide into minibatches of 32"):
        settings_of(block(episodes=16, minibatch=32), "ppo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"learnin_rate": 1e-4},
            r"ppo\.change\.learnin_rate is not a known key; did you mean ppo\.change\.learning_rat",
        ),
        ({"zzz": 1}, r"ppo\.change\.zzz is not a known key; remove it"),
        ({"clip": 0}, r"ppo\.change\.clip: .*greater than 0 \(got 0\)"),
        ({"kl_limit": 0.0}, r"ppo\.change\.kl_limit: .*greater than 0"),
        ({"epochs": 2.0}, r"ppo\.change\.epochs"),
        ({"detach_value": "yes"}, r"ppo\.change\.detach_value"),
        ({"ratio": "word"}, r"ppo\.change\.ratio: .*'turn' or 'token'"),
        ({"temperature": 0}, r"ppo\.change\.temperature"),
        ({"gamma": 1.5}, r"ppo\.change\.gamma"),
        ({"adam_betas": [0.9, 1.0]}, r"ppo\.change\.adam_betas\.1"),
        ({"adam_betas": [0.9]}, r"ppo\.change\.adam_betas"),
        ({"learning_rate": math.nan}, r"ppo\.change\.learning_rate"),
        ({"micro_batch": 48}, r"minibatch, 64, must be a multiple of micro_batch, 48"),
        ({"final_learning_rate": 1.0}, r"final_learning_rate must not exceed learning_rate"),
        ({"ratio_limit": 1.1}, r"ratio_limit must not be below 1 \+ clip, 1\.2"),
        ({"minibatch": 96}, r"ppo\.episodes, 128, does not divide into minibatches of 96"),
    ],
)
def test_bad_change_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings_of(block(**change), "ppo")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")


def test_kl_only_needs_something_to_be_pulled_to() -> None:
    with pytest.raises(UserError, match="kl_only has nothing to learn from: kl_coefficient is 0 "):
        settings_of(block("paper", 512), "kl_only")
    with pytest.raises(UserError, match="kl_reference is start"):
        settings_of(block(kl_reference="start"), "kl_only")
    in_reward = settings_of(block(kl_where="reward"), "kl_only")
    assert in_reward.kl_where == "loss"


def test_batches_must_divide_between_processes() -> None:
    check_batches(SANE, 128, processes=2)
    with pytest.raises(UserError, match="64 episodes does not divide into micro-batches of 32 on 3 processes"):
        check_batches(SANE, 128, processes=3)


def test_settings_cannot_be_changed_or_incomplete() -> None:
    with pytest.raises(ValidationError):
        SANE.clip = 0.3  # type: ignore[misc]
    for name in PpoSettings.model_fields:
        with pytest.raises(ValidationError):
            PpoSettings.model_validate({key: value for key, value in SANE.model_dump().items() if key != name})


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 400))
def test_rates_start_at_the_peak_and_never_rise(schedule: str, updates: int) -> None:
    settings = PAPER.model_copy(update={"schedule": schedule})
    factors = [settings.rate_factor(update, updates) for update in range(updates + 2)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 1e-3)


def test_cosine_is_torchs() -> None:
    import torch

    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=PAPER.learning_rate)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-9)
    for update in range(100):
        ours = PAPER.learning_rate * PAPER.rate_factor(update, 100)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()
