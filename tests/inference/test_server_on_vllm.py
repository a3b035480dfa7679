"""`ServerEngine` against a real ``vllm serve`` on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from rlheals import cli
from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.live import serve
from rlheals.inference.server import ServerEngine
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.reporting.schemas import read_table
from tests.common import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# Heads of 32: the CPU attention takes no smaller ones.
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
OPTIONS = (
    "--dtype=float32",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--max-num-batched-tokens=16384",
    "--max-num-seqs=32",
    f"--kv-cache-memory-bytes={64 << 20}",
)
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
START = 300
"""Seconds a busy machine may take to start the server."""


class Running:
    """A server, its address and the folder it serves."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.address, self.log = folder, f"http://127.0.0.1:{port}", log
        # The command `vllm serve` of the CPU build does not start: it looks for a distribution of another name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", *OPTIONS]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--host=127.0.0.1", f"--port={port}"],
                env=os.environ | VARIABLES,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.address}/health", trust_env=False).is_success:
                    return
            time.sleep(0.5)
        pytest.fail(f"the server did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End the server and its workers, which are in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self) -> ServerEngine:
        built = ServerEngine(self.address, self.folder, load_tokenizer(self.folder), 32)
        built.stop_tokens |= ENDS
        return built


ENDS = set(range(30, 42))
"""A random model hardly ever ends a response; a dozen end tokens make rows finish at different times."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("served")
    folder = make_folder(root / "checkpoint-7", **SHAPE)
    # A generation config that would shape answers, were anything left to the server.
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(config))
    running = Running(folder, root / "log")
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def here(server: Running) -> TransformersEngine:
    built = TransformersEngine(load_model(server.folder), load_tokenizer(server.folder), 32)
    built.stop_tokens |= ENDS
    return built


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, 300) for _ in range(draw.randint(1, 200))] for _ in range(count)]


def test_greedy_answers_equal_those_of_transformers(server: Running, here: TransformersEngine) -> None:
    asked = [*prompts(64), [5] * 2040]
    found, expected = (each.generate(asked, Sampling(24, logprobs=True)) for each in (server.engine(), here))
    assert len({answer.finished for answer in expected}) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.text, one.finished) == (other.token_ids, other.text, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_penalties_and_stop_strings_equal_those_of_transformers(server: Running, here: TransformersEngine) -> None:
    plain = here.generate(prompts(32), Sampling(24))
    stop = tuple(answer.text[4:6] for answer in plain if len(answer.text) > 10)[:3]
    assert all(stop)
    for sampling in (Sampling(24, repetition_penalty=1.3), Sampling(24, stop=stop)):
        expected = here.generate(prompts(32), sampling)
        assert expected != plain
        assert server.engine().generate(prompts(32), sampling) == expected


def test_seeds_repeat_and_rows_differ(server: Running) -> None:
    built = server.engine()
    asked = [prompts(1)[0]] * 16
    first, again, other = (
        built.generate(asked, Sampling(12, temperature=1.0, top_p=0.95, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({tuple(answer.token_ids) for answer in first}) > 8
    # A row draws the same numbers whatever shares its batch.
    assert built.generate(asked[:3], Sampling(12, temperature=1.0, top_p=0.95, seed=0)) == first[:3]


def test_sampled_log_probabilities_are_the_models_own(server: Running, here: TransformersEngine) -> None:
    sampling = Sampling(8, temperature=1.7, top_k=9, repetition_penalty=1.2, seed=3, logprobs=True)
    for prompt, answer in zip(prompts(6), server.engine().generate(prompts(6), sampling), strict=True):
        assert answer.logprobs == pytest.approx(scored(here, prompt, answer), abs=1e-4)


def scored(here: TransformersEngine, prompt: list[int], answer: Any) -> list[float]:
    """Log-probability of each token of an answer by the model itself; that of an end token is taken as given."""
    import torch

    whole = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.inference_mode():
        rows = torch.log_softmax(here.model(whole).logits[0, len(prompt) - 1 :], -1)
    values = [float(rows[place, token]) for place, token in enumerate(answer.token_ids)]
    return [*values, *answer.logprobs[len(values) :]]


def test_the_fingerprint_proves_which_weights_are_served(server: Running, tmp_path: Path) -> None:
    built, model = server.engine(), load_model(server.folder)
    serve(built, model, "the folder")
    built.generate(prompts(8), Sampling(4))
    serve(built, model, "the folder")
    other = load_model(make_folder(tmp_path / "other", seed=1, **SHAPE))
    with pytest.raises(UserError, match=r"^server serves other weights than the other folder .* serve this folder"):
        serve(built, other, "the other folder")


def run_eval(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", *arguments, "--n", "2", "--attempts", "2", "--device", "cpu"])
    return int(stopped.value.code or 0)


def test_eval_measures_the_same_through_the_server(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in (server.address, "transformers"):
        assert run_eval(str(server.folder), "--engine", engine, "--output", str(tmp_path / engine[:4]), "--json") == 0
        assert json.loads(capsys.readouterr().out)["engine"] == engine
    found, expected = (read_table(tmp_path / name / "answers.parquet", "answers") for name in ("http", "tran"))
    assert set(found["engine"]) == {"server"}
    assert found.drop("engine").equals(expected.drop("engine"))


def test_eval_refuses_a_server_of_another_model(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(server.folder, tmp_path / "other")
    shutil.copy(make_folder(tmp_path / "donor", seed=1, **SHAPE) / "model.safetensors", other)
    monkeypatch.setattr(ServerEngine, "generate", lambda *_: pytest.fail("a hand was asked"))
    assert run_eval(str(other), "--engine", server.address, "--output", str(tmp_path / "out")) == 2
    assert f"serves other weights than {other}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_server_that_dies_in_the_middle_is_told(server: Running) -> None:
    """The last test: nothing answers after it."""
    built = server.engine()
    built.stop_tokens = set()
    killer = threading.Timer(1.0, server.kill)
    killer.start()
    sentence = rf"^{server.address}/v1 (cannot be reached|broke off|failed).* run the same"
    with pytest.raises(UserError, match=sentence):
        built.generate(prompts(64) * 20, Sampling(500))
    killer.join()
