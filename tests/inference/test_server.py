"""`ServerEngine` against a scripted server: the protocol, and every way in which a server can fail."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from rlheals.errors import UserError
from rlheals.inference import Sampling
from rlheals.inference.fingerprint import LONG
from rlheals.inference.seeds import counter_seed
from rlheals.inference.server import ServerEngine, client
from rlheals.inference.server.address import address_of
from rlheals.models.checkpoint import load_tokenizer
from tests.common import make_folder
from tests.fake_server import DROP, Fake, Reply, answer, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "sk-secret-of-mine"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.01, 0.02))
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "checkpoint-20")


@pytest.fixture
def start() -> Iterator[Any]:
    with running() as begin:
        yield begin


def engine(fake: Fake | str, folder: Path, max_sequences: int = 4) -> ServerEngine:
    built = ServerEngine(fake if isinstance(fake, str) else fake.url, folder, load_tokenizer(folder), max_sequences)
    built.stop_tokens = {3, 4}
    return built


def completions(fake: Fake) -> list[dict[str, Any]]:
    return [body for path, body, _ in fake.seen if path == "/v1/completions"]


def failing_first(times: int, failure: Any) -> Reply:
    return lambda fake, path, body: failure if len(completions(fake)) <= times else answer(body)


# --- the protocol


def test_answers_come_in_order_and_no_more_are_asked_at_a_time_than_allowed(start: Any, folder: Path) -> None:
    def slow(fake: Fake, path: str, body: Any) -> Any:
        time.sleep(0.01 * (body["prompt"][-1] % 4))
        return answer(body)

    fake = start(slow)
    answers = engine(fake, folder, 5).generate([[9, 20 + row] for row in range(40)], Sampling(3, logprobs=True))
    assert [each.token_ids for each in answers] == [[21 + row, 22 + row, 23 + row] for row in range(40)]
    assert answers[7].logprobs == [-28.0, -29.0, -30.0]
    assert answers[7].text == load_tokenizer(folder).decode([28, 29, 30])
    assert 1 < fake.busiest <= 5


def test_what_is_asked_leaves_nothing_to_the_server(start: Any, folder: Path) -> None:
    fake = start()
    sampling = Sampling(3, temperature=0.7, top_p=0.9, top_k=5, seed=11, repetition_penalty=1.2, stop=("}",))
    built = engine(fake, folder)
    built.generate([[30], [31]], sampling)
    first, second = sorted(completions(fake), key=lambda body: body["prompt"])
    assert (first["seed"], second["seed"]) == (counter_seed(11, 0), counter_seed(11, 1))
    del first["seed"]
    assert first == {
        "model": "served",
        "prompt": [30],
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.2,
        "logprobs": None,
        "stop": ["}"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    built.generate([[30]], Sampling(3, top_p=0.9, top_k=5))
    greedy = completions(fake)[-1]
    assert [greedy[name] for name in ("temperature", "top_p", "top_k", "seed")] == [0.0, 1.0, 0, None]


def test_end_tokens_and_the_end_of_the_context(start: Any, folder: Path) -> None:
    def ends(fake: Fake, path: str, body: Any) -> Any:
        return answer(body, token_ids=[50, 3], finish_reason="stop") if body["prompt"] == [9] else answer(body)

    built = engine(start(ends), folder)
    first, last = built.generate([[9], [5] * 1022], Sampling(4))
    assert (first.token_ids, first.finished) == ([50], True)
    assert (last.token_ids, last.finished) == ([6, 7], False)
    assert built.generate([], Sampling(4)) == []
    with pytest.raises(UserError, match="prompt 0 is empty"):
        built.generate([[]], Sampling(1))
    with pytest.raises(UserError, match=r"prompt 0 has 1024 tokens, .* context of 1024"):
        built.generate([[5] * 1024], Sampling(1))


def test_works_beside_an_event_loop(start: Any, folder: Path) -> None:
    built = engine(start(), folder)

    async def notebook() -> Any:
        return built.generate([[30]], Sampling(2))

    assert asyncio.run(notebook())[0].token_ids == [31, 32]


def test_swap_is_refused(start: Any, folder: Path) -> None:
    built = engine(start(), folder)
    assert not built.capabilities.swap
    with pytest.raises(UserError, match=r"cannot be given other weights; .* use an engine that can swap"):
        built.swap({})


# --- address, key and model


@pytest.mark.parametrize(
    ("text", "url", "loopback"),
    [
        ("http://host:8000", "http://host:8000/v1", False),
        ("http://host:8000/", "http://host:8000/v1", False),
        ("http://host:8000/v1/", "http://host:8000/v1", False),
        ("https://host/team/llm", "https://host/team/llm/v1", False),
        ("https://host/api/v3", "https://host/api/v3", False),
        ("http://localhost:1", "http://localhost:1/v1", True),
        ("http://127.9.9.9", "http://127.9.9.9/v1", True),
        ("http://[::1]:8000", "http://[::1]:8000/v1", True),
        ("http://localhost.example.org", "http://localhost.example.org/v1", False),
    ],
)
def test_addresses(text: str, url: str, loopback: bool) -> None:
    assert (address_of(text).url, address_of(text).loopback) == (url, loopback)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://", "not an http or https address"),
        ("ftp://host", "not an http or https address"),
        ("http://host:port", "is no web address with a host"),
        ("http://host:99999", "not an http or https address"),
        (f"http://me:{SECRET}/x@host", "is no web address with a host"),
        (f"http://me:{SECRET}@host", "give the key in the environment variable"),
        (f"http://host/v1?key={SECRET}", "give the key in the environment variable"),
    ],
)
def test_bad_addresses(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as told:
        address_of(text)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_the_key_is_sent_and_never_told(start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    fake = start(lambda fake, path, body: (status, {}, {"error": {"message": f"bad key {SECRET}"}}))
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    with pytest.raises(UserError) as told:
        engine(fake, folder).generate([[30]], Sampling(1))
    assert fake.seen[0][2]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(told.value) + repr(address_of(fake.url))
    assert str(status) in str(told.value) or status == 404
    monkeypatch.setenv("VLLM_API_KEY", "other")
    assert address_of(fake.url).key == "other"
    monkeypatch.setenv("VLLM_API_KEY", f"{SECRET}\nx")
    with pytest.raises(UserError, match="VLLM_API_KEY holds blanks") as told:
        address_of(fake.url)
    assert SECRET not in str(told.value)


def test_a_key_that_the_server_repeats_is_never_told(start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    fake = start(lambda fake, path, body: answer(body, finish_reason=f"for {SECRET}\n{'x' * 999}"))
    built = engine(fake, folder)
    odd = start(lambda fake, path, body: answer(body, logprobs={"token_logprobs": [], "top_logprobs": [{SECRET: "x"}]}))
    others = start()
    others.models = {"data": [{"id": f"one for {SECRET}"}, {"id": "y" * 999}]}
    for action, expected in (
        (lambda: built.generate([[30]], Sampling(1)), r"broke an answer off \(for \*\*\* x"),
        (lambda: engine(odd, folder).generate([[30]], Sampling(1)), r"top_logprobs.0.\*\*\*: "),
        (lambda: engine(others, folder), r"serves one for \*\*\*, y"),
    ):
        with pytest.raises(UserError, match=expected) as told:
            action()
        assert SECRET not in str(told.value)
        assert len(str(told.value)) < 1000
        assert "\n" not in str(told.value)


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HTTP_PROXY", f"ftp://me:{SECRET}@proxy:1", "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"),
        ("ALL_PROXY", "socks5://127.0.0.1:1080", "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY"),
        ("HTTP_PROXY", "http://proxy:notaport", "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY"),
        ("SSL_CERT_FILE", "/nope.pem", r"\(No such file or directory\); check SSL_CERT_FILE, SSL_CERT_DIR"),
    ],
)
def test_a_bad_environment_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    for other in (*PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^http://203.0.113.1:9/v1 cannot be asked: .*{expected}") as told:
        engine("http://203.0.113.1:9", folder)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([{"id": "any"}], "any"),
        ([{"id": "any"}, {"id": "adapter", "parent": "any"}], "any"),
        ([{"id": "one", "root": "x"}, {"id": "two", "root": "x"}], "one"),
        ([{"id": "one"}, {"id": "checkpoint-20"}], "checkpoint-20"),
        ([{"id": "one", "root": "m/checkpoint-2"}, {"id": "two", "root": "m/checkpoint-20/"}], "two"),
        ([{"id": "one", "root": "FOLDER"}, {"id": "two", "root": "m/checkpoint-20"}], "one"),
    ],
)
def test_which_model(start: Any, folder: Path, cards: list[dict[str, str]], expected: str) -> None:
    fake = start()
    fake.models = {
        "data": [{key: value.replace("FOLDER", str(folder)) for key, value in each.items()} for each in cards]
    }
    assert engine(fake, folder).model == expected


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["one", "two"], "serves one, two, and which .* --served-model-name checkpoint-20"),
        (["a/checkpoint-20", "b/checkpoint-20"], "serves a/checkpoint-20, b/checkpoint-20, and"),
        ([], "serves no model"),
    ],
)
def test_models_that_cannot_be_told_apart_are_listed(start: Any, folder: Path, names: list[str], told: str) -> None:
    fake = start()
    fake.models = {"data": [{"id": name} for name in names]}
    with pytest.raises(UserError, match=told):
        engine(fake, folder)


def test_a_context_that_is_too_short_is_told_before_anything_is_asked(start: Any, folder: Path) -> None:
    fake = start()
    fake.models["data"][0]["max_model_len"] = 100
    built = engine(fake, folder)
    built.generate([[5] * 90], Sampling(10))
    asked = len(fake.seen)
    with pytest.raises(UserError, match=r"conversations of 100 tokens .* needs 101; .* --max-model-len 1024"):
        built.generate([[5], [5] * 91], Sampling(10))
    assert len(fake.seen) == asked
    fake.models["data"][0]["max_model_len"] = LONG - 1
    with pytest.raises(UserError, match=f"needs {LONG + 1}"):
        engine(fake, folder).fingerprint()


# --- failures


@pytest.mark.parametrize("failure", [(503, {}, b""), (429, {}, {"error": "slow down"}), DROP])
def test_passing_failures_are_asked_again(start: Any, folder: Path, failure: Any) -> None:
    fake = start(failing_first(2, failure))
    assert engine(fake, folder).generate([[30]], Sampling(2))[0].token_ids == [31, 32]
    assert len(completions(fake)) == 3


PAGE = (200, {"Content-Type": "text/html"}, b"<html>Welcome</html>")


@pytest.mark.parametrize(
    ("reply", "expected", "tries"),
    [
        (
            (500, {}, {"error": {"message": "EngineDeadError"}}),
            r"failed 3 times, .* 500 \(EngineDeadError\); look at",
            3,
        ),
        ((502, {"Content-Type": "text/html"}, b"<html>"), r"502 \(nothing said\)", 3),
        (DROP, "broke off in the middle of an answer .*; check that it runs", 3),
        ((401, {}, b""), r"refuses a request without a key \(401\); set VLLM_API_KEY or OPENAI_API_KEY", 1),
        ((404, {}, {"error": {"message": "no model x"}}), r"has no /completions \(no model x\); .* usually http", 1),
        ((400, {}, {"message": "unknown field return_token_ids"}), r"400: unknown field .*server of vLLM", 1),
        ((422, {}, {"detail": [1]}), r"422: \{.*server of vLLM", 1),
        ((200, {}, b"\xff{"), "answers with something else than the OpenAI protocol", 1),
        (PAGE, "answers with something else than the OpenAI protocol", 1),
        ({"choices": []}, r"something else .* \(choices: ", 1),
        ({"choices": [{"token_ids": [-1]}]}, r"something else .* \(choices.0.token_ids.0: ", 1),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, b""), "sends elsewhere .*127.0.0.1:9.* not followed", 1),
    ],
)
def test_every_failure_is_one_sentence(start: Any, folder: Path, reply: Any, expected: str, tries: int) -> None:
    fake = start(lambda *_: reply)
    with pytest.raises(UserError, match=expected) as told:
        engine(fake, folder).generate([[30]], Sampling(2))
    assert str(told.value).startswith(fake.url)
    assert len(completions(fake)) == tries


def test_a_server_without_token_ids_is_refused_at_the_first_answer(start: Any, folder: Path) -> None:
    fake = start(lambda fake, path, body: answer(body, token_ids=None))
    with pytest.raises(UserError, match=r"does not return the ids of sampled tokens .* server of vLLM"):
        engine(fake, folder, 2).generate([[30]] * 50, Sampling(2))
    assert len(completions(fake)) < 50


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"token_ids": [31]}, r"after 1 of 3 tokens .* --generation-config vllm"),
        ({"token_ids": [31, 32], "finish_reason": "stop"}, "after 2 of 3 tokens for a reason of its own"),
        ({"token_ids": [31, 32, 33, 34]}, "after 4 of 3 tokens"),
        ({"token_ids": [31], "finish_reason": "abort"}, r"broke an answer off \(abort\)"),
        ({"prompt_token_ids": [0, 30]}, "answers another prompt"),
        ({"logprobs": None}, r"does not return the log-probabilities of sampled tokens"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "does not return the log-probabilities of sampled tokens"),
    ],
)
def test_answers_that_are_not_what_was_asked(start: Any, folder: Path, change: Any, expected: str) -> None:
    fake = start(lambda fake, path, body: answer(body, **change))
    with pytest.raises(UserError, match=expected):
        engine(fake, folder).generate([[30]], Sampling(3, logprobs=True))


def test_a_stop_string_explains_a_short_answer(start: Any, folder: Path) -> None:
    fake = start(lambda fake, path, body: answer(body, token_ids=[31], finish_reason="stop"))
    stop = load_tokenizer(folder).decode([31])
    assert engine(fake, folder).generate([[30]], Sampling(3, stop=(stop,)))[0].token_ids == [31]


def test_a_stop_string_that_is_not_in_the_answer_does_not_cut_it(start: Any, folder: Path) -> None:
    def early(fake: Fake, path: str, body: Any) -> Any:
        stops = body["stop"] and body["prompt"] == [30]
        return answer(body, token_ids=[31], finish_reason="stop") if stops else answer(body)

    fake = start(early)
    answers = engine(fake, folder).generate([[40], [30]], Sampling(3, stop=("no such",)))
    assert [each.token_ids for each in answers] == [[41, 42, 43], [31, 32, 33]]
    assert len(completions(fake)) == 3


def test_a_fingerprint_needs_log_probabilities_of_prompts_and_of_given_tokens(start: Any, folder: Path) -> None:
    def scores(body: dict[str, Any]) -> dict[str, Any]:
        prompt = [None, *({str(token): {"logprob": -1.0}} for token in body["prompt"][1:])]
        return {"prompt_logprobs": prompt, "logprobs": None}

    fake = start(lambda fake, path, body: answer({"logprobs": None, **body}))
    with pytest.raises(UserError, match=r"log-probabilities of prompts \(prompt_logprobs\)"):
        engine(fake, folder).fingerprint()
    fake = start(lambda fake, path, body: answer({"logprobs": None, **body}, **scores(body)))
    with pytest.raises(UserError, match=r"log-probabilities of given tokens \(logprob_token_ids\)"):
        engine(fake, folder).fingerprint()


def test_weights_that_change_after_they_were_checked_are_noticed(start: Any, folder: Path) -> None:
    served = [-1.0]

    def scores(fake: Fake, path: str, body: Any) -> Any:
        prompt = [None, *({str(token): {"logprob": served[0]}} for token in body["prompt"][1:])]
        others = {f"token_id:{token}": served[0] for token in body.get("logprob_token_ids", [])}
        return answer(
            {"logprobs": None, **body},
            prompt_logprobs=prompt,
            logprobs={"token_logprobs": [], "top_logprobs": [others]},
        )

    built = engine(start(scores), folder)
    assert set(built.fingerprint()) == {-1.0}
    built.generate([[30]], Sampling(2))
    served[0] = -1.2
    with pytest.raises(UserError, match=r"has other weights than it had before .* moved by 0.2"):
        built.generate([[30]], Sampling(2))


def test_no_server_and_no_host(start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=rf"^{address} cannot be reached: the connection is refused .*; check that"):
            engine(address, folder)

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be reached: the name of its host is not known"):
        engine("http://rlheals.invalid:8000", folder)


def test_https_to_a_server_without_it(start: Any, folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached over https"):
        engine(start().url.replace("http", "https"), folder)


def test_a_server_that_hangs(start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start(lambda fake, path, body: time.sleep(0.5))
    built = engine(fake, folder)
    monkeypatch.setattr(client, "READ", 0.1)
    with pytest.raises(UserError, match=r"did not answer within 0.1 s; lower inference.max_sequences"):
        built.generate([[30]], Sampling(2))
    assert len(completions(fake)) == 1


def test_nothing_is_sent_to_the_target_of_a_redirect_or_to_a_proxy(
    start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = start()
    fake = start(lambda fake, path, body: (307, {"Location": f"{other.url}/completions"}, b""))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url.removesuffix("/v1"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    built = engine(fake, folder)
    with pytest.raises(UserError, match="not followed"):
        built.generate([[30]], Sampling(2))
    assert other.seen == []
    with pytest.raises(UserError):  # for other hosts the environment's proxy is what the network asks for
        engine("http://rlheals.invalid", folder)
    assert other.seen
