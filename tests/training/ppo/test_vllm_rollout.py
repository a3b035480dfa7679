from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine, fingerprint
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.training.ppo.rollout import synchronise
from rlheals.training.ppo.vllm_rollout import VllmRollout, make_vllm_rollout, sentinel_prompts
from tests.common import make_folder, make_model, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


class FakeGeneration:
    """TRL's interface without vLLM; ``served`` stands for the copy of the weights in the engine."""

    def __init__(self, model: Any, completions: list[list[int]]) -> None:
        self.model, self.completions = model, completions
        self.served = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.asked: list[Any] = []

    def sync_weights(self) -> None:
        self.served = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        self.asked.append((prompts, self.temperature, self.top_p, self.top_k, self.max_completion_length))
        scores = [[[-0.5 * (place + 1)] for place in range(len(row))] for row in self.completions]
        return prompts, self.completions, scores, None


def make_engine(completions: list[list[int]]) -> VllmRollout:
    tokenizer = make_tokenizer("words")
    return VllmRollout(FakeGeneration(make_model("words", tokenizer), completions), tokenizer)


def test_answers_have_no_end_token_and_know_whether_they_were_cut() -> None:
    engine = make_engine([])
    words = engine.tokenizer.convert_tokens_to_ids(["7", "8"])
    engine.generation.completions = [[*words, engine.tokenizer.eos_token_id], words]
    sampling = Sampling(3, temperature=0.7, top_p=0.9, top_k=5, logprobs=True)
    done, cut = engine.generate([[1, 2], (3, 4, 5)], sampling)
    assert (done.token_ids, done.text, done.finished) == (words, "7 8", True)
    assert (cut.token_ids, cut.finished) == (words, False)
    assert (done.logprobs, cut.logprobs) == ([-0.5, -1.0, -1.5], [-0.5, -1.0])
    assert engine.generation.asked == [([[1, 2], [3, 4, 5]], 0.7, 0.9, 5, 3)]
    assert engine.generate([], sampling) == []


def test_only_the_bound_policy_can_be_pushed() -> None:
    engine = make_engine([])
    policy = engine.generation.model
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1.0)
    name = "model.embed_tokens.weight"
    assert not torch.equal(engine.generation.served[name], policy.state_dict()[name])
    engine.swap(policy.state_dict())
    assert torch.equal(engine.generation.served[name], policy.state_dict()[name])
    other = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    with pytest.raises(UserError, match="serve the model in training only"):
        engine.swap(other)
    with pytest.raises(UserError, match="serve the model in training only"):
        engine.swap({})


def test_sentinels_are_those_of_the_transformers_engine() -> None:
    seen = []

    def record(input_ids: torch.Tensor, use_cache: bool) -> Any:
        seen.append(input_ids.tolist())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 111))

    weight = SimpleNamespace(weight=torch.zeros(111, 2))
    model = type("Model", (), {"device": "cpu", "__call__": lambda self, **kw: record(**kw)})()
    model.get_input_embeddings = lambda: weight
    fingerprint(model)
    assert sentinel_prompts(111) == seen[0]


@needs_vllm
def test_a_policy_on_the_cpu_is_told() -> None:
    tokenizer = make_tokenizer("words")
    with pytest.raises(UserError, match="need the policy on a GPU"):
        make_vllm_rollout(make_model("words", tokenizer), tokenizer, None, context=64)


# vLLM changes process-wide state and warns, so it gets a process of its own.
PROGRAM = """
import json, os, sys
from pathlib import Path
from rlheals.stages.common import OFFLINE
os.environ.update(OFFLINE, VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
from accelerate import Accelerator
from rlheals.inference import Sampling
from rlheals.inference.transformers_engine import TransformersEngine, fingerprint
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.training.ppo.vllm_rollout import VllmRollout, start_generation
policy, tokenizer = load_model(Path(sys.argv[1])), load_tokenizer(Path(sys.argv[1]))
engine = VllmRollout(start_generation(policy, tokenizer, Accelerator(cpu=True), 256, 0.2), tokenizer)
gap = max(abs(a - b) for a, b in zip(engine.fingerprint(), fingerprint(policy), strict=True))
prompts = [tokenizer(text)["input_ids"] for text in ("You are an expert", "Cards: ['2', 'Q']")]
plain = TransformersEngine(policy, tokenizer, 8)
pairs = [[answer.token_ids[:1] for answer in each.generate(prompts, Sampling(8))] for each in (engine, plain)]
drawn = engine.generate(prompts[:1] * 4, Sampling(8, temperature=1.0))
print(json.dumps({"gap": gap, "first": pairs, "drawn": [answer.token_ids for answer in drawn]}))
"""


@needs_vllm
@pytest.mark.slow
def test_vllm_itself_serves_the_folder_the_policy_came_from(tmp_path: Path) -> None:
    """Without a push, which vLLM's CPU build does not take: bfloat16 against float32."""
    folder = make_folder(tmp_path / "m", "llama", hidden_size=128, initializer_range=0.1)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"gap"')))
    assert told["gap"] < 0.1
    assert told["first"][0] == told["first"][1]
    assert len({tuple(tokens) for tokens in told["drawn"]}) > 1, "repeated prompts get answers of their own"


@pytest.mark.gpu
def test_pushed_weights_answer_and_are_verified(tmp_path: Path) -> None:
    """A push that reaches vLLM passes the check, one that does not is refused; answers follow the weights."""
    from accelerate import Accelerator

    folder = make_folder(tmp_path / "m", "llama", hidden_size=128, initializer_range=0.05)
    policy, tokenizer = load_model(folder, "float32", "cuda"), load_tokenizer(folder)
    engine = make_vllm_rollout(policy, tokenizer, Accelerator(), context=256, memory_share=0.2)
    synchronise(engine, policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    synchronise(engine, policy)
    prompts = [tokenizer("You are an expert")["input_ids"], tokenizer("Cards: ['2', 'Q']")["input_ids"]]
    served = engine.generate(prompts, Sampling(1, logprobs=True))
    trained = TransformersEngine(policy, tokenizer, 8, "cuda").generate(prompts, Sampling(1, logprobs=True))
    for one, other in zip(served, trained, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.05)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(-1.0)
    engine.generation.sync_weights = lambda: None
    with pytest.raises(UserError, match="does not answer with the trained weights"):
        synchronise(engine, policy)
