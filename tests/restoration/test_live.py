from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import save_model
from rlheals.restoration.live import FileState, LiveModel
from rlheals.spectra.reader import Weights
from tests.common import make_model, make_tokenizer
from tests.restoration.studies import live_checksums, short_checksum

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

PROMPTS = [[5, 6, 7], [9, 3], [11, 12, 13, 14]]
NAME = "model.layers.0.mlp.down_proj.weight"
OTHER = "model.layers.1.self_attn.q_proj.weight"
ANSWERED = Sampling(max_new_tokens=4, logprobs=True)


def make_engine(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> TransformersEngine:
    tokenizer = make_tokenizer(family)
    return TransformersEngine(make_model(family, tokenizer, seed).to(dtype), tokenizer, batch_size=4)


def state_of(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def changed(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: state[name] + 0.1 * torch.randn(state[name].shape) for name in names}


def test_an_engine_answers_exactly_as_before_after_100_cycles() -> None:
    engine = make_engine()
    state = state_of(engine)
    live = LiveModel(engine, state)
    before, sums = engine.generate(PROMPTS, ANSWERED), live_checksums(engine.model)
    names = [name for name in state if "layers" in name]
    torch.manual_seed(0)
    seen = set()
    for cycle in range(100):
        with live.edited(changed(state, *names[cycle % 5 :: 5])):
            if cycle % 25 == 0:
                seen.add(str(engine.generate(PROMPTS, ANSWERED)))
    assert engine.generate(PROMPTS, ANSWERED) == before, "tokens and log-probabilities, bit for bit"
    assert live_checksums(engine.model) == sums
    assert len(seen) == 4
    assert str(before) not in seen, "the edits were live, or the test would show nothing"


def test_only_named_tensors_change_and_no_memory_is_copied_back() -> None:
    engine = make_engine()
    state = state_of(engine)
    live, sums = LiveModel(engine, state), live_checksums(engine.model)
    places = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    changes = changed(state, NAME, OTHER)
    with live.edited(changes) as size:
        during = live_checksums(engine.model)
    assert size == sum(4 * tensor.numel() for tensor in changes.values())
    assert {name for name in sums if during[name] != sums[name]} == {NAME, OTHER}
    assert all(during[name] == short_checksum(tensor) for name, tensor in changes.items())
    assert {name: p.data_ptr() for name, p in engine.model.named_parameters()} == places


def test_the_changes_are_not_written_to_and_the_target_comes_from_its_state() -> None:
    engine = make_engine(seed=1)
    state = state_of(make_engine(seed=0))
    live = LiveModel(engine, state)
    changes = changed(state, NAME)
    kept = changes[NAME].clone()
    with live.edited(changes):
        pass
    assert torch.equal(changes[NAME], kept)
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.model.state_dict().items())


def test_weights_that_were_damaged_in_between_are_noticed() -> None:
    engine = make_engine()
    live = LiveModel(engine, state := state_of(engine))
    own = dict(engine.model.named_parameters())[NAME].data
    live.apply(changed(state, NAME))
    own[0, 0] += 1.0
    with pytest.raises(UserError, match=rf"does not hold the target's weights: tensor {NAME}"):
        live.revert()


def test_an_engine_that_holds_something_else_than_the_target_is_noticed() -> None:
    engine = make_engine()
    live = LiveModel(engine, state := state_of(engine))
    state[NAME] = state[NAME] + 1.0
    with pytest.raises(UserError, match="does not hold the target's weights"), live.edited(changed(state, NAME)):
        pass


def test_an_error_inside_takes_the_edit_back() -> None:
    engine = make_engine()
    live, sums = LiveModel(engine, state := state_of(engine)), live_checksums(engine.model)
    with pytest.raises(KeyboardInterrupt), live.edited(changed(state, NAME)):
        raise KeyboardInterrupt
    assert live_checksums(engine.model) == sums
    live.revert()


def test_a_second_edit_has_to_wait() -> None:
    engine = make_engine()
    live = LiveModel(engine, state := state_of(engine))
    live.apply(changed(state, NAME))
    with pytest.raises(UserError, match="live already"):
        live.apply(changed(state, OTHER))
    live.revert()
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [("model.nothing", (2, 2), "no tensor model.nothing"), (NAME, (3, 3), "in the live model")],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_changes(
    name: str, shape: tuple[int, ...], told: str
) -> None:
    engine = make_engine()
    live, sums = LiveModel(engine, state := state_of(engine)), live_checksums(engine.model)
    with pytest.raises(UserError, match=told), live.edited({**changed(state, OTHER), name: torch.zeros(shape)}):
        pass
    assert live_checksums(engine.model) == sums


def test_tied_weights_change_and_come_back_under_both_names() -> None:
    engine = make_engine("qwen2")
    live, sums = LiveModel(engine, state := state_of(engine)), live_checksums(engine.model)
    changes = changed(state, "model.embed_tokens.weight")
    both = {**changes, "lm_head.weight": changes["model.embed_tokens.weight"]}
    for edit in (changes, both):
        with live.edited(edit):
            during = live_checksums(engine.model)
        assert during["lm_head.weight"] == during["model.embed_tokens.weight"] != sums["lm_head.weight"]
        assert live_checksums(engine.model) == sums


def test_a_folder_is_a_state_and_takes_the_type_of_the_engine(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama")
    save_model(make_model("llama", tokenizer, seed=3), tokenizer, tmp_path / "model")
    engine = make_engine(dtype=torch.bfloat16)
    with Weights(tmp_path / "model") as weights:
        state = FileState(weights)
        assert len(state) == len(weights.shapes)
        assert "model.nothing" not in state
        live = LiveModel(engine, state)
        with live.edited({NAME: state[NAME] + 1.0}):
            assert dict(engine.model.named_parameters())[NAME].dtype == torch.bfloat16
        assert torch.equal(engine.model.state_dict()[NAME], state[NAME].bfloat16())
