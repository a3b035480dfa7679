from __future__ import annotations

from pathlib import Path

import pytest

from rlheals.errors import UserError
from rlheals.inference.transformers_engine import fingerprint
from rlheals.stages.probe_sft import check_fingerprint
from tests.common import make_model, make_tokenizer


def test_an_engine_with_other_weights_is_noticed() -> None:
    tokenizer = make_tokenizer("llama")
    own, other = (fingerprint(make_model("llama", tokenizer, seed=seed)) for seed in (0, 1))
    check_fingerprint(own, own, Path("checkpoint-5"))
    with pytest.raises(UserError, match=r"after swapping in checkpoint-5 .* off by"):
        check_fingerprint(own, other, Path("checkpoint-5"))


def test_log_probabilities_that_are_not_numbers_are_noticed() -> None:
    with pytest.raises(UserError, match="off by nan"):
        check_fingerprint([float("nan")], [-1.0], Path("checkpoint-5"))
