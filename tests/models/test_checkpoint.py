from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model, load_state, load_tokenizer, save_model
from rlheals.publish import publish, write_manifest
from tests.common import make_folder, make_model, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", request.param)


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_is_exact_and_readable_by_all(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    save_model(model, tokenizer, tmp_path / "again")
    again = load_model(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "again").iterdir()} == {0o644}
    assert load_tokenizer(tmp_path / "again").chat_template == tokenizer.chat_template
    assert not model.training


def test_tied_weights_are_tied_after_loading(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen2")
    assert "lm_head.weight" not in load_state(folder)
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_is_cast(folder: Path) -> None:
    assert {tensor.dtype for tensor in load_model(folder, "bfloat16").state_dict().values()} == {torch.bfloat16}


def test_sharded_folders_load(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for name, tensor in load_model(sharded).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    next(iter(sharded.glob("model-00002*"))).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing though"):
        load_model(sharded)


def test_index_that_disagrees_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    make_model("llama", make_tokenizer("llama")).save_pretrained(folder, max_shard_size="200KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"disagree on model.norm.weight"):
        load_model(folder)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), rf"{NORM} missing"),
        (lambda state: state.update(stray=torch.zeros(2)), "stray unexpected"),
        (lambda state: state.update({NORM: torch.zeros(3)}), rf"{NORM} has shape \[3\], not \[64\]"),
        (lambda state: state[NORM].fill_(float("nan")), rf"{NORM} holds NaN or infinite"),
        (lambda state: state[NORM].fill_(float("inf")), rf"{NORM} holds NaN or infinite"),
        (lambda state: state.update({NORM: torch.zeros(64, dtype=torch.int8)}), rf"{NORM} is I8, not floating point"),
        (lambda state: state.clear(), "missing"),
        (
            lambda state: [state.update({f"prefix.{name}": state.pop(name)}) for name in list(state)],
            "and .* more missing; prefix.* unexpected",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message) as raised:
        load_model(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_head_stored_beside_a_tied_config_is_not_lost(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen2")
    edit(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_half_written_weights(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    for load in (load_model, load_state):
        with pytest.raises(UserError, match=r"model.safetensors is truncated or corrupted"):
            load(folder)


@given(place=st.integers(0, 2000), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_the_header_never_loads_silently(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        make_folder(folder)
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[place % (8 + header)] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(data)
    whole = load_file(folder / "whole")
    try:
        loaded = load_model(folder).state_dict()
    except UserError:
        return
    # A flip in the metadata or in white space may be harmless; then every weight must be right.
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_pickled_checkpoints_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickled checkpoint.*convert it"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json describes no model"),
        ("config.json", '{"model_type": "no-such-model"}', "config.json describes no model"),
        ("config.json", "[]", "config.json describes no model"),
        ("model.safetensors", None, "has no model.safetensors"),
    ],
)
def test_broken_folders(folder: Path, file: str, content: str | None, message: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere holds no readable tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizers_need_a_template_and_an_end(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(UserError, match=r"has no chat template; add chat_template.jinja"):
        load_tokenizer(folder)
    template.write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("level", ["own", "parent"])
def test_manifest_digests_are_checked(folder: Path, level: str) -> None:
    write_manifest(folder if level == "own" else folder.parent)
    load_model(folder)
    edit(folder, lambda state: state[NORM].add_(1))
    for load in (load_model, load_state):
        with pytest.raises(UserError, match=r"model.safetensors is missing or corrupted \(its sha256"):
            load(folder)


@pytest.mark.fault
def test_a_full_disk_is_one_sentence_and_nothing_is_published(tmp_path: Path) -> None:
    """The size limit stands in for a full disk: the write fails half way through the weights."""
    program = f"""
import resource, sys
from pathlib import Path
from rlheals.errors import UserError
from rlheals.models.checkpoint import save_model
from rlheals.publish import publish
from tests.common import make_model, make_tokenizer
tokenizer = make_tokenizer("llama")
model = make_model("llama", tokenizer)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with publish(Path({str(tmp_path / "out")!r})) as directory:
        save_model(model, tokenizer, directory)
except UserError as error:
    print(error)
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not be written because the file would exceed the size limit; nothing was published" in done.stdout
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_published_models_verify(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen2")
    with publish(tmp_path / "out") as directory:
        save_model(make_model("qwen2", tokenizer), tokenizer, directory)
    load_model(tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
