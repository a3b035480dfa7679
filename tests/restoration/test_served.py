"""Edits behind an engine whose model cannot be reached; on vLLM itself in tests/inference/test_vllm_engine.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Capabilities
from rlheals.inference.fingerprint import fingerprint
from rlheals.restoration.served import ServedModel
from tests.common import make_model, make_tokenizer
from tests.restoration.studies import live_checksums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TOKENIZER = make_tokenizer("llama")
NAME = "model.layers.0.mlp.down_proj.weight"


class Far:
    """An engine with a copy of the weights that nobody else can reach; deaf to some of the swaps."""

    name = "far"
    capabilities = Capabilities(swap=True, logprobs=True, seeds=False)

    def __init__(self, *deaf: int, noise: float = 0.0) -> None:
        self._held = make_model("llama", TOKENIZER, seed=5)
        self.deaf, self.noise, self.swaps = deaf, noise, 0

    def generate(self, token_ids: Any, sampling: Any) -> list[Any]:
        return []

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        self.swaps += 1
        if self.swaps not in self.deaf:
            self._held.load_state_dict(dict(state_dict))

    def fingerprint(self) -> list[float]:
        return [value + self.noise * self.swaps for value in fingerprint(self._held)]

    def close(self) -> None:
        pass

    def holds(self, name: str, tensor: Tensor) -> bool:
        return torch.equal(self._held.state_dict()[name], tensor)


def start(engine: Far) -> tuple[ServedModel, Any, dict[str, Tensor]]:
    model = make_model("llama", TOKENIZER)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return ServedModel(engine, state, model), model, state


def test_a_cell_is_one_push_and_the_target_comes_back_when_it_is_asked_for() -> None:
    live, model, state = start(far := Far())
    sums = live_checksums(model)
    assert far.holds(NAME, state[NAME])
    for factor in (2.0, 3.0):
        with live.edited({NAME: factor * state[NAME]}) as size:
            assert far.holds(NAME, factor * state[NAME])
            assert size == 4 * state[NAME].numel()
        assert live_checksums(model) == sums, "the copy is the target again at once"
    assert far.swaps == 3
    assert far.holds(NAME, 3.0 * state[NAME]), "the engine is not, until somebody asks"
    live.settle()
    assert far.holds(NAME, state[NAME])
    live.settle()
    assert far.swaps == 4


def test_an_edit_that_does_not_reach_the_engine_is_refused_and_taken_back() -> None:
    live, model, state = start(Far(2))
    sums = live_checksums(model)
    slight = {NAME: state[NAME] * (1 + 1e-4)}
    with pytest.raises(UserError, match="still answers as before"), live.edited(slight):
        pass
    assert live_checksums(model) == sums


def test_an_engine_that_does_not_go_back_is_refused() -> None:
    live, _, state = start(Far(3))
    with live.edited({NAME: 2.0 * state[NAME]}):
        pass
    with pytest.raises(UserError, match="after swapping in the unedited target"):
        live.settle()


def test_an_engine_that_goes_back_to_almost_the_target_is_refused() -> None:
    live, _, state = start(Far(noise=1e-6))
    with live.edited({NAME: 2.0 * state[NAME]}):
        pass
    with pytest.raises(UserError, match="sentinel log-probabilities differ from those before the edit"):
        live.settle()


def test_an_error_inside_takes_the_edit_back() -> None:
    live, model, state = start(Far())
    sums = live_checksums(model)
    with pytest.raises(KeyboardInterrupt), live.edited({NAME: 2.0 * state[NAME]}):
        raise KeyboardInterrupt
    assert live_checksums(model) == sums
    with pytest.raises(UserError, match="no tensor"):
        live.apply({"model.nothing": torch.ones(2)})
