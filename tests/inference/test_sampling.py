from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import GenerationConfig

from rlheals.evaluation.probes import describe
from rlheals.inference import Sampling
from rlheals.inference.sampling import sampling_of
from tests.common import make_folder, make_params

if TYPE_CHECKING:
    from pathlib import Path

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


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
        ({"do_sample": True}, (1.0, 1.0, 0, 1.0), "temperature=1,seed=3"),
        ({"repetition_penalty": 1.2}, (0.0, 1.0, 0, 1.2), "greedy,repetition_penalty=1.2"),
    ],
)
def test_the_models_own_settings(tmp_path: Path, own: dict[str, Any], expected: tuple[float, ...], told: str) -> None:
    folder = make_folder(tmp_path / "m")
    GenerationConfig(**own).save_pretrained(folder)
    found = asked(folder, "inference.sampling=model", "inference.temperature=0.3")
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == expected
    assert describe(found) == told


def test_a_folder_without_a_generation_config_is_greedy(tmp_path: Path) -> None:
    assert asked(tmp_path, "inference.sampling=model").temperature == 0.0


def test_stop_strings_are_told() -> None:
    assert describe(Sampling(8, stop=("}", "END"))) == "greedy,stop=['}', 'END']"
