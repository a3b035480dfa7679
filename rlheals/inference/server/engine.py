"""A server on another host that answers for one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.engine import Answer, Capabilities, Sampling
from rlheals.inference.fingerprint import context_of, gap, rounding, sentinels
from rlheals.inference.prompts import check_prompts
from rlheals.inference.seeds import counter_seed
from rlheals.inference.server.address import address_of
from rlheals.inference.server.client import Client
from rlheals.inference.server.protocol import Cards, Choice, Completion, choose_card, parse
from rlheals.inference.stops import holds_stop, make_answers, stop_tokens
from rlheals.models.checkpoint import generation_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


class ServerEngine:
    """An `Engine` on an OpenAI-compatible server that also gives token ids, as vLLM's does.

    The server keeps the weights it was started with. Which they are is not taken on trust: `fingerprint` asks it, and
    `rlheals.inference.live.serve` compares. Every prompt is a request of its own, so that each has its own seed and
    what fails is asked again alone.

    Args:
        address: of its API.
        folder: Hugging Face folder of the model it should serve, on this machine.
        tokenizer: of that folder.
        max_sequences: conversations that are asked at a time.

    Raises:
        UserError: the server cannot be reached or refuses, or which of its models is meant cannot be told.
    """

    name = "server"
    capabilities = Capabilities(swap=False, logprobs=True, seeds=True)

    def __init__(self, address: str, folder: Path, tokenizer: Any, max_sequences: int) -> None:
        from transformers import AutoConfig

        self.folder, self.tokenizer = folder, tokenizer
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.context = context_of(config)
        self.stop_tokens = stop_tokens(generation_config(folder), tokenizer)
        self._vocabulary = config.get_text_config().vocab_size
        self._sentinels = sentinels(self._vocabulary, self.context)
        server = address_of(address)
        self.address = server.url
        self._client = Client(server, max_sequences)
        clean = self._client.clean
        cards = self._client.get("/models", lambda content: parse(Cards, content, self.address, clean)).data
        card = choose_card(cards, str(folder), folder.resolve().name, self.address, clean)
        self.model = card.id
        self.server_context = card.max_model_len or self.context
        self._known: list[float] | None = None

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer each prompt, in order.

        A prompt within ``sampling.max_new_tokens`` of the end of the model's context gets the tokens that still fit.

        Raises:
            UserError: a prompt is empty, leaves no room in the model's context, or needs more than the server's; the
                server cannot be reached, refuses, cuts answers short, does not give token ids, or has other weights
                than at the last `fingerprint`.
        """
        check_prompts(token_ids, self.context, self._vocabulary)
        if not token_ids:
            return []
        bodies = [self._asked(row, list(prompt), sampling) for row, prompt in enumerate(token_ids)]
        choices = self._ask(bodies)
        wrong = [row for row, choice in enumerate(choices) if self._wrongly_stopped(choice, sampling.stop)]
        if wrong:
            for row, choice in zip(wrong, self._ask([bodies[row] | {"stop": []} for row in wrong]), strict=True):
                choices[row] = choice
        self._check_unchanged()
        sequences = [list(choice.token_ids or []) for choice in choices]
        scores = [self._scores(choice) for choice in choices] if sampling.logprobs else None
        return make_answers(self.tokenizer, sequences, scores, self.stop_tokens, sampling.stop)

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse: a server keeps the weights it was started with.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.address} cannot be given other weights; start a server with each model, or use an engine that can "
            "swap (inference.engine: vllm or transformers)."
        )

    def fingerprint(self) -> list[float]:
        """Log-probabilities of the sentinels as the server computes them; see `rlheals.inference.fingerprint`.

        Raises:
            UserError: the server cannot be reached, refuses, or does not give these log-probabilities.
        """
        self._known = self._score()
        return self._known

    def close(self) -> None:
        """Nothing to stop: the server runs for others, too."""

    def _score(self) -> list[float]:
        short, long, followers = self._sentinels
        greedy = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        bodies = [self._body(ids, **greedy, prompt_logprobs=0) for ids in short]
        bodies.append(self._body(long, **greedy, logprobs=1, logprob_token_ids=followers))
        *scored, last = self._ask(bodies)
        found = [value for ids, choice in zip(short, scored, strict=True) for value in self._prompt_scores(ids, choice)]
        return [*found, *self._followers(followers, last)]

    def _check_unchanged(self) -> None:
        """Make sure that the server was not started again with other weights since they were checked.

        Raises:
            UserError: it was.
        """
        if self._known is None:
            return
        off = gap(self._score(), self._known)
        if not off < rounding(self._known, "bfloat16") / 2:  # what shares a batch moves log-probabilities a little
            raise UserError(
                f"{self.address} has other weights than it had before (sentinel log-probabilities moved by {off:.3g} "
                f"on average); start it with {self.folder} again, leave it alone, and run the same command again."
            )

    def _asked(self, row: int, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
        """The request for one answer; all that a server may have a default of its own for is said."""
        warm = sampling.temperature > 0
        return self._body(
            prompt,
            max_tokens=min(sampling.max_new_tokens, self.context - len(prompt)),
            temperature=sampling.temperature,
            top_p=sampling.top_p if warm else 1.0,
            top_k=sampling.top_k if warm else 0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=sampling.repetition_penalty,
            seed=counter_seed(sampling.seed, row) if warm else None,
            logprobs=0 if sampling.logprobs else None,
            stop=list(sampling.stop),
            stop_token_ids=sorted(self.stop_tokens),
            ignore_eos=True,  # the end tokens are those above, for every engine the same
        )

    def _body(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        """One prompt with settings, ids of tokens wanted back.

        Raises:
            UserError: prompt and answer need more than the server's context.
        """
        needed = len(prompt) + int(settings["max_tokens"])
        if needed > self.server_context:
            raise UserError(
                f"{self.address} holds conversations of {self.server_context} tokens (max_model_len), and a prompt "
                f"with its answer needs {needed}; start the server with --max-model-len {self.context}."
            )
        names = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return {"model": self.model, "prompt": prompt, **names, **settings}

    def _ask(self, bodies: list[dict[str, Any]]) -> list[Choice]:
        def read(place: int, content: bytes) -> Choice:
            choice = parse(Completion, content, self.address, self._client.clean).choices[0]
            self._check(choice, bodies[place])
            return choice

        return self._client.post("/completions", bodies, read)

    def _check(self, choice: Choice, body: Mapping[str, Any]) -> None:
        """Make sure that a reply is the whole answer to what was asked.

        Raises:
            UserError: it is not.
        """
        tokens, asked = choice.token_ids, body["max_tokens"]
        if tokens is None:
            raise self._lacks("the ids of sampled tokens (return_token_ids)")
        if choice.prompt_token_ids not in (None, body["prompt"]):
            raise UserError(
                f"{self.address} answers another prompt than the one it was sent; start the server without options "
                "that change or cut prompts."
            )
        if choice.finish_reason not in ("stop", "length"):
            reason = self._client.clean(choice.finish_reason or "no reason given")
            raise UserError(
                f"{self.address} broke an answer off ({reason}); look at the server's log, start it "
                "again if it died, and run the same command again."
            )
        stopped = choice.finish_reason == "stop" and (body.get("stop") or (tokens and tokens[-1] in self.stop_tokens))
        if len(tokens) > asked or (len(tokens) < asked and not stopped):
            raise UserError(
                f"{self.address} ended an answer after {len(tokens)} of {asked} tokens for a reason of its own; start "
                "the server with --generation-config vllm, so that it adds no limit or end token to those asked for."
            )

    def _wrongly_stopped(self, choice: Choice, stop: Sequence[str]) -> bool:
        """Whether a response ends for a stop string that is not in its text.

        vLLM searches what its incremental decoding adds, and after a prompt that ends within a character of several
        bytes that begins with text of the prompt.
        """
        tokens = choice.token_ids or []
        ended = choice.finish_reason == "length" or (tokens and tokens[-1] in self.stop_tokens)
        return bool(stop) and not ended and not holds_stop(self.tokenizer, tokens, stop)

    def _scores(self, choice: Choice) -> list[float]:
        """Log-probability of each sampled token."""
        if choice.logprobs is None or len(choice.logprobs.token_logprobs) != len(choice.token_ids or []):
            raise self._lacks("the log-probabilities of sampled tokens (logprobs)")
        return choice.logprobs.token_logprobs

    def _prompt_scores(self, ids: list[int], choice: Choice) -> list[float]:
        """Log-probability of each token of a prompt but the first."""
        try:
            scored = (choice.prompt_logprobs or [])[1:]
            return [(scores or {})[token].logprob for token, scores in zip(ids[1:], scored, strict=True)]
        except (KeyError, ValueError):
            raise self._lacks("the log-probabilities of prompts (prompt_logprobs)") from None

    def _followers(self, tokens: list[int], choice: Choice) -> list[float]:
        """Log-probabilities of given tokens at the place of the first sampled one."""
        scores = choice.logprobs.top_logprobs[0] if choice.logprobs and choice.logprobs.top_logprobs else {}
        try:
            return [scores[f"token_id:{token}"] for token in tokens]
        except KeyError:
            raise self._lacks("the log-probabilities of given tokens (logprob_token_ids)") from None

    def _lacks(self, what: str) -> UserError:
        return UserError(
            f"{self.address} does not return {what}, without which answers cannot be measured; use a server of vLLM "
            "0.31 (`vllm serve`)."
        )
