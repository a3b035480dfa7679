from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Capabilities
from rlheals.inference.fingerprint import (
    FOLLOWERS,
    LENGTH,
    LONG,
    SHORT,
    Proof,
    check_fingerprint,
    fingerprint,
    gap,
    sentinels,
    sentinels_of,
)
from rlheals.inference.live import serve
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.inference.vllm.settings import CPU_BLOCK
from tests.common import make_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENIZER = make_tokenizer("llama")
COUNT = SHORT * (LENGTH - 1) + FOLLOWERS


def test_the_long_sentinel_ends_past_a_block_of_the_cache() -> None:
    found = sentinels(512, 1024)
    assert CPU_BLOCK < len(found.long) == LONG
    assert found.long[:CPU_BLOCK] not in [ids[:CPU_BLOCK] for ids in found.short]
    assert {len(ids) for ids in found.short} == {LENGTH}
    assert len(set(found.followers)) == FOLLOWERS
    assert all(0 <= token < 512 for ids in (*found.short, found.long, found.followers) for token in ids)


@pytest.mark.parametrize(("vocabulary", "context"), [(3, 2), (17, 20), (128_256, 1 << 30)])
def test_sentinels_fit_any_model(vocabulary: int, context: int) -> None:
    found = sentinels(vocabulary, context)
    assert all(len(ids) <= context for ids in found.short)
    assert len(found.long) < context
    assert all(0 <= token < vocabulary for ids in (*found.short, found.long, found.followers) for token in ids)


def test_a_fingerprint_is_what_the_model_says_token_by_token() -> None:
    model = make_model("llama", TOKENIZER)
    asked, found = sentinels_of(model), fingerprint(model)
    assert len(found) == COUNT
    expected = []
    with torch.inference_mode():
        for ids in asked.short:
            for place in range(1, len(ids)):
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
                expected.append(float(torch.log_softmax(logits, -1)[ids[place]]))
        last = torch.log_softmax(model(torch.tensor([asked.long])).logits[0, -1], -1)
    expected += [float(last[token]) for token in asked.followers]
    assert found == pytest.approx(expected, abs=1e-5)


def test_other_weights_are_noticed() -> None:
    own, other = (fingerprint(make_model("llama", TOKENIZER, seed=seed)) for seed in (0, 1))
    check_fingerprint(Proof(own, own), "checkpoint-5")
    for proof in (Proof(own, other), Proof([float("nan")] * COUNT, own), Proof(own, [float("nan")] * COUNT)):
        with pytest.raises(UserError, match=r"after swapping in checkpoint-5 .* off by"):
            check_fingerprint(proof, "checkpoint-5")
    with pytest.raises(UserError, match=r"22 and 21 log-probabilities"):
        gap(own, own[:-1])


def test_keys_and_values_left_over_show_though_everything_else_is_right() -> None:
    """Only the followers of the long sentinel would be off; the mean over all would hide that."""
    own = fingerprint(make_model("llama", TOKENIZER))
    stale = [*own[:-FOLLOWERS], *(value + 2e-3 for value in own[-FOLLOWERS:])]
    assert gap(stale, own) == pytest.approx(2e-3)
    with pytest.raises(UserError, match=r"off by 0\.002"):
        check_fingerprint(Proof(stale, own), "checkpoint-5")


def test_a_slight_change_must_arrive() -> None:
    own = fingerprint(make_model("llama", TOKENIZER))
    rounded = [value + 4e-5 for value in own]  # what a larger model's engine may differ by for good
    moved = [value + 1e-4 for value in own]
    before = Proof(rounded, own)
    check_fingerprint(Proof(rounded, own), "the same again", before=before)
    check_fingerprint(Proof([value + 1e-4 for value in rounded], moved), "a slight edit", before=before)
    check_fingerprint(Proof(rounded, moved), "a slight edit")
    with pytest.raises(UserError, match=r"still answers as before: .* moved by 0 on average, the model's by 0\.0001"):
        check_fingerprint(Proof(rounded, moved), "a slight edit", before=before)


def test_bfloat16_explains_more() -> None:
    own = fingerprint(make_model("llama", TOKENIZER))
    proof = Proof([value + 0.01 for value in own], own)
    check_fingerprint(proof, "checkpoint-5", "bfloat16")
    with pytest.raises(UserError, match=r"off by 0\.01"):
        check_fingerprint(proof, "checkpoint-5", "float32")


def test_rounding_grows_with_the_logits() -> None:
    """Right weights in bfloat16 whose logits are large must not be refused, others still are."""
    model = make_model("llama", TOKENIZER, num_hidden_layers=8)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    exact = fingerprint(model)
    proof = Proof(fingerprint(model.bfloat16()), exact)
    assert gap(*proof) > 0.05, "or this would hold without it"
    check_fingerprint(proof, "checkpoint-5", "bfloat16")
    far = Proof([value - 0.03 * abs(value) for value in proof.expected], proof.expected)
    with pytest.raises(UserError, match="off by"):
        check_fingerprint(far, "checkpoint-5", "bfloat16")


def test_a_change_that_does_not_arrive_is_refused_in_bfloat16_too() -> None:
    own = fingerprint(make_model("llama", TOKENIZER))
    before = Proof([value + 0.02 for value in own], own)
    moved = [value + 0.03 for value in own]
    check_fingerprint(Proof([value + 0.01 for value in before.found], moved), "an edit", "bfloat16", before)
    with pytest.raises(UserError, match="still answers as before"):
        check_fingerprint(Proof(before.found, moved), "an edit", "bfloat16", before)


def test_serving_gives_the_weights_and_proves_it() -> None:
    first, second = (make_model("llama", TOKENIZER, seed) for seed in (0, 1))
    engine = TransformersEngine(make_model("llama", TOKENIZER, 0), TOKENIZER, 4)
    proof = serve(engine, second, "the second")
    assert proof.found == proof.expected == fingerprint(second)
    assert serve(engine, first, "the first", before=proof).found == fingerprint(first)

    class Deaf(TransformersEngine):
        def swap(self, state_dict: Mapping[str, Any]) -> None:
            """Keep the old weights in silence."""

    deaf = Deaf(make_model("llama", TOKENIZER, 0), TOKENIZER, 4)
    with pytest.raises(UserError, match=r"after swapping in the second .* off by"):
        serve(deaf, second, "the second")


def test_an_engine_that_cannot_swap_must_hold_the_weights() -> None:
    first, second = (make_model("llama", TOKENIZER, seed) for seed in (0, 1))
    fixed = SimpleNamespace(
        name="server",
        capabilities=Capabilities(swap=False, logprobs=True, seeds=True),
        fingerprint=lambda: fingerprint(first),
    )
    assert serve(fixed, first, "the first").found == fingerprint(first)
    with pytest.raises(UserError, match=r"server serves other weights than the second .* serve this folder"):
        serve(fixed, second, "the second")
