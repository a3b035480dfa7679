"""A small HTTP server that speaks the completions protocol with vLLM's extensions, scripted or with a real model."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Reply = Callable[["Fake", str, Any], Any]
"""From server, path and JSON body to the reply: content, or status, headers and content."""
DROP = object()
"""A reply that is a connection cut after half of an answer."""


def answer(body: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A reply as vLLM makes it: the response counts up from the prompt's last token, with log-probability -token."""
    tokens = [body["prompt"][-1] + place + 1 for place in range(body["max_tokens"])]
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "prompt_token_ids": body["prompt"],
        "token_ids": tokens,
        "logprobs": {"token_logprobs": [-float(token) for token in tokens]} if body["logprobs"] is not None else None,
    }
    return {"id": "x", "choices": [choice | change], "usage": {}}


class Fake(ThreadingHTTPServer):
    """A server whose answers are what ``reply`` says; ``seen`` are the requests it got."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply or (lambda fake, path, body: answer(body))
        self.models: Any = {"data": [{"id": "served", "root": "served", "max_model_len": 1024}]}
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.lock, self.busy, self.busiest = threading.Lock(), 0, 0
        self.model = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        fake = self.server
        with fake.lock:
            fake.seen.append((self.path, body, dict(self.headers)))
            fake.busy += 1
            fake.busiest = max(fake.busiest, fake.busy)
        try:
            content = fake.models if self.path == "/v1/models" else fake.reply(fake, self.path, body)
        finally:
            with fake.lock:
                fake.busy -= 1
        status, headers, content = content if isinstance(content, tuple) else (200, {}, content)
        data = content if isinstance(content, bytes) else json.dumps(None if content is DROP else content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + 9 * (content is DROP)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = content is DROP

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def running() -> Iterator[Callable[..., Fake]]:
    """What starts servers, each stopped at the end."""
    started: list[Fake] = []

    def begin(reply: Reply | None = None) -> Fake:
        started.append(Fake(reply))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1]

    try:
        yield begin
    finally:
        for fake in started:
            fake.shutdown()
            fake.server_close()


def serving(folder: Path) -> Reply:
    """The replies of a server that holds the model of a folder: greedy answers and log-probabilities."""
    import torch

    from rlheals.inference import Sampling
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer

    engine = TransformersEngine(load_model(folder), load_tokenizer(folder), 1)

    def reply(fake: Fake, path: str, body: Any) -> Any:
        prompt = body["prompt"]
        with fake.model, torch.inference_mode():
            logits = engine.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            (given,) = engine.generate([prompt], Sampling(body["max_tokens"]))
        own = [None, *({str(token): {"logprob": float(logits[row, token])}} for row, token in enumerate(prompt[1:]))]
        others = {f"token_id:{token}": float(logits[-1, token]) for token in body.get("logprob_token_ids", [])}
        return answer(
            {"logprobs": None, **body},
            token_ids=given.token_ids + [engine.tokenizer.eos_token_id] * given.finished,
            finish_reason="stop" if given.finished else "length",
            prompt_logprobs=own,
            logprobs={"token_logprobs": [], "top_logprobs": [others]} if others else None,
        )

    return reply
