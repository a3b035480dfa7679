"""Rollouts on GPUs: TRL's `VLLMGeneration` behind the project's `Engine`, beside the model in training.

The weights are pushed through `Engine.swap` and the fingerprint is measured by vLLM itself, so the check that follows
every push (`rollout.synchronise`) compares log-probabilities of the served weights with those of the trained ones. It
is needed: the push goes through a private path of vLLM, which could change without an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.engine import Answer, Capabilities
from rlheals.inference.transformers_engine import stop_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from rlheals.inference import Sampling

SENTINELS, SENTINEL_LENGTH = 4, 8


class VllmRollout:
    """An `Engine` on a vLLM that shares the GPU and process of a policy.

    Samples come from vLLM's own stream of random numbers: repeated prompts get different answers, and a run is not
    repeated bit for bit, which vLLM does not promise for other batch sizes anyway.

    Args:
        generation: TRL's `VLLMGeneration`, bound to the policy.
        tokenizer: of the policy.
    """

    name = "vllm"
    capabilities = Capabilities(swap=True, logprobs=True, seeds=False)

    def __init__(self, generation: Any, tokenizer: Any) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens(generation.model, tokenizer)

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer each prompt, in order."""
        if not token_ids:
            return []
        served = self.generation
        served.temperature, served.top_p, served.top_k = sampling.temperature, sampling.top_p, sampling.top_k
        served.max_completion_length = sampling.max_new_tokens
        _, completions, scores, _ = served.generate([list(ids) for ids in token_ids], images=None, num_generations=1)
        return [
            self._answer(completion, [step[0] for step in score] if sampling.logprobs else None)
            for completion, score in zip(completions, scores, strict=True)
        ]

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Push the weights of the policy, which ``state_dict`` must be the state of.

        Raises:
            UserError: it holds other tensors; TRL pushes from the model it was bound to.
        """
        own = self.generation.model.state_dict()
        foreign = [name for name, tensor in state_dict.items() if name not in own or not _same(tensor, own[name])]
        if foreign or len(own) != len(state_dict):
            raise UserError(
                "vLLM rollouts serve the model in training only, and the state to push is another one's "
                f"(tensor {foreign[0] if foreign else 'missing'}); set ppo.rollouts: policy for other weights."
            )
        self.generation.sync_weights()

    def fingerprint(self) -> list[float]:
        """Log-probabilities that vLLM gives the sentinel prompts of `transformers_engine.fingerprint`."""
        from vllm import SamplingParams

        prompts = sentinel_prompts(self.generation.model.get_input_embeddings().weight.shape[0])
        asked = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        outputs = self.generation.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling_params=asked, use_tqdm=False
        )
        return [
            float(scores[token].logprob)
            for ids, output in zip(prompts, outputs, strict=True)
            for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]

    def _answer(self, completion: Sequence[int], scores: list[float] | None) -> Answer:
        tokens = list(completion)
        finished = bool(tokens) and tokens[-1] in self.stop_tokens
        kept = tokens[:-1] if finished else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(kept, text, finished, scores)


def make_vllm_rollout(
    policy: Any, tokenizer: Any, accelerator: Any, context: int, memory_share: float = 0.3
) -> VllmRollout:
    """Start vLLM in this process, with the weights of the folder ``policy`` was loaded from.

    Args:
        policy: a causal language model made by ``from_pretrained(folder)``.
        tokenizer: its tokenizer.
        accelerator: of the training.
        context: longest conversation in tokens.
        memory_share: share of the GPU that vLLM takes for its copy of the weights and its cache.

    Raises:
        UserError: vLLM is not installed, or the policy is not on a GPU.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed; run `pip install rlheals[vllm]` or set ppo.rollouts: policy.")
    if policy.device.type != "cuda":
        raise UserError(
            "vLLM rollouts need the policy on a GPU, because vLLM's CPU build repacks weights and takes no new ones; "
            "set ppo.rollouts: policy, or compute.device: cuda."
        )
    return VllmRollout(start_generation(policy, tokenizer, accelerator, context, memory_share), tokenizer)


def start_generation(policy: Any, tokenizer: Any, accelerator: Any, context: int, memory_share: float) -> Any:
    """TRL's `VLLMGeneration` in this process; arguments as of `make_vllm_rollout`. vLLM computes in bfloat16."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(
        model=policy,
        accelerator=accelerator,
        processing_class=tokenizer,
        mode="colocate",
        gpu_memory_utilization=memory_share,
        max_model_length=context,
        logprobs=0,
    )


def sentinel_prompts(vocabulary: int) -> list[list[int]]:
    """The token sequences whose log-probabilities are the fingerprint; see `transformers_engine.fingerprint`."""
    return [
        [(place * 7919 + 13) % vocabulary for place in range(start, start + SENTINEL_LENGTH)]
        for start in range(0, SENTINELS * SENTINEL_LENGTH, SENTINEL_LENGTH)
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
