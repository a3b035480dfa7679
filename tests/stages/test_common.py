from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rlheals.errors import UserError
from rlheals.stages import common
from rlheals.stages.common import Run, code_digest
from tests.common import make_params

if TYPE_CHECKING:
    from pathlib import Path


def scratch(*blocks: Any) -> Path:
    return Run(make_params("compute.device=cpu"), "tiny", 0).scratch("sft", *blocks)


def test_scratch_is_named_by_what_was_read() -> None:
    assert scratch({"a": 1}) == scratch({"a": 1})
    assert scratch({"a": 1}) != scratch({"a": 2})
    assert scratch().parent.name == "sft"
    assert scratch().name.startswith("mini-tiny-0-")


@pytest.mark.parametrize("library", ["torch", "transformers", "trl"])
def test_another_library_version_is_another_scratch(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    before, real = scratch(), common.version
    monkeypatch.setattr(common, "version", lambda name: "0.0" if name == library else real(name))
    assert scratch() != before


def test_another_code_is_another_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = scratch()
    monkeypatch.setattr(common, "code_digest", lambda: "other")
    assert scratch() != before


def test_another_device_is_another_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = scratch()
    monkeypatch.setattr(common, "resolve_device", lambda device: "cuda")
    assert scratch() != before


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("model.tiny.dtype=bfloat16", True),
        ("model.tiny.prompt_format=paper", True),
        ("inference.engine=vllm", True),
        ("inference.temperature=0.5", True),
        ("report.title=x", False),
    ],
)
def test_answers_are_not_taken_from_a_model_or_engine_asked_otherwise(override: str, changes: bool) -> None:
    first, second = (Run(make_params("compute.device=cpu", *more), "tiny", 0) for more in ((), (override,)))
    assert (first.scratch("probe", first.answering()) != second.scratch("probe", second.answering())) == changes


def test_another_vllm_is_another_scratch_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(release: str, engine: str, other: str | None = None) -> Path:
        monkeypatch.setattr("rlheals.inference.vllm.checks.installed", lambda: ("vllm", release))
        run = Run(make_params("compute.device=cpu", f"inference.engine={engine}"), "tiny", 0)
        return run.scratch("probe", run.answering(other))

    assert both("0.31.0", "vllm") != both("0.31.1", "vllm")
    assert both("0.31.0", "transformers") == both("0.31.1", "transformers")
    assert both("0.31.0", "transformers", "vllm") != both("0.31.1", "transformers", "vllm")


def package(root: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_code_digest_sees_every_byte_and_name_but_not_the_place(tmp_path: Path) -> None:
    first = code_digest(package(tmp_path / "1", a="x = 1", b__c="y = 1"))
    assert code_digest(package(tmp_path / "2", b__c="y = 1", a="x = 1")) == first
    others = [
        package(tmp_path / "3", a="x = 1", b__c="y = 2"),
        package(tmp_path / "4", a="x = 1", b__d="y = 1"),
        package(tmp_path / "5", a="x = 1"),
        package(tmp_path / "6", a="x = 1y", b__c=" = 1"),
    ]
    digests = {first, *map(code_digest, others)}
    assert len(digests) == 5


def test_cuda_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        common.resolve_device("cuda")
    assert common.resolve_device("auto") == "cpu"
