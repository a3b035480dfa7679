from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model
from rlheals.training.ppo.actor_critic import ActorCritic, make_actor_critic, make_value_head
from rlheals.training.ppo.losses import full_kl
from rlheals.training.ppo.reference import Reference, load_reference
from rlheals.training.ppo.settings import SANE
from tests.common import make_folder, make_model, make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in ("llama", "qwen2")}
# Both families with a head of their own and with one tied to the embeddings.
KINDS = [(family, tied) for family in TOKENIZERS for tied in (False, True)]
LENGTHS = (9, 14, 11)
RESPONSES = [(0, 4, 9), (1, 3, 6), (1, 9, 14), (2, 5, 11)]
"""Row, first column and column behind the last of each response; row 1 has two turns."""


class Batch(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor
    states: torch.Tensor


def model_of(family: str, tied: bool, seed: int = 0) -> Any:
    return make_model(family, TOKENIZERS[family], seed, tie_word_embeddings=tied)


def make_batch(vocabulary: int = 300, left: bool = False) -> Batch:
    width = max(LENGTHS)
    draw = torch.Generator().manual_seed(5)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        places = slice(width - length, width) if left else slice(0, length)
        ids[row, places] = torch.randint(1, vocabulary, (length,), generator=draw)
        mask[row, places] = 1
    shift = [width - length if left else 0 for length in LENGTHS]
    tokens = [[row, place + shift[row]] for row, start, stop in RESPONSES for place in range(start, stop)]
    states = [[row, start - 1 + shift[row]] for row, start, _ in RESPONSES]
    return Batch(ids, mask, torch.tensor(tokens), torch.tensor(states))


def evaluate(actor: ActorCritic, batch: Batch, **more: Any) -> Any:
    return actor.evaluate(batch.ids, batch.mask, batch.tokens, batch.states, **more)


@pytest.mark.parametrize(("family", "tied"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_equals_the_full_forward_pass(family: str, tied: bool, temperature: float) -> None:
    model, batch = model_of(family, tied), make_batch()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    actor = ActorCritic(model, make_value_head(64, 0), temperature)
    with torch.no_grad():
        full = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        found = evaluate(actor, batch)
        expected = torch.stack([full.logits[row, column - 1] for row, column in batch.tokens.tolist()]) / temperature
        states = torch.stack([full.hidden_states[-1][row, column] for row, column in batch.states.tolist()])
        values = actor.value_head(states)[:, 0]
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-6)
    # Log-probabilities and entropies in NumPy, one position at a time.
    for place, (row, column) in enumerate(batch.tokens.tolist()):
        scores = expected[place].double().numpy()
        log_probs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        token = int(batch.ids[row, column])
        assert found.token_logp[place].item() == pytest.approx(log_probs[token], rel=1e-4, abs=1e-4)
        assert found.entropy[place].item() == pytest.approx(-(np.exp(log_probs) * log_probs).sum(), rel=1e-3, abs=1e-4)
    assert found.kl is None


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_padding_and_company_do_not_matter(family: str, tied: bool) -> None:
    actor = ActorCritic(model_of(family, tied), make_value_head(64, 0))
    with torch.no_grad():
        right, left = evaluate(actor, make_batch()), evaluate(actor, make_batch(left=True))
        batch = make_batch()
        alone = [
            actor.evaluate(
                batch.ids[[row], :length],
                batch.mask[[row], :length],
                torch.tensor([[0, place] for each, place in batch.tokens.tolist() if each == row]),
                torch.tensor([[0, place] for each, place in batch.states.tolist() if each == row]),
            )
            for row, length in enumerate(LENGTHS)
        ]
    for name in ("token_logp", "entropy", "values"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=1e-4, atol=1e-4)
        together = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(together, getattr(right, name), rtol=1e-4, atol=1e-4)


def test_positions_are_counted_from_the_first_token() -> None:
    """GPT-2 learns absolute positions, so it would see padding on the left that rotary models do not."""
    sizes = {"vocab_size": 300, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    actor = ActorCritic(GPT2LMHeadModel(GPT2Config(**sizes)).eval(), make_value_head(64, 0))
    with torch.no_grad():
        right, left = evaluate(actor, make_batch()), evaluate(actor, make_batch(left=True))
    torch.testing.assert_close(left.token_logp, right.token_logp, rtol=1e-4, atol=1e-4)


def test_an_episode_as_one_sequence_equals_its_turns_as_prompts() -> None:
    """The value and log-probabilities of a turn do not see what comes later in the sequence."""
    actor, batch = ActorCritic(model_of("llama", False), make_value_head(64, 0)), make_batch()
    cut = Batch(
        batch.ids[[1], :6], batch.mask[[1], :6], torch.tensor([[0, c] for c in (3, 4, 5)]), torch.tensor([[0, 2]])
    )
    with torch.no_grad():
        whole, first = evaluate(actor, batch), evaluate(actor, cut)
    torch.testing.assert_close(first.token_logp, whole.token_logp[5:8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.values, whole.values[1:2], rtol=1e-5, atol=1e-6)


def test_the_head_runs_at_response_positions_only() -> None:
    model, batch, seen = model_of("qwen2", True), make_batch(), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    evaluate(ActorCritic(model, make_value_head(64, 0)), batch)
    assert seen == [(len(batch.tokens), len(TOKENIZERS["qwen2"]))]


def gradients(actor: ActorCritic, part: str) -> tuple[float, float]:
    """Largest gradient in the policy and in the value head from the sum of one part of the evaluation."""
    actor.zero_grad(set_to_none=True)
    getattr(evaluate(actor, make_batch()), part).sum().backward()
    sizes = [
        max((float(weight.grad.abs().max()) for weight in module.parameters() if weight.grad is not None), default=0.0)
        for module in (actor.policy, actor.value_head)
    ]
    return sizes[0], sizes[1]


@pytest.mark.parametrize("detach", [False, True])
def test_detach_value_keeps_the_value_loss_out_of_the_backbone(detach: bool) -> None:
    actor = ActorCritic(model_of("llama", False), make_value_head(64, 0), detach_value=detach)
    policy, critic = gradients(actor, "values")
    assert critic > 0
    assert (policy == 0) is detach
    policy, critic = gradients(actor, "token_logp")
    assert policy > 0
    assert critic == 0


def test_entropies_have_a_gradient_when_asked_for() -> None:
    model, batch = model_of("llama", False), make_batch()
    assert evaluate(ActorCritic(model, make_value_head(64, 0)), batch).entropy.requires_grad
    quiet = ActorCritic(model, make_value_head(64, 0), entropy_gradient=False)
    assert not evaluate(quiet, batch).entropy.requires_grad
    assert evaluate(quiet, batch).token_logp.requires_grad
    with torch.no_grad():
        assert not evaluate(ActorCritic(model, make_value_head(64, 0)), batch).entropy.requires_grad


def test_value_head_is_the_papers_and_a_function_of_its_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    head = make_value_head(64, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = make_value_head(64, 3), make_value_head(64, 4)
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in head[::2]] == [(16, 64), (8, 16), (1, 8)]
    state = head.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert not any(torch.equal(state[name], value) for name, value in other.state_dict().items())
    for layer in head[::2]:
        bound = layer.in_features**-0.5
        assert bound / 2 < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_policy_and_value_head_are_siblings() -> None:
    model = model_of("llama", False)
    names = set(model.state_dict())
    actor = make_actor_critic(model, SANE)
    assert set(actor.policy.state_dict()) == names
    assert {name.split(".")[0] for name in actor.state_dict()} == {"policy", "value_head"}
    assert actor.config.hidden_size == 64


def test_make_actor_critic_follows_the_settings() -> None:
    chosen = SANE.model_copy(
        update={"temperature": 0.7, "detach_value": True, "entropy_coefficient": 0.01, "critic_seed": 9}
    )
    actor = make_actor_critic(model_of("qwen2", True), chosen)
    assert (actor.temperature, actor.detach_value, actor.entropy_gradient) == (0.7, True, True)
    assert torch.equal(actor.value_head[0].weight, make_value_head(64, 9)[0].weight)
    assert not make_actor_critic(model_of("qwen2", True), SANE).entropy_gradient


def test_a_scaled_head_is_refused() -> None:
    model = model_of("llama", False)
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits after the output head"):
        make_actor_critic(model, SANE)


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_kl_to_a_reference(family: str, tied: bool) -> None:
    policy, batch = model_of(family, tied), make_batch()
    own = Reference(copy.deepcopy(policy), 0.7)
    other = Reference(model_of(family, tied, seed=1), 0.7)
    actor = ActorCritic(policy, make_value_head(64, 0), 0.7)
    same = evaluate(actor, batch, reference_logits=own.logits(batch.ids, batch.mask, batch.tokens))
    assert same.kl.abs().max() < 1e-5
    logits = other.logits(batch.ids, batch.mask, batch.tokens)
    far = evaluate(actor, batch, reference_logits=logits)
    torch.testing.assert_close(far.kl, full_kl(far.logits, logits))
    assert far.kl.min() > 0
    far.kl.sum().backward()
    assert not logits.requires_grad
    assert all(weight.grad is None and not weight.requires_grad for weight in other.model.parameters())


def test_reference_is_the_model_the_settings_name(tmp_path: Path) -> None:
    base, start = make_folder(tmp_path / "base", seed=1), make_folder(tmp_path / "start", seed=2)
    policy = load_model(start)
    for name, folder in {"base": base, "start": start}.items():
        reference = load_reference(SANE.model_copy(update={"kl_reference": name}), policy, base, start)
        assert reference is not None
        expected = load_model(folder).state_dict()
        assert all(torch.equal(expected[key], value) for key, value in reference.model.state_dict().items())
        assert not reference.model.training


def test_coefficient_0_loads_no_reference() -> None:
    off = SANE.model_copy(update={"kl_coefficient": 0.0})
    nowhere = Path("no/such/folder")
    assert load_reference(off, model_of("llama", False), nowhere, nowhere) is None
    with pytest.raises(UserError, match="no/such/folder"):
        load_reference(SANE, model_of("llama", False), nowhere, nowhere)


def test_reference_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "words")
    with pytest.raises(UserError, match=r"has 112 tokens and the policy 400.*kl_reference"):
        load_reference(SANE, model_of("llama", False), base, base)
