"""What tests/inference/test_vllm_engine.py runs in a process of its own: ``python -m tests.inference.vllm_program``.

vLLM replaces functions of torch and warns, so the tests' process stays clean. One started engine serves all questions
of a family; what was found is printed as one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlheals.stages.common import quiet_environment

quiet_environment(1)

import torch  # noqa: E402

from rlheals.errors import UserError  # noqa: E402
from rlheals.inference import Sampling  # noqa: E402
from rlheals.inference.fingerprint import fingerprint, gap  # noqa: E402
from rlheals.inference.live import serve  # noqa: E402
from rlheals.inference.transformers_engine import TransformersEngine  # noqa: E402
from rlheals.inference.vllm import VllmSettings  # noqa: E402
from rlheals.inference.vllm import engine as engine_module  # noqa: E402
from rlheals.inference.vllm import weights as weights_module  # noqa: E402
from rlheals.inference.vllm.engine import VllmEngine  # noqa: E402
from rlheals.models.checkpoint import load_model, load_state, load_tokenizer  # noqa: E402
from rlheals.restoration.checksum import checksum  # noqa: E402
from rlheals.restoration.served import ServedModel  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlheals.inference import Answer

DOWN, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
SLIGHT = 1e-4
"""Relative change of one matrix that moves the sentinels by less than `ROUNDING`."""
ASKED = {
    "greedy": Sampling(16, logprobs=True),
    "penalised": Sampling(16, repetition_penalty=1.3),
    "one token": Sampling(1),
}


def prompts(count: int, vocabulary: int, longest: int = 220) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randint(3, longest))] for _ in range(count)]


def differences(one: Sequence[Answer], other: Sequence[Answer]) -> dict[str, Any]:
    pairs = list(zip(one, other, strict=True))
    scores = [(a, b) for x, y in pairs for a, b in zip(x.logprobs or [], y.logprobs or [], strict=True)]
    return {
        "differ": sum((x.token_ids, x.text, x.finished) != (y.token_ids, y.text, y.finished) for x, y in pairs),
        "logprobs": max((abs(a - b) for a, b in scores), default=0.0),
        "scores": len(scores),
        "finished": sum(x.finished for x in one),
    }


def told(action: Callable[[], object]) -> str:
    """The sentence of the `UserError` that ``action`` ends with; empty when it does not."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def equality(vllm: VllmEngine, plain: TransformersEngine, asked: list[list[int]]) -> dict[str, Any]:
    """Both engines on the same prompts."""
    found = {name: differences(vllm.generate(asked, s), plain.generate(asked, s)) for name, s in ASKED.items()}
    texts = [answer.text for answer in plain.generate(asked, ASKED["greedy"])]
    stop = sorted({text[len(text) // 2 :][:3] for text in texts if len(text) > 4})[:3]
    stopped = Sampling(16, logprobs=True, stop=tuple(stop))
    found["stopped"] = differences(vllm.generate(asked, stopped), plain.generate(asked, stopped))
    cut = vllm.generate(asked, stopped)
    found["cut"] = sum(
        a.token_ids != b.token_ids for a, b in zip(cut, vllm.generate(asked, ASKED["greedy"]), strict=True)
    )
    found["stops in texts"] = sum(each in answer.text for answer in cut for each in stop)
    return found


def batches(vllm: VllmEngine, asked: list[list[int]]) -> dict[str, Any]:
    """The same prompts alone, among others, and in another order; sampled ones too."""
    whole = vllm.generate(asked, ASKED["greedy"])
    alone = [vllm.generate([prompt], ASKED["greedy"])[0] for prompt in asked[:6]]
    backwards = vllm.generate(asked[::-1], ASKED["greedy"])[::-1]
    sampled = Sampling(12, temperature=1.0, top_p=0.9, top_k=40, seed=3)
    drawn = tokens(vllm.generate(asked, sampled))
    return {
        "alone": differences(whole[:6], alone),
        "backwards": differences(whole, backwards),
        "sampled alike": drawn == tokens(vllm.generate(asked, sampled)),
        "sampled among fewer": drawn[:5] == tokens(vllm.generate(asked[:5], sampled)),
        "another seed": drawn != tokens(vllm.generate(asked, Sampling(12, temperature=1.0, seed=4))),
    }


def swaps(
    vllm: VllmEngine, plain: TransformersEngine, folders: Sequence[Path], asked: list[list[int]]
) -> dict[str, Any]:
    """To the second model and back."""
    first, second = (load_model(folder) for folder in folders)
    before = tokens(vllm.generate(asked, ASKED["greedy"]))
    kept = vllm.fingerprint()
    serve(vllm, second, "the second")
    plain.swap(load_state(folders[1]))
    found = {
        "second": differences(vllm.generate(asked, ASKED["greedy"]), plain.generate(asked, ASKED["greedy"])),
        "gap": gap(vllm.fingerprint(), fingerprint(second)),
        "moved": gap(vllm.fingerprint(), kept),
    }
    serve(vllm, first, "the first")
    plain.swap(load_state(folders[0]))
    found["back"] = tokens(vllm.generate(asked, ASKED["greedy"])) == before
    found["fingerprint back"] = vllm.fingerprint() == kept
    return found


def traps(vllm: VllmEngine, folders: Sequence[Path]) -> dict[str, Any]:
    """Each way to answer with old weights in silence, done on purpose."""
    first, second = (load_model(folder) for folder in folders)
    serve(vllm, first, "the first")
    state = load_state(folders[1])
    found: dict[str, Any] = {}
    found["missing tensor"] = told(lambda: vllm.swap({n: t for n, t in state.items() if n != QUERY}))
    found["other shape"] = told(lambda: vllm.swap({**state, DOWN: torch.zeros(3, 3)}))
    serve(vllm, first, "the first, untouched by refused states")

    llm, reset = vllm._llm, vllm._llm.reset_prefix_cache
    llm.reset_prefix_cache = lambda *_, **__: True
    found["warm cache"] = told(lambda: serve(vllm, second, "the second"))
    llm.reset_prefix_cache = reset
    serve(vllm, first, "the first")

    # One part of a fused layer, past the check that refuses it.
    edited = load_model(folders[0])
    edited.state_dict()[QUERY].mul_(1.5)
    push = engine_module.push_weights
    engine_module.push_weights = lambda llm, state, *rest: push(llm, {QUERY: state[QUERY]}, *rest)
    found["part of a fused layer"] = told(lambda: serve(vllm, edited, "an edited model"))
    engine_module.push_weights = push
    proof = serve(vllm, first, "the first")

    slight = load_model(folders[0])
    slight.state_dict()[DOWN].mul_(1.0 + SLIGHT)
    engine_module.push_weights = lambda *_: None
    found["a slight edit, unnoticed by the gap"] = told(lambda: serve(vllm, slight, "a slight edit"))
    found["a slight edit that did not arrive"] = told(lambda: serve(vllm, slight, "a slight edit", before=proof))
    engine_module.push_weights = push
    proof = serve(vllm, slight, "a slight edit", before=proof)
    proof = serve(vllm, slight, "the same again", before=proof)
    serve(vllm, first, "the first", before=proof)

    # As files hold it: the head of a tied model is not stored, and vLLM goes on with the one it packed.
    pack = weights_module._pack_head
    weights_module._pack_head = lambda model: None
    vllm.swap(state)
    found["unpacked tied head"] = gap(vllm.fingerprint(), fingerprint(second))
    weights_module._pack_head = pack
    vllm.swap(state)
    found["packed tied head"] = gap(vllm.fingerprint(), fingerprint(second))
    return found


def cells(vllm: VllmEngine, plain: TransformersEngine, folder: Path, asked: list[list[int]]) -> dict[str, Any]:
    """Edits through `ServedModel`, 20 times."""
    state, model = load_state(folder), load_model(folder)
    live = ServedModel(vllm, state, model)
    before, kept = tokens(vllm.generate(asked, ASKED["greedy"])), vllm.fingerprint()
    names = [name for name in state if "layers" in name]
    torch.manual_seed(0)
    equal, moved = 0, 0
    for cycle in range(20):
        changes = {name: state[name] + 0.2 * torch.randn(state[name].shape) for name in names[cycle % 5 :: 5]}
        with live.edited(changes):
            if cycle % 5 == 0:
                plain.swap({**state, **changes})
                answered = tokens(vllm.generate(asked, ASKED["greedy"]))
                equal += answered == tokens(plain.generate(asked, ASKED["greedy"]))
                moved += answered != before
    live.settle()
    plain.swap(state)
    return {
        "equal": equal,
        "moved": moved,
        "back": tokens(vllm.generate(asked, ASKED["greedy"])) == before,
        "fingerprint": vllm.fingerprint() == kept,
        "copy": all(
            checksum(tensor) == checksum(state[name]) for name, tensor in model.state_dict().items() if name in state
        ),
    }


def later_turns(vllm: VllmEngine, asked: list[list[int]]) -> dict[str, Any]:
    """Cached tokens of a second turn, which begins as the first did, and of the same after a swap."""
    first = max(asked, key=len)
    told = vllm.generate([first], ASKED["greedy"])[0].token_ids
    request = [{"prompt_token_ids": [*first, *told, 5, 6, 7]}]
    one = vllm._asked(0, len(request[0]["prompt_token_ids"]), ASKED["one token"])
    cached = vllm._llm.generate(request, one, use_tqdm=False)[0].num_cached_tokens
    vllm.swap(vllm._state or {})
    again = vllm._llm.generate(request, one, use_tqdm=False)[0].num_cached_tokens
    return {"length": len(first), "cached": cached, "after a swap": again}


def many_seeds(vllm: VllmEngine, vocabulary: int) -> dict[str, Any]:
    """More seeded prompt tokens than one prefill takes: under chunked prefill this kills the engine."""
    asked = [prompt * 3 for prompt in prompts(120, vocabulary)]
    sampled = Sampling(2, temperature=1.0, seed=1)
    drawn = tokens(vllm.generate(asked, sampled))
    return {
        "tokens": sum(map(len, asked)),
        "alike": drawn == tokens(vllm.generate(asked, sampled)),
        "restarts": vllm.restarts,
    }


def deaths(vllm: VllmEngine, folders: Sequence[Path], asked: list[list[int]]) -> dict[str, Any]:
    """An engine that dies once is started again with the weights it had, one that dies again is told."""
    serve(vllm, load_model(folders[1]), "the second")
    before = tokens(vllm.generate(asked, ASKED["greedy"]))

    def die(*_: Any, **__: Any) -> None:
        raise RuntimeError("CPU Generator does not use offset\nand a long dump of the batch")

    vllm._llm.generate = die
    after = tokens(vllm.generate(asked, ASKED["greedy"]))
    restarts = vllm.restarts
    vllm._llm.generate = die
    return {
        "alike": before == after,
        "restarts": restarts,
        "again": told(lambda: vllm.generate(asked, ASKED["greedy"])),
        "closed": told(lambda: vllm.generate(asked, ASKED["greedy"])),
    }


def neighbours(vllm: VllmEngine, folders: Sequence[Path], asked: list[list[int]]) -> dict[str, Any]:
    """A second engine is asked for beside the first; what the first says then."""
    before = tokens(vllm.generate(asked, ASKED["greedy"]))
    said = told(lambda: VllmEngine(folders[1], vllm.tokenizer, vllm.settings))
    return {"told": said, "alike": tokens(vllm.generate(asked, ASKED["greedy"])) == before, "restarts": vllm.restarts}


def refusals(root: Path) -> dict[str, str]:
    """Models that vLLM cannot serve."""
    from tests.common import make_folder

    small = make_folder(root / "small", "llama")  # heads of size 16
    tokenizer = load_tokenizer(small)
    found = {"head size": told(lambda: VllmEngine(small, tokenizer, VllmSettings()))}
    fine = make_folder(root / "fine", "llama", num_attention_heads=2)
    config = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    found["architecture"] = told(lambda: VllmEngine(fine, tokenizer, VllmSettings()))
    return found


def report(family: str, folders: Sequence[Path]) -> dict[str, Any]:
    tokenizer = load_tokenizer(folders[0])
    vocabulary = len(tokenizer)
    threads, state = torch.set_num_threads, torch.get_rng_state()
    vllm = VllmEngine(folders[0], tokenizer, VllmSettings(max_sequences=64, memory_fraction=0.05))
    unmarked = torch.set_num_threads is threads and torch.equal(torch.get_rng_state(), state)
    plain = TransformersEngine(load_model(folders[0]), tokenizer, 64)
    asked = prompts(24, vocabulary)
    found = {
        "unmarked": unmarked,
        "dtype": str(vllm._llm.llm_engine.model_config.dtype),
        "equality": equality(vllm, plain, asked),
        "batches": batches(vllm, asked),
        "swaps": swaps(vllm, plain, folders, asked),
        "traps": traps(vllm, folders),
        "cells": cells(vllm, plain, folders[0], asked[:8]),
        "later turns": later_turns(vllm, asked),
        "too long": told(lambda: vllm.generate([[5] * vllm.context], Sampling(4))),
        "empty": told(lambda: vllm.generate([[]], Sampling(4))),
        "foreign": told(lambda: vllm.generate([[vocabulary]], Sampling(4))),
        "nothing": vllm.generate([], Sampling(4)),
    }
    if family == "llama":
        found["seeds"] = many_seeds(vllm, vocabulary)
        found["neighbours"] = neighbours(vllm, folders, asked)
        found["deaths"] = deaths(vllm, folders, asked)
    vllm.close()
    return found


def main(root: Path) -> None:
    from tests.common import make_folder

    found: dict[str, Any] = {}
    for family in ("llama", "qwen2"):
        shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
        folders = [make_folder(root / f"{family}{seed}", family, seed, **shape) for seed in (0, 1)]
        found[family] = report(family, folders)
    found["refusals"] = refusals(root)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
