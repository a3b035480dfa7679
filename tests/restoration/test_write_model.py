from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model, load_tokenizer
from rlheals.publish import verify
from rlheals.restoration.patch import model_digest
from rlheals.restoration.side_files import SideFiles, goes_along, side_files
from rlheals.restoration.write_model import write_model
from rlheals.spectra.reader import Weights
from tests.common import make_folder
from tests.restoration.folders import same_bits, same_state, state, write

if TYPE_CHECKING:
    from torch import Tensor

EDITED = "model.layers.0.self_attn.q_proj.weight"


def twice(weights: Weights, out: Path, **options: int) -> str:
    """Write the model with one tensor doubled."""
    return write_model(
        weights,
        lambda name: 2 * weights.tensor(name) if name == EDITED else None,
        lambda digest: f"card {digest}",
        out,
        **options,
    )


def test_the_folder_loads_and_answers_by_itself(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("another card")
    (source / "trainer_state.json").write_text("{}")
    (source / "optimizer.bin").write_text("")
    with Weights(source) as weights:
        digest = twice(weights, tmp_path / "out")
    out = tmp_path / "out"
    assert load_tokenizer(out).chat_template == load_tokenizer(source).chat_template
    model, old = load_model(out), load_model(source)
    assert torch.equal(model.get_parameter(EDITED), 2 * old.get_parameter(EDITED))
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.safetensors"} <= names
    assert not {"trainer_state.json", "optimizer.bin", "model.safetensors.index.json"} & names
    assert (out / "README.md").read_text() == f"card {digest}"
    with Weights(out) as written:
        assert model_digest(written) == digest
    assert set(verify(out)) == names - {"manifest.json"}
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_stay_below_the_size_and_change_nothing(tmp_path: Path, dtype: str) -> None:
    source, out = write(tmp_path / "source", dtype=dtype), tmp_path / "out"
    with Weights(source) as weights:
        largest = max(tensor.numel() * tensor.element_size() for tensor in state(source).values())
        one = twice(weights, tmp_path / "whole")
        assert twice(weights, out, shard_bytes=largest) == one
        order = list(weights.shapes)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size <= largest + 4096 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == order
    assert same_state(tmp_path / "whole", out)
    before, after = state(source), state(out)
    assert [name for name in before if not same_bits(before[name], after[name])] == [EDITED]


def test_nothing_appears_when_an_edit_fails(tmp_path: Path) -> None:
    source = write(tmp_path / "source")

    def infinite(name: str) -> Tensor | None:
        return torch.full((32, 32), torch.inf) if name == EDITED else None

    def wide(name: str) -> Tensor | None:
        return torch.zeros(32, 32, dtype=torch.float64) if name == EDITED else None

    with Weights(source) as weights:
        with pytest.raises(UserError, match=f"tensor {EDITED} holds NaN or infinite"):
            write_model(weights, infinite, str, tmp_path / "out")
        with pytest.raises(ValueError, match="not F32"):
            write_model(weights, wide, str, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_models_are_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "ladder" / "source")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with Weights(source) as weights:
        twice(weights, tmp_path / "out")
        twice(weights, tmp_path / "out")  # an earlier output may be replaced
        for taken in (source, tmp_path / "notes"):
            with pytest.raises(UserError, match="exists and is no output of rlheals"):
                twice(weights, taken)
    with Weights(tmp_path / "out") as weights, pytest.raises(UserError, match="which is read"):
        twice(weights, tmp_path / "out")
    assert (tmp_path / "notes" / "mine.txt").exists()
    assert len(state(source)) == 21


REMOTE = "from .helper import x\nclass Config: pass\n"


def with_extras(source: Path, secret: Path) -> None:
    """All that folders of real models and trainings hold besides, and links that lead out."""
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for name in ("configuration_x.py", "modeling_x.py", "helper.py"):
        (source / name).write_text(REMOTE)
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gone"}))
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json", "tf_model.h5.index.json"):
        (source / name).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    for name in ("trainer_state.json", "all_results.json", "quantize_config.json", "params.json"):
        (source / name).write_text("{}")
    for name in ("vocab.bpe", "tokenizer.model.v3", "source.spm", "bpe.codes", "x.tiktoken", "LICENCE.md", "notice"):
        (source / name).write_text(name)
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "chat_templates" / "stolen.jinja").symlink_to(secret)
    (source / "stolen.json").symlink_to(secret)
    (source / "nowhere.txt").symlink_to(source / "gone")
    (source / "round.txt").symlink_to(source / "round.txt")
    (source / "additional_chat_templates").symlink_to(secret.parent)
    (source / "second.json").symlink_to("generation_config.json")


def test_nothing_that_changes_the_meaning_goes_along_and_nothing_needed_stays_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    (tmp_path / "private").mkdir()
    secret = tmp_path / "private" / "key.jinja"
    secret.write_text("a secret")
    plain = {file.name for file in source.iterdir()}
    before = load_model(source).get_parameter(EDITED)
    with Weights(source) as weights:
        with_extras(source, secret)
        twice(weights, out)
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names - plain - {"manifest.json", "README.md"} == {
        *("configuration_x.py", "modeling_x.py", "helper.py", "second.json", "chat_templates/tool.jinja"),
        *("vocab.bpe", "tokenizer.model.v3", "source.spm", "bpe.codes", "x.tiktoken", "LICENCE.md", "notice"),
    }
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert not any(b"a secret" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    told = capsys.readouterr().err
    for name in ("stolen.json", "chat_templates/stolen.jinja", "additional_chat_templates", "nowhere.txt"):
        assert f"{source / name} was not copied, because it is a link to" in told
    loaded = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    assert torch.equal(loaded.get_parameter(EDITED), 2 * before)


def test_python_files_go_along_only_where_a_config_names_them(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    (source / "train.py").write_text("")
    assert "train.py" not in side_files(source).names
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["a.B", None]}})
    )
    assert "train.py" in side_files(source).names


def as_hub_cache(folder: Path, root: Path) -> Path:
    """The folder as the hub's cache keeps it: a snapshot of links to files named by their content."""
    repository = root / "models--someone--some-model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_copied_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(tmp_path / "source")
    names = {file.name for file in source.iterdir()}
    snapshot = as_hub_cache(source, tmp_path / "hub")
    with Weights(snapshot) as weights:
        twice(weights, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {"README.md", "manifest.json"}
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert "was not copied" not in capsys.readouterr().err
    load_model(tmp_path / "out")
    other = tmp_path / "hub" / "models--someone--private" / "blobs"
    other.mkdir(parents=True)
    (other / "token").write_text("{}")
    (snapshot / "stolen.json").symlink_to(other / "token")  # of another repository
    assert [name for name, _ in side_files(snapshot).strangers] == ["stolen.json"]


def test_files_that_dvc_links_from_its_cache_go_along(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    cache = tmp_path / "cache" / "files" / "md5" / "ab"
    cache.mkdir(parents=True)
    (source / "config.json").rename(cache / ("c" * 30))
    (source / "config.json").symlink_to(cache / ("c" * 30))
    assert side_files(source) == SideFiles(("config.json",), ())


def test_a_config_that_lies_elsewhere_is_refused_before_the_work(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    (source / "config.json").rename(tmp_path / "elsewhere.json")
    (source / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with Weights(source) as weights, pytest.raises(UserError, match=r"config.json is a link to .*elsewhere.json"):
        twice(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_vocabulary_file_of_the_library_goes_along() -> None:
    """The names that its tokenizers declare, read from their sources."""
    named = re.compile(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", re.DOTALL)
    models = Path(transformers.__file__).parent / "models"
    texts = [file.read_text() for file in models.rglob("tokenization_*.py")]
    names = {name for text in texts for block in named.findall(text) for name in re.findall(r':\s*"([^"]+)"', block)}
    assert {"merges.txt", "spiece.model", "source.spm", "bpe.codes"} < names
    assert [name for name in sorted(names) if not goes_along(name)] == []
