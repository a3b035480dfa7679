"""The vLLM engine on tiny Llama (untied) and Qwen2 (tied) models; what it does is in `tests.inference.vllm_program`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "qwen2")
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the program found, and what it printed on the way."""
    command = [sys.executable, "-m", "tests.inference.vllm_program", str(tmp_path_factory.mktemp("vllm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(params=FAMILIES)
def found(request: pytest.FixtureRequest, run: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return run[0][request.param]


@pytest.fixture
def llama(run: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return run[0]["llama"]


def test_a_float32_model_is_served_in_float32(found: dict[str, Any]) -> None:
    """Left to itself vLLM would take bfloat16."""
    assert found["dtype"] == "torch.float32"


def test_answers_are_those_of_transformers(found: dict[str, Any]) -> None:
    equality = found["equality"]
    for name in ("greedy", "penalised", "one token", "stopped"):
        assert equality[name]["differ"] == 0, name
    assert equality["greedy"]["scores"] > 300
    assert equality["greedy"]["logprobs"] < 1e-4
    assert equality["stopped"]["logprobs"] < 1e-4
    assert equality["cut"] >= 3, "the stop strings did something"
    assert equality["stops in texts"] == 0


def test_answers_do_not_depend_on_what_is_asked_beside_them(found: dict[str, Any]) -> None:
    batches = found["batches"]
    for name in ("alone", "backwards"):
        assert batches[name]["differ"] == 0
        assert batches[name]["logprobs"] < 1e-5
    assert batches["sampled alike"]
    assert batches["sampled among fewer"]
    assert batches["another seed"]


def test_weights_are_swapped_and_swapped_back(found: dict[str, Any]) -> None:
    swaps = found["swaps"]
    assert swaps["second"]["differ"] == 0
    assert swaps["second"]["logprobs"] < 1e-4
    assert swaps["gap"] < 1e-5 < 0.1 < swaps["moved"]
    assert swaps["back"]
    assert swaps["fingerprint back"], "bit for bit"


def test_a_partial_or_foreign_state_is_refused_and_changes_nothing(found: dict[str, Any]) -> None:
    assert "self_attn.q_proj.weight missing" in found["traps"]["missing tensor"]
    assert "down_proj.weight has shape [3, 3]" in found["traps"]["other shape"]


def test_keys_and_values_of_old_weights_are_noticed(found: dict[str, Any]) -> None:
    """A prefix cache that was not emptied answers with the old model, without an error of vLLM."""
    assert "after swapping in the second" in found["traps"]["warm cache"]


def test_a_part_of_a_fused_layer_is_noticed(found: dict[str, Any]) -> None:
    """vLLM takes q without k and v in silence, and goes on with something else."""
    assert "after swapping in an edited model" in found["traps"]["part of a fused layer"]


def test_a_slight_edit_that_does_not_arrive_is_noticed(found: dict[str, Any]) -> None:
    assert found["traps"]["a slight edit, unnoticed by the gap"] == "", "or the next line would show nothing"
    assert "still answers as before" in found["traps"]["a slight edit that did not arrive"]


def test_a_tied_head_is_packed_again(run: tuple[dict[str, Any], str]) -> None:
    """Of a tied model's file vLLM reads no head, and its CPU build goes on with the one it packed at the start."""
    tied, untied = run[0]["qwen2"]["traps"], run[0]["llama"]["traps"]
    assert tied["unpacked tied head"] > 0.1, "or the packing would be for nothing"
    assert tied["packed tied head"] < 1e-4
    assert untied["unpacked tied head"] < 1e-4


def test_edits_go_through_and_back(found: dict[str, Any]) -> None:
    cells = found["cells"]
    assert (cells["equal"], cells["moved"]) == (4, 4)
    assert cells["back"]
    assert cells["fingerprint"], "bit for bit after 20 edits"
    assert cells["copy"]


def test_a_later_turn_reuses_the_cache_of_its_conversation(found: dict[str, Any]) -> None:
    turns = found["later turns"]
    assert turns["length"] - 32 <= turns["cached"] <= turns["length"] + 16
    assert turns["after a swap"] == 0


def test_seeded_requests_survive_more_tokens_than_a_prefill_takes(llama: dict[str, Any]) -> None:
    """Split by chunked prefill they kill the CPU engine, so it is off."""
    assert llama["seeds"]["tokens"] > 2 * 16384
    assert llama["seeds"]["alike"]
    assert llama["seeds"]["restarts"] == 0


def test_an_engine_that_dies_is_started_once_more_with_the_weights_it_had(
    llama: dict[str, Any], run: tuple[dict[str, Any], str]
) -> None:
    assert llama["deaths"]["alike"]
    assert llama["deaths"]["restarts"] == 1
    assert "vllm: the engine died (CPU Generator does not use offset); starting it again" in run[1]
    assert llama["deaths"]["again"].startswith(
        "the vLLM engine died twice, the second time of: CPU Generator does not use offset. What a stage had finished"
    )
    assert llama["deaths"]["closed"].startswith("the vLLM engine is closed")


def test_a_second_engine_in_one_process_is_refused_and_the_first_goes_on(llama: dict[str, Any]) -> None:
    assert llama["neighbours"]["told"].startswith("a vLLM engine runs in this process already")
    assert llama["neighbours"]["alike"]
    assert llama["neighbours"]["restarts"] == 0


def test_prompts_that_cannot_be_answered_are_told(found: dict[str, Any]) -> None:
    assert "has 1024 tokens, which leaves no room in the context of 1024" in found["too long"]
    assert "prompt 0 is empty" in found["empty"]
    assert "outside the model's vocabulary" in found["foreign"]
    assert found["nothing"] == []


def test_models_that_vllm_does_not_serve_are_told_before_it_starts(run: tuple[dict[str, Any], str]) -> None:
    refused = run[0]["refusals"]
    assert "has attention heads of size 16, and vLLM on a CPU takes only 32, 64" in refused["head size"]
    assert "is of the architecture NobodyForCausalLM, which vLLM 0.31 does not serve" in refused["architecture"]


def test_the_process_keeps_its_threads_and_random_numbers(found: dict[str, Any]) -> None:
    assert found["unmarked"]


def test_little_is_printed(run: tuple[dict[str, Any], str]) -> None:
    lines = [line for line in run[1].splitlines() if line.strip()]
    assert all(line.startswith("vllm: ") for line in lines), lines
