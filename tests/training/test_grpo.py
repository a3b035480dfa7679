from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.publish import verify
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.stages.common import OFFLINE
from rlheals.tasks.core import Turn
from rlheals.training.grpo import GROUP, Branch, Rollouts, make_trainer, sequences, train_grpo
from rlheals.training.ppo.reference import Reference
from rlheals.training.ppo.rollout import EpisodeRecord, RolloutSettings, TurnSpan, draw_hands
from rlheals.training.ppo.settings import SANE, PpoSettings
from rlheals.training.ppo.state import STATES, Curves
from rlheals.training.ppo.trainer import UPDATES, BranchRun
from tests.common import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EPISODES = 16
SECONDS = {"seconds_rollout", "seconds_train"}
BRANCH = {"profile": "mini", "model": "tiny", "seed": 0, "checkpoint_step": 40, "arm": "grpo"}


class BelowEpisode:
    """Say a number below 50; two attempts."""

    limit_reward = 0.0

    def __init__(self, item: str, attempts: int) -> None:
        self.prompt, self.left = f"sum of {item}", attempts

    def step(self, response: str) -> Turn:
        self.left -= 1
        readable = response.strip().isdigit()
        solved = readable and int(response) < 50
        done = solved or not self.left
        reward = 1.0 if solved else -1.0 if readable else -2.0
        return Turn(
            "solved" if solved else "no", reward, solved, False, not readable, None, done, None if done else "is"
        )


class BelowTask:
    name = "below"
    spec = type("Spec", (), {"feedback": "neutral"})()

    def __init__(self) -> None:
        self.played: list[str] = []

    def episode(self, item: str, prompt_format: str, attempts: int, feedback: str) -> BelowEpisode:
        self.played.append(item)
        return BelowEpisode(item, attempts)


@pytest.fixture(scope="module", autouse=True)
def _stage_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A start and another model as base."""
    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "start", "words", 1), make_folder(root / "base", "words", 2)


def make_run(folders: tuple[Path, Path], scratch: Path, updates: int = 4, **changes: Any) -> BranchRun:
    start, base = folders
    small = {"micro_batch": 4, "minibatch": 8, "epochs": 2, "critic_warmup_updates": 1, "learning_rate": 3e-3}
    settings = PpoSettings.model_validate({**SANE.model_dump(), **small, **changes})
    return BranchRun(
        policy=load_model(start),
        reference=Reference(load_model(base)) if settings.kl_coefficient else None,
        tokenizer=load_tokenizer(start),
        make_engine=lambda model, tokenizer: TransformersEngine(model, tokenizer, 64),
        task=BelowTask(),
        prompts=[(f"hand {n}", str(n)) for n in range(37)],
        settings=settings,
        updates=updates,
        episodes=EPISODES,
        checkpoints=[1, 3, updates],
        state_every=2,
        rollout=RolloutSettings("words", 2, Sampling(1, temperature=settings.temperature), 64, seed=5),
        scratch=scratch,
        identity={"parent": "1", "settings": settings.model_dump(mode="json")},
    )


def without_seconds(curves: Curves) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in curves.training], curves.advantages


def tree(scratch: Path) -> dict[str, bytes]:
    root = scratch / UPDATES
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[BranchRun, Curves]:
    run = make_run(folders, tmp_path_factory.mktemp("grpo"))
    return run, train_grpo(run)


def test_checkpoints_load_and_the_policy_stands_still_in_warm_up(finished, folders) -> None:
    run, _ = finished
    start = load_file(folders[0] / "model.safetensors")
    moved = {}
    for update in run.checkpoints:
        folder = run.scratch / UPDATES / f"update-{update}"
        load_model(folder)
        assert load_tokenizer(folder).chat_template == run.tokenizer.chat_template
        state = load_file(folder / "model.safetensors")
        moved[update] = any(not torch.equal(state[name], start[name]) for name in start)
    assert moved == {1: False, 3: True, 4: True}


def test_rows_are_those_of_the_ppo_trainer(finished) -> None:
    run, curves = finished
    rows = pl.DataFrame([{**BRANCH, **row} for row in curves.training], schema=SCHEMAS["rl_training"])
    check(rows, "rl_training")
    assert rows["update"].to_list() == [1, 2, 3, 4]
    assert set(rows["episodes"]) == {EPISODES}
    assert rows["learning_rate"].to_list() == [0.0, 3e-3, 3e-3, 3e-3]
    absent = {"kl_old", "value_loss", "explained_variance", "policy_loss", "ratio_max_deviation_first", "seconds_score"}
    absent |= {"engine_ratio_deviation", "grad_norm_low", "grad_norm_high"}  # TRL tells one norm an update
    assert {name for name in rows.columns if rows[name].null_count()} == absent
    assert (rows["kl_reference"] > 0).all()
    assert rows["advantage_mean"].abs().max() < 1e-12
    assert rows["grad_norm_limit"].unique().to_list() == [run.settings.max_grad_norm]
    flat = rows["flat_groups"] * EPISODES / GROUP
    assert flat.to_list() == [pytest.approx(round(each)) for each in flat]
    assert rows["flat_groups"].is_between(0, 1).all()
    histograms = pl.DataFrame([{**BRANCH, **row} for row in curves.advantages], schema=SCHEMAS["advantages"])
    assert histograms.group_by("update").agg(pl.col("count").sum())["count"].to_list() == [EPISODES] * 4


def test_hands_are_the_first_of_each_update_in_groups(finished) -> None:
    run, _ = finished
    expected = [
        run.prompts[row][1]
        for update in range(run.updates)
        for row in draw_hands(len(run.prompts), EPISODES, 5, update)[: EPISODES // GROUP]
        for _ in range(GROUP)
    ]
    assert run.task.played == expected


def test_the_reward_rises(folders, tmp_path: Path) -> None:
    run = make_run(folders, tmp_path, updates=16, learning_rate=1e-2, kl_coefficient=0.0)
    rewards = [row["reward_mean"] for row in train_grpo(run).training]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3


class Stop(BaseException):
    """Stands in for a kill: nothing in the trainer catches it."""


@pytest.mark.parametrize("at", [3, 9, 14])
def test_resume_is_exact_to_the_byte(finished, folders, tmp_path: Path, monkeypatch, at: int) -> None:
    """4 steps an update, states after steps 8 and 16: stopped before, just behind, and long after the first state."""
    whole, curves = finished
    original = Branch.on_step_end

    def stop(self: Branch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise Stop

    monkeypatch.setattr(Branch, "on_step_end", stop)
    with pytest.raises(Stop):
        train_grpo(make_run(folders, tmp_path))
    monkeypatch.undo()
    again = make_run(folders, tmp_path)
    assert without_seconds(train_grpo(again)) == without_seconds(curves)
    assert tree(tmp_path) == tree(whole.scratch)
    assert len(again.task.played) == EPISODES * (4 if at < 8 else 2)
    verify(tmp_path / STATES / "checkpoint-16")
    assert without_seconds(train_grpo(make_run(folders, tmp_path))) == without_seconds(curves)


def test_a_state_of_another_run_is_refused(finished, folders, tmp_path: Path) -> None:
    run = make_run(folders, tmp_path, updates=2)
    train_grpo(replace(run, checkpoints=[2]))
    with pytest.raises(UserError, match="belongs to a run with another parent or other settings"):
        train_grpo(replace(make_run(folders, tmp_path), identity={"parent": "2"}))


def test_the_reference_is_the_base_and_the_policy_keeps_its_name(folders, tmp_path: Path) -> None:
    run = make_run(folders, tmp_path)
    trainer = make_trainer(run, Rollouts(run))
    base = load_file(folders[1] / "model.safetensors")
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, base[name])
    assert run.policy.config._name_or_path == str(folders[0])
    free = make_run(folders, tmp_path / "free", kl_coefficient=0.0)
    assert make_trainer(free, Rollouts(free)).ref_model is None


def record(truncated: bool = False) -> EpisodeRecord:
    """Prompt of 3, a response of 2 with its end token, feedback of 2, a cut response of 1 and an end token."""
    turns = [
        TurnSpan(2, 3, 3, 6, -1.0, False, False, "no"),
        TurnSpan(7, 8, 8, 9, 1.0, True, False, "solved"),
    ]
    return EpisodeRecord("hand", [1, 2, 3, 10, 11, 0, 4, 5, 12, 0], turns, truncated)


def test_sequences_mask_feedback_and_forced_ends() -> None:
    columns = sequences([record()])
    assert columns["prompt_ids"] == [[1, 2, 3]]
    assert columns["completion_ids"] == [[10, 11, 0, 4, 5, 12]]
    assert columns["env_mask"] == [[1, 1, 1, 0, 0, 1]]


def test_one_step_equals_a_bare_torch_oracle(folders, tmp_path: Path, monkeypatch) -> None:
    """One on-policy step: group-normalised returns and the KL estimate k3, averaged over tokens, then over episodes."""
    one = {"micro_batch": 4, "minibatch": EPISODES, "epochs": 1, "critic_warmup_updates": 0, "max_grad_norm": 1e9}
    kept: list[dict[str, Any]] = []
    original = Rollouts.__call__

    def keep(self: Rollouts, prompts: list[str], trainer: Any) -> dict[str, Any]:
        kept.append(original(self, prompts, trainer))
        return kept[-1]

    monkeypatch.setattr(Rollouts, "__call__", keep)
    run = replace(make_run(folders, tmp_path, updates=1, **one), checkpoints=[1])
    train_grpo(run)
    rollout = kept[0]
    policy, base = load_model(folders[0]).train(), load_model(folders[1])
    returns = torch.tensor(rollout["episode_return"]).view(-1, GROUP)
    advantages = ((returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)).flatten()
    loss = torch.zeros(())
    for place in range(EPISODES):
        prompt, completion = rollout["prompt_ids"][place], rollout["completion_ids"][place]
        mask = torch.tensor(rollout["env_mask"][place]).float()
        ids = torch.tensor([prompt + completion])
        logp, reference = (
            torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1).gather(
                -1, torch.tensor(completion)[:, None]
            )[:, 0]
            for model in (policy, base)
        )
        gap = reference.detach() - logp
        ratio = (logp - logp.detach()).exp()
        token = ratio * (0.1 * (gap.exp() - gap - 1) - advantages[place])
        loss = loss + (token * mask).sum() / mask.sum() / EPISODES
    loss.backward()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    trained = load_file(tmp_path / UPDATES / "update-1" / "model.safetensors")
    # Adam's first step has the size of the rate whatever the gradient's, so only its sign is compared where it is tiny.
    for name, parameter in policy.named_parameters():
        clear = parameter.grad.abs() > 1e-5
        assert clear.any()
        torch.testing.assert_close(trained[name][clear], parameter.detach()[clear], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 20}, "ppo.episodes is 20, which does not divide into the groups of 8"),
    ],
)
def test_bad_settings_are_told(folders, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_grpo(replace(make_run(folders, tmp_path), **changes))
    assert not (tmp_path / STATES).exists()


def test_several_processes_are_refused(folders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="grpo runs in one process"):
        train_grpo(make_run(folders, tmp_path))


def test_a_start_without_the_format_is_refused(folders, tmp_path: Path) -> None:
    run = make_run(folders, tmp_path)
    run.task.episode = lambda *_: type("Mute", (BelowEpisode,), {"step": mute})("1", 1)
    with pytest.raises(UserError, match="below the format threshold"):
        train_grpo(run)


def mute(self: Any, response: str) -> Turn:
    return Turn("format", -3.0, False, False, True, None, True, None)


def test_a_loss_that_is_not_finite_is_an_error(folders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GRPO loss is nan in update \d; lower ppo.change.learning_rate"):
        train_grpo(make_run(folders, tmp_path, learning_rate=1e30, max_grad_norm=0.0))


def test_curves_survive_json(finished) -> None:
    _, curves = finished
    assert Curves(**json.loads(json.dumps(vars(curves)))) == curves
