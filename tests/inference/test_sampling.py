from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import GenerationConfig

from rlheals.errors import UserError
from rlheals.evaluation.probes import describe
from rlheals.inference import Sampling
from rlheals.inference.sampling import UNSUPPORTED, UNSUPPORTED_SAMPLED, _Chosen, sampling_of
from rlheals.models.checkpoint import load_model
from tests.common import make_folder, make_params

if TYPE_CHECKING:
    from pathlib import Path

SWITCHED_OFF = {
    "do_sample": True,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "guidance_scale": 1.0,
    "min_length": 0,
    "max_length": 20,
}
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


# None decides which tokens come within our budget: lengths that ours replaces, what only beams read, caches, speed,
# other inputs and outputs.
HARMLESS = {
    *("max_length", "max_new_tokens", "early_stopping", "length_penalty", "diversity_penalty"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
    *("renormalize_logits", "remove_invalid_values", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "is_assistant", "use_mtp", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type"),
}


def write(folder: Path, own: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(own))


def asked(folder: Path, *overrides: str) -> Sampling:
    return sampling_of(make_params(*overrides).inference, folder, 8, 3)


def test_the_settings_of_params(tmp_path: Path) -> None:
    assert asked(tmp_path) == Sampling(8, seed=3)
    found = asked(tmp_path, "inference.temperature=0.5", "inference.top_k=3", "inference.stop=[END]")
    assert found == Sampling(8, temperature=0.5, top_k=3, seed=3, stop=("END",))


@pytest.mark.parametrize(
    ("own", "expected", "told"),
    [
        (
            QWEN,
            (0.7, 0.8, 20, 1.05),
            "temperature=0.7,top_p=0.8,top_k=20,seed=3,repetition_penalty=1.05",
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
            (0.6, 0.9, 0, 1.0),
            "temperature=0.6,top_p=0.9,seed=3",
        ),
        ({"do_sample": True}, (1.0, 1.0, 50, 1.0), "temperature=1,top_k=50,seed=3"),
        ({"do_sample": True, "top_p": 0.9}, (1.0, 0.9, 50, 1.0), "temperature=1,top_p=0.9,top_k=50,seed=3"),
        ({"repetition_penalty": 1.2}, (0.0, 1.0, 0, 1.2), "greedy,repetition_penalty=1.2"),
        ({"do_sample": False, "temperature": 0.001, "min_p": 0.1, "top_k": -1}, (0.0, 1.0, 0, 1.0), "greedy"),
        (SWITCHED_OFF, (1.0, 1.0, 50, 1.0), "temperature=1,top_k=50,seed=3"),
    ],
)
def test_the_models_own_settings(tmp_path: Path, own: dict[str, Any], expected: tuple[float, ...], told: str) -> None:
    folder = make_folder(tmp_path / "m")
    write(folder, own)
    found = asked(folder, "inference.sampling=model", "inference.temperature=0.3")
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == expected
    assert describe(found) == told
    library = load_model(folder)._prepare_generation_config(None)[0]  # what its generate would do
    if library.do_sample:
        assert expected == (library.temperature, library.top_p, library.top_k, library.repetition_penalty)


def test_a_folder_without_a_generation_config_is_greedy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    assert asked(folder, "inference.sampling=model").temperature == 0.0


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"do_sample": True, "min_p": 0.2}, "generation_config.json sets min_p to 0.2, which our engines do not do"),
        ({"do_sample": True, "typical_p": 0.9}, "sets typical_p to 0.9"),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "sets epsilon_cutoff to 0.1"),
        ({"no_repeat_ngram_size": 3}, "sets no_repeat_ngram_size to 3, .* set inference.sampling: explicit"),
        ({"bad_words_ids": [[9]]}, r"sets bad_words_ids to \[\[9\]\]"),
        ({"num_beams": 4}, "sets num_beams to 4"),
        ({"do_sample": True, "temperature": "hot"}, r"generation_config.json: temperature: .* \(got hot\); correct it"),
        ({"do_sample": True, "temperature": 0.001}, "temperature: must be 0, which is greedy, or from 0.01 to 2"),
        ({"do_sample": True, "top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"do_sample": True, "top_k": -1}, "top_k: Input should be greater than or equal to 0"),
        ({"do_sample": "yes"}, "do_sample: Input should be a valid boolean"),
        ({"repetition_penalty": 0}, "repetition_penalty: Input should be greater than 0"),
    ],
)
def test_what_no_engine_does_and_what_is_out_of_range_is_refused(
    tmp_path: Path, own: dict[str, Any], told: str
) -> None:
    folder = make_folder(tmp_path / "m")
    write(folder, own)
    with pytest.raises(UserError, match=told):
        asked(folder, "inference.sampling=model")
    assert asked(folder) == Sampling(8, seed=3), "explicit settings do not depend on it"


def test_every_field_of_the_librarys_generation_config_is_known_here() -> None:
    """A field that a new release adds may change responses, so that somebody must say what becomes of it."""
    taken = set(_Chosen.model_fields)
    used = {"eos_token_id"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= taken | used | set(UNSUPPORTED) | set(UNSUPPORTED_SAMPLED) | HARMLESS


@pytest.mark.parametrize("temperature", [0.005, 2.5, -1.0, float("nan")])
def test_no_engine_is_asked_at_a_temperature_that_another_would_change(temperature: float) -> None:
    with pytest.raises(UserError, match=r"the sampling temperature is .* to 0, which is greedy, or from 0\.01 to 2"):
        Sampling(8, temperature=temperature)
    assert [Sampling(8, temperature=fine).temperature for fine in (0.0, 0.01, 2.0)] == [0.0, 0.01, 2.0]


def test_stop_strings_are_told() -> None:
    assert describe(Sampling(8, stop=("}", "END"))) == "greedy,stop=['}', 'END']"
