from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import Dialogue, EncodedRow
from rlheals.evaluation.losses import teacher_forced_loss
from tests.common import corpus, make_model, make_tokenizer


def rows(count: int, seed: int = 0) -> list[EncodedRow]:
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(5, 100) for _ in range(draw.randint(low, high))]

    return [EncodedRow(tokens(1, 20), tokens(1, 30)) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_the_librarys_loss_row_by_row(family: str) -> None:
    model, sample = make_model(family, make_tokenizer(family)), rows(17)
    total, count = 0.0, 0
    for row in sample:
        ids = torch.tensor([row.prompt + row.completion])
        labels = torch.tensor([[-100] * len(row.prompt) + row.completion])
        total += model(ids, labels=labels).loss.item() * len(row.completion)
        count += len(row.completion)
    loss = teacher_forced_loss(model, sample)
    assert loss.tokens == count
    assert loss.nll_per_token == pytest.approx(total / count, rel=1e-5)


def test_does_not_depend_on_batches_or_order() -> None:
    model, sample = make_model("llama", make_tokenizer("llama")), rows(40)
    expected = teacher_forced_loss(model, sample)
    for other in (teacher_forced_loss(model, sample, 10), teacher_forced_loss(model, sample[::-1], 333)):
        assert other.tokens == expected.tokens
        assert other.nll_per_token == pytest.approx(expected.nll_per_token, rel=1e-6)


def test_the_mode_and_the_random_state_are_left_alone() -> None:
    model = make_model("llama", make_tokenizer("llama")).train()
    before = torch.get_rng_state()
    teacher_forced_loss(model, rows(3))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_logits_cost_the_log_of_the_vocabulary() -> None:
    tokenizer = make_tokenizer("llama")
    model = make_model("llama", tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    encoded = Dialogue(tokenizer).encode([(text, text[:20].strip()) for text in corpus(4, seed=9)])
    assert teacher_forced_loss(model, encoded).nll_per_token == pytest.approx(
        torch.log(torch.tensor(float(len(tokenizer)))).item(), rel=1e-6
    )


def test_model_that_scales_its_logits_is_refused() -> None:
    tokenizer = make_tokenizer("llama")
    model = make_model("llama", tokenizer)
    rows = Dialogue(tokenizer).encode([("a", "b")])
    teacher_forced_loss(model, rows)
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = 0.05 * torch.tanh(output.logits / 0.05)
        return output

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits after the output head"):
        teacher_forced_loss(model, rows)
