"""One vLLM that answers for every checkpoint, branch and edited model in turn."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlheals.errors import UserError, first_line
from rlheals.inference.engine import Answer, Capabilities, Sampling
from rlheals.inference.fingerprint import Proof, check_fingerprint, context_of, sentinels
from rlheals.inference.prompts import check_prompts
from rlheals.inference.seeds import counter_seed
from rlheals.inference.stops import holds_stop, make_answers, stop_tokens
from rlheals.inference.vllm.start import shut_down, start
from rlheals.inference.vllm.weights import push_weights
from rlheals.models.checkpoint import check_state, generation_config, skeleton

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from rlheals.inference.vllm.settings import VllmSettings

Result = TypeVar("Result")


class VllmEngine:
    """An `Engine` on vLLM.

    In float32 on a CPU, answers depend neither on what else is asked in the same call nor on how vLLM schedules it,
    beyond the rounding of matrix products (about 1e-6 of a logit); sampled rows have a stream of random numbers each.
    On a GPU that holds as far as the batch-invariant kernels of the installed build go.

    Args:
        folder: Hugging Face folder of the model to start with.
        tokenizer: its tokenizer.
        settings: see `VllmSettings`.

    Raises:
        UserError: vLLM is missing or of another release, does not serve the model, or does not start.
    """

    name = "vllm"
    capabilities = Capabilities(swap=True, logprobs=True, seeds=True)
    _llm: Any
    _stop: Callable[[], object]

    def __init__(self, folder: Path, tokenizer: Any, settings: VllmSettings) -> None:
        self.folder, self.tokenizer, self.settings = folder, tokenizer, settings
        self._skeleton = skeleton(folder)
        self.config = self._skeleton.config
        self.context = min(settings.max_context, context_of(self.config))
        self.stop_tokens = stop_tokens(generation_config(folder), tokenizer)
        self._vocabulary = self.config.get_text_config().vocab_size
        self._sentinels = sentinels(self._vocabulary, context_of(self.config))
        self._start()
        self._state: Mapping[str, Tensor] | None = None
        self._known: list[float] | None = None
        self.restarts = 0

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer each prompt, in order.

        A prompt within ``sampling.max_new_tokens`` of the context's end gets the tokens that still fit.

        Raises:
            UserError: a prompt is empty or leaves no room in the context, or the engine died twice.
        """
        check_prompts(token_ids, self.context, self._vocabulary)
        if not token_ids:
            return []
        prompts = dict(enumerate(map(list, token_ids)))
        found = self._complete(prompts, sampling)
        if sampling.stop:
            # vLLM looks for stop strings in a text that begins in the prompt where that ends within a character, and so
            # may see one that the response does not hold. Such rows are asked again, to the end; they are cut below.
            early = {row: prompts[row] for row, one in found.items() if self._stopped_early(one, sampling.stop)}
            found |= self._complete(early, replace(sampling, stop=()))
        completions = [found[row] for row in prompts]
        sequences = [list(completion.token_ids) for completion in completions]
        scores = [_scores(completion) for completion in completions] if sampling.logprobs else None
        return make_answers(self.tokenizer, sequences, scores, self.stop_tokens, sampling.stop)

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace all weights and forget everything computed with the old ones.

        The mapping is kept, not copied, for the case that the engine has to be started again: it must go on giving
        these weights until the next swap.

        Raises:
            UserError: a key is missing or unexpected or a shape differs (nothing has changed then), or the engine died.
        """
        check_state(
            {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, self._skeleton, "the state to swap in"
        )
        self._state, self._known = state_dict, None
        self._alive(lambda: self._push(state_dict))

    def fingerprint(self) -> list[float]:
        """Log-probabilities of the sentinels as vLLM computes them; see `rlheals.inference.fingerprint`.

        Raises:
            UserError: the engine died twice.
        """
        self._known = self._alive(self._score)
        return self._known

    def close(self) -> None:
        """Stop the engine and give its memory back.

        What vLLM keeps of the frames that started it may hold the engine, so this is not left to the garbage collector.
        """
        self._llm = None
        self._stop()

    def _start(self) -> None:
        self._llm = start(self.folder, self.config, self.settings, self.context)
        self._stop = weakref.finalize(self, shut_down, self._llm)

    def _asked(self, row: int, length: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, self.context - length),
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            top_k=sampling.top_k if sampling.temperature else 0,
            repetition_penalty=sampling.repetition_penalty,
            seed=counter_seed(sampling.seed, row) if sampling.temperature else None,
            logprobs=0 if sampling.logprobs else None,
            stop=list(sampling.stop),
            stop_token_ids=sorted(self.stop_tokens),
            ignore_eos=True,  # the end tokens are those above, for every engine the same
            detokenize=bool(sampling.stop),
        )

    def _complete(self, prompts: Mapping[int, list[int]], sampling: Sampling) -> dict[int, Any]:
        """VLLM's completion of each prompt, by its row."""
        if not prompts:
            return {}
        requests = [{"prompt_token_ids": prompt} for prompt in prompts.values()]
        asked = [self._asked(row, len(prompt), sampling) for row, prompt in prompts.items()]
        outputs = self._alive(lambda: self._llm.generate(requests, asked, use_tqdm=False))
        return {row: output.outputs[0] for row, output in zip(prompts, outputs, strict=True)}

    def _stopped_early(self, completion: Any, stop: Sequence[str]) -> bool:
        at_string = isinstance(completion.stop_reason, str)
        return at_string and not holds_stop(self.tokenizer, completion.token_ids, stop)

    def _score(self) -> list[float]:
        from vllm import SamplingParams

        short, long, followers = self._sentinels
        by_token = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        after = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=followers, detokenize=False)
        requests = [{"prompt_token_ids": list(ids)} for ids in (*short, long)]
        *scored, last = self._llm.generate(requests, [*[by_token] * len(short), after], use_tqdm=False)
        found = [
            float(scores[token].logprob)
            for ids, output in zip(short, scored, strict=True)
            for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        return [*found, *(float(last.outputs[0].logprobs[0][token].logprob) for token in followers)]

    def _push(self, state_dict: Mapping[str, Tensor]) -> None:
        push_weights(self._llm, state_dict, self.config, self.settings)
        # Keys and values of the old weights would otherwise answer for every prompt that begins as an earlier one.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not emptied")

    def _alive(self, action: Callable[[], Result]) -> Result:
        """The result of ``action``; an engine that dies is started once more, with the weights it had.

        Raises:
            UserError: it died a second time, or was closed.
        """
        if self._llm is None:
            raise UserError("the vLLM engine is closed, by its program or because it died; make another one.")
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # vLLM raises whatever its kernels and workers do
            if self.restarts:
                raise self._died(error) from error
            return self._again(action, error)

    def _again(self, action: Callable[[], Result], error: Exception) -> Result:
        """The result of ``action`` on an engine that is started anew."""
        self.restarts += 1
        print(f"vllm: the engine died ({first_line(error)}); starting it again", file=sys.stderr)
        self.close()
        try:
            self._start()
            self._restore()
            return action()
        except UserError:
            self.close()  # it may hold other weights than it should
            raise
        except Exception as again:
            raise self._died(again) from again

    def _restore(self) -> None:
        """Give a fresh engine the weights the last one had, and prove it where that had been done."""
        if self._state is not None:
            self._push(self._state)
        if self._known is not None:
            check_fingerprint(Proof(self._score(), self._known), "the weights it had", self.settings.dtype)

    def _died(self, error: Exception) -> UserError:
        self.close()
        return UserError(
            f"the vLLM engine died twice, the second time of: {first_line(error)}. What a stage had finished is kept; "
            "run the same command again to go on, lower inference.max_sequences or inference.memory_fraction if it ran "
            "out of memory, or set inference.engine: transformers."
        )


def _scores(completion: Any) -> list[float]:
    """Log-probability of each sampled token."""
    return [
        float(scores[token].logprob) for token, scores in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
