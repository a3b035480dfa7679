from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.training.ppo.gae import gae
from rlheals.training.ppo.metrics import advantages_of
from rlheals.training.ppo.reference import Reference
from rlheals.training.ppo.settings import settings_of
from rlheals.training.ppo.state import STATES
from rlheals.training.ppo.trainer import UPDATES, Trainer, train_branch
from tests.common import make_model, make_params, make_tokenizer
from tests.training.ppo.branches import CONTEXT, digest, toy_branch, toy_rollout, toy_settings, tree

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def weights(run: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in run.policy.state_dict().values()])


def other_reference(settings: Any) -> Reference:
    tokenizer = make_tokenizer("words")
    model = make_model("words", tokenizer, seed=8, max_position_embeddings=CONTEXT, initializer_range=0.1)
    return Reference(model, settings.temperature)


def test_the_policy_learns_what_is_rewarded(tmp_path: Path) -> None:
    run = toy_branch(tmp_path, toy_settings(kl_coefficient=0.0), updates=10, episodes=32, checkpoints=[10])
    rates = [row["solved_rate"] for row in train_branch(run).training]
    assert rates[0] < 0.8
    assert np.mean(rates[-3:]) > rates[0] + 0.15


def test_checkpoints_load_by_themselves(tmp_path: Path) -> None:
    run = toy_branch(tmp_path, updates=2, checkpoints=[1, 2])
    train_branch(run)
    folders = [tmp_path / UPDATES / f"update-{update}" for update in (1, 2)]
    assert digest(load_model(folders[1])) == digest(run.policy)
    assert digest(load_model(folders[0])) != digest(run.policy)
    assert load_tokenizer(folders[0]).chat_template == run.tokenizer.chat_template


class Apart(TransformersEngine):
    """Plays with a copy of the policy, and is deaf to the swaps after the first ``hears``."""

    def __init__(self, policy: Any, tokenizer: Any, hears: int) -> None:
        super().__init__(deepcopy(policy), tokenizer, batch_size=8)
        self.hears, self.closed = hears, False

    def swap(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.hears -= 1
        if self.hears >= 0:
            super().swap(state_dict)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("hears", [3, 2])
def test_an_update_that_does_not_reach_the_engine_ends_the_branch(hears: int, tmp_path: Path) -> None:
    """At this rate an update is less than what rounding explains, so only a comparison with the last one shows it."""
    settings = toy_settings(critic_warmup_updates=0, learning_rate=2e-7, critic_learning_rate=1e-6)
    made: list[Apart] = []

    def engine(policy: Any, tokenizer: Any) -> Apart:
        made.append(Apart(policy, tokenizer, hears))
        return made[0]

    run = toy_branch(tmp_path, settings, updates=3, checkpoints=[3], make_engine=engine)
    if hears == 3:
        assert len(train_branch(run).training) == 3
    else:
        with pytest.raises(UserError, match="still answers as before"):
            train_branch(run)
    assert made[0].closed


def test_the_first_ratio_is_one_and_the_start_is_its_own_reference(tmp_path: Path) -> None:
    rows = train_branch(toy_branch(tmp_path, toy_settings(critic_warmup_updates=0), updates=3)).training
    assert max(row["ratio_max_deviation_first"] for row in rows) < 1e-4
    assert rows[0]["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl_reference"] > 1e-4
    assert rows[0]["kl_old"] > 0


@pytest.mark.parametrize("arm", ["ppo", "reward_only", "kl_only", "reinforce"])
def test_warm_up_leaves_the_policy_alone_in_every_arm(arm: str, tmp_path: Path) -> None:
    change = {"micro_batch": 4, "minibatch": 8, "critic_warmup_updates": 1}
    block = make_params().ppo.model_copy(update={"change": change, "episodes": 16})
    settings = settings_of(block, arm)
    run = toy_branch(tmp_path, settings, updates=2)
    trainer = Trainer(run)
    before = digest(run.policy)
    head = digest(trainer.actor_critic.value_head)
    row, _ = trainer.update(0)
    assert digest(run.policy) == before
    assert (digest(trainer.actor_critic.value_head) != head) == settings.has_critic
    assert (row["learning_rate"], row["kl_old"]) == (0.0, 0.0)
    row, _ = trainer.update(1)
    assert digest(run.policy) != before
    assert row["learning_rate"] > 0


def test_a_step_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    ends = []
    for micro in (1, 2, 8):
        settings = toy_settings(micro_batch=micro, critic_warmup_updates=0, learning_rate=1e-3, entropy_coefficient=0.1)
        run = toy_branch(tmp_path / str(micro), settings, updates=1)
        start = weights(run).clone()
        row, _ = Trainer(run).update(0)
        ends.append((weights(run) - start, row["policy_loss"], row["value_loss"], row["grad_norm"]))
    for moved, *numbers in ends[1:]:
        # Adam divides by the size of the gradient, so rounding shows where gradients are near zero only.
        assert torch.nn.functional.cosine_similarity(moved, ends[0][0], dim=0) > 0.999
        assert numbers == pytest.approx(ends[0][1:], rel=1e-3, abs=1e-5)


def test_advantages_are_those_of_single_episodes_and_normalised_over_all(tmp_path: Path) -> None:
    settings = toy_settings(gamma=0.9, lam=0.7)
    trainer = Trainer(toy_branch(tmp_path, settings))
    episodes = trainer.score(trainer.play(0))
    assert any(len(episode.record.turns) == 2 for episode in episodes)
    for episode in episodes:
        rewards = [turn.reward for turn in episode.record.turns]
        expected, _ = gae(rewards, episode.values, 0.9, 0.7)
        assert episode.advantages == pytest.approx(expected)
    facts = trainer._share(episodes)
    joined = np.concatenate([episode.advantages for episode in episodes])
    assert joined.mean() == pytest.approx(0, abs=1e-9)
    assert joined.std() == pytest.approx(1, abs=1e-6)
    assert np.std(advantages_of(facts)) != pytest.approx(1, abs=1e-3)


def test_a_truncated_episode_bootstraps_from_the_prompt_it_could_not_answer(tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=3, temperature=1.0)
    run = toy_branch(tmp_path, rollout=toy_rollout(sampling=sampling, context=14))
    trainer = Trainer(run)
    episodes = trainer.score(trainer.play(0))
    cut = [episode for episode in episodes if episode.record.truncated]
    assert cut
    assert len(cut) < len(episodes)
    for episode in cut:
        ids = torch.tensor([episode.record.token_ids])
        with torch.no_grad():
            hidden = run.policy.base_model(input_ids=ids).last_hidden_state[0, -1]
            value = float(trainer.actor_critic.value_head(hidden))
        assert episode.bootstrap == pytest.approx(value, abs=1e-5)
        assert episode.returns[-1] == pytest.approx(episode.record.turns[-1].reward + value, abs=1e-5)
    assert all(episode.bootstrap == 0 for episode in episodes if not episode.record.truncated)


def test_reference_logits_are_the_same_kept_or_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_settings(critic_warmup_updates=0)
    runs = [toy_branch(tmp_path / name, settings, reference=other_reference(settings)) for name in "ab"]
    Trainer(runs[0]).update(0)
    monkeypatch.setattr("rlheals.training.ppo.trainer.KEPT_LOGITS", 0)
    Trainer(runs[1]).update(0)
    assert torch.allclose(weights(runs[0]), weights(runs[1]), atol=1e-4)


def test_without_reward_the_policy_only_nears_the_reference(tmp_path: Path) -> None:
    settings = toy_settings(reward="none", value_coefficient=0.0, kl_coefficient=1.0, critic_warmup_updates=0)
    run = toy_branch(tmp_path, settings, reference=other_reference(settings), updates=6, checkpoints=[6])
    curves = train_branch(run)
    kl = [row["kl_reference"] for row in curves.training]
    assert kl[-1] < 0.7 * kl[0]
    assert curves.advantages == []
    assert {row["policy_loss"] for row in curves.training} == {None}
    assert {row["advantage_mean"] for row in curves.training} == {None}


def test_a_penalty_in_the_reward_pulls_to_the_reference_too(tmp_path: Path) -> None:
    settings = toy_settings(kl_where="reward", kl_coefficient=0.5)
    trainer = Trainer(toy_branch(tmp_path, settings, reference=other_reference(settings)))
    episodes = trainer.score(trainer.play(0))
    assert any(abs(float(episode.penalty.sum())) > 0.01 for episode in episodes)
    first = episodes[0]
    with torch.no_grad():
        ids = torch.tensor([first.record.token_ids])
        both = [
            torch.log_softmax(m(input_ids=ids).logits[0].float(), -1)
            for m in (trainer.run.policy, trainer.run.reference.model)
        ]
    turn = first.record.turns[0]
    columns = torch.arange(turn.start, turn.stop)
    policy, reference = (logp[columns - 1, ids[0, columns]].sum() for logp in both)
    assert first.penalty[0] == pytest.approx(0.5 * float(policy - reference), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({"episodes": 20}, {}, "does not divide into minibatches of 8"),
        (
            {},
            {"kl_limit": 1e-9},
            "moved the policy by a KL of .* above ppo.change.kl_limit",
        ),
        (
            {},
            {"learning_rate": 1e30, "max_grad_norm": 0.0},
            "lower ppo.change.learning_rate",
        ),
    ],
)
def test_bad_runs_end_with_one_sentence(
    changes: dict[str, Any], settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        train_branch(toy_branch(tmp_path, toy_settings(critic_warmup_updates=0, **settings), **changes))


class Mute:
    """Every answer is empty."""

    def __init__(self, task: Any) -> None:
        self.task, self.spec = task, task.spec

    def episode(self, *arguments: Any) -> Any:
        episode = self.task.episode(*arguments)
        step = episode.step
        episode.step = lambda response: step("")
        return episode


def test_a_start_that_cannot_write_the_format_is_refused(tmp_path: Path) -> None:
    run = toy_branch(tmp_path)
    with pytest.raises(UserError, match=r"0\.0 % readable answers, below the format threshold of"):
        train_branch(replace(run, task=Mute(run.task)))
    assert tree(tmp_path) == {}


def test_an_update_too_large_leaves_the_last_state(tmp_path: Path) -> None:
    run = toy_branch(tmp_path, toy_settings(kl_limit=1e-9, critic_warmup_updates=2))
    with pytest.raises(UserError, match="update 3 of ppo moved the policy"):
        train_branch(run)
    assert [state.name for state in (tmp_path / STATES).iterdir()] == ["state-2"]
