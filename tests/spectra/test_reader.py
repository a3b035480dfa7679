from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlheals.errors import UserError
from rlheals.publish import write_manifest
from rlheals.spectra.random_law import looks_untrained
from rlheals.spectra.reader import Weights, check_same
from tests.common import make_folder
from tests.spectra.synthetic import llama_shapes, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Q = "model.layers.1.self_attn.q_proj.weight"


def small(directory: Path, **changes: Any) -> Path:
    wanted = {"layers": 2, "hidden": 32, "intermediate": 48, "seed": 0, "shard_bytes": 20_000} | changes
    return write_checkpoint(directory, **wanted)


def shard_of(folder: Path, name: str = Q) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def edit(file: Path, name: str, change: Callable[[Tensor], object]) -> None:
    state = load_file(file)
    change(state[name])
    save_file(state, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: str) -> None:
    folder = small(tmp_path / "model", dtype=dtype, shard_bytes=10_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    with Weights(folder) as weights:
        assert weights.shapes == llama_shapes(2, 32, 48)
        assert set(weights.dtypes.values()) == {dtype}
        for shard in shards:
            for name, expected in load_file(shard).items():
                found = weights.tensor(name)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)
        size = getattr(torch, dtype).itemsize
        assert weights.weight_bytes == sum(torch.Size(shape).numel() * size for shape in weights.shapes.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_single_file_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path / "model", kind)
    with Weights(folder) as weights, safe_open(folder / "model.safetensors", framework="pt") as expected:
        assert set(weights.shapes) == set(expected.keys())
        assert weights.topology.family == kind
        for name in weights.shapes:
            assert torch.equal(weights.tensor(name), expected.get_tensor(name))


def test_file_of_one_tensor_larger_than_a_block(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", hidden=1200, intermediate=8, layers=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    with Weights(folder) as weights:
        assert torch.equal(weights.tensor(name), load_file(shard_of(folder, name))[name])


def test_no_file_is_mapped_into_memory(folder: Path) -> None:
    with Weights(folder) as weights:
        values = weights.tensor(Q)
        assert str(folder) not in Path("/proc/self/maps").read_text()
        assert values.untyped_storage().nbytes() == 32 * 32 * 4  # and the tensor drags nothing along


def test_tensor_belongs_to_the_caller(folder: Path) -> None:
    with Weights(folder) as weights:
        weights.tensor(Q).zero_()
        assert weights.tensor(Q).any()


def digests(folder: Path) -> dict[str, str]:
    with Weights(folder) as weights:
        return {name: weights.digest(name) for name in weights.shapes}


def test_digest_follows_the_values_and_not_the_sharding(tmp_path: Path) -> None:
    base = digests(small(tmp_path / "base"))
    assert digests(small(tmp_path / "one_shard", shard_bytes=1 << 30)) == base
    other = digests(small(tmp_path / "other", change=lambda name, tensor: tensor + (name == Q) * 1e-6))
    assert {name for name in base if base[name] != other[name]} == {Q}


def test_equal_bytes_of_another_shape_or_type_have_another_digest(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    found = {digests(small(tmp_path / "base"))[name]}
    for dtype, shape in (("F32", [48, 32]), ("F16", [32, 96]), ("BF16", [32, 96])):
        folder = small(tmp_path / f"{dtype} {shape}")
        edit_header(shard_of(folder, name), lambda header, d=dtype, s=shape: header[name].update(dtype=d, shape=s))
        found.add(digests(folder)[name])
    assert len(found) == 4


def test_digest_is_computed_once(folder: Path) -> None:
    with Weights(folder) as weights:
        first = weights.digest(Q)
    assert weights.digest(Q) == first  # its files are closed


def test_pickled_checkpoints_are_refused(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickled checkpoint.*convert it to safetensors"):
        Weights(folder)


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_truncation_is_noticed_on_opening(folder: Path, missing: int) -> None:
    file = shard_of(folder)
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.raises(UserError, match=rf"{file.name} is truncated or corrupted \(its tensors need .* copy it again"):
        Weights(folder)


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_file_cut_within_its_header(folder: Path, size: int) -> None:
    file = shard_of(folder)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"is truncated or corrupted \(its header would take"):
        Weights(folder)


def test_bytes_too_many(folder: Path) -> None:
    file = shard_of(folder)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match="its tensors need"):
        Weights(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[Q].update(dtype="F3r"), r"unknown type 'F3r'"),
        (lambda h: h[Q].update(dtype="F16"), r"of shape \[32, 32\] and type F16 cannot take 4096 bytes"),
        (lambda h: h[Q].update(shape=[32, 31]), r"cannot take 4096 bytes"),
        (lambda h: h[Q].update(shape=[-32, -32]), r"not a whole number"),
        (lambda h: h[Q].update(shape=[32.0, 32]), r"not a whole number"),
        (lambda h: h[Q].update(shape=None), r"header is not valid"),
        (lambda h: h[Q].pop("data_offsets"), r"header is not valid: 'data_offsets'"),
        (lambda h: h[Q].update(data_offsets=[0]), r"header is not valid"),
        (lambda h: h.update({Q: 3}), r"header is not valid"),
        (lambda h: h[Q].update(data_offsets=[n + 4 for n in h[Q]["data_offsets"]]), "does not start where"),
        (lambda h: h.pop(Q), "does not start where|its tensors need"),
        (lambda h: h.update({Q + "x": h.pop(Q)}), "index.json and its files disagree on"),
        (lambda h: h[Q].update(dtype="I32"), "q_proj.weight is I32, not floating point; use an unquantised checkpoint"),
    ],
)
def test_damaged_headers(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_header(shard_of(folder), change)
    with pytest.raises(UserError, match=message):
        Weights(folder)


def test_header_that_names_a_tensor_twice_or_is_no_json(folder: Path) -> None:
    file = shard_of(folder)
    whole = file.read_bytes()
    body = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    for damage in (b'{"a":1,"a":2}', b"[]", b"\xff", b"{" * 50_000, b'{"a":' * 50_000):
        file.write_bytes(len(damage).to_bytes(8, "little") + damage)
        with pytest.raises(UserError, match=r"is truncated or corrupted \(its header is not valid"):
            Weights(folder)
    file.write_bytes(whole.replace(body[:1], b"[", 1))
    with pytest.raises(UserError, match="truncated or corrupted"):
        Weights(folder)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_never_goes_wrong_silently(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    """Either the folder is refused with a sentence, or it holds the same tensors (a bit of the metadata was hit)."""
    base = tmp_path_factory.getbasetemp() / "bits"
    if not base.exists():
        small(base)
    file = shard_of(base)
    whole = file.read_bytes()
    at = place % (8 + int.from_bytes(whole[:8], "little"))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    try:
        file.write_bytes(flipped)
        with Weights(base) as weights:
            assert weights.shapes == llama_shapes(2, 32, 48)
            assert weights.tensor(Q).shape == (32, 32)
    except UserError as error:
        assert str(base) in str(error)  # noqa: PT017  both outcomes are right
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    edit(shard_of(folder), Q, lambda tensor: tensor[31].fill_(value))
    with Weights(folder) as weights, pytest.raises(UserError, match=f"tensor {Q} holds NaN or infinite"):
        weights.tensor(Q)


def test_flipped_bit_in_the_data_is_noticed_where_there_is_a_manifest(folder: Path) -> None:
    write_manifest(folder)
    Weights(folder).close()
    file = shard_of(folder)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} is missing or corrupted"):
        Weights(folder)


def test_file_that_shrinks_while_it_is_open(folder: Path) -> None:
    with Weights(folder) as weights:
        file = shard_of(folder)
        with file.open("r+b") as open_file:
            open_file.truncate(4000)
        with pytest.raises(UserError, match="has become shorter since it was opened"):
            weights.tensor(Q)
        with pytest.raises(UserError, match="has become shorter since it was opened"):
            weights.digest(Q)


def test_tensor_in_two_shards(folder: Path) -> None:
    first = shard_of(folder, "model.embed_tokens.weight")
    save_file(load_file(first) | {Q: torch.zeros(32, 32)}, first)
    with pytest.raises(UserError, match=rf"tensor {Q} is in \S+ and in \S+, and .* one is a stale copy"):
        Weights(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_config_is_required(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        Weights(folder)


def test_errors_of_the_topology_name_the_folder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    message = f"{folder}: the config says 3 layers, but layer 2 has no weight"
    with Weights(folder) as weights, pytest.raises(UserError, match=message):
        _ = weights.topology


def compare(base: Path, tuned: Path) -> None:
    with Weights(base) as ours, Weights(tuned) as theirs:
        check_same(ours, theirs)


def test_same_architecture_in_another_type_and_sharding(folder: Path, tmp_path: Path) -> None:
    compare(folder, small(tmp_path / "tuned", seed=1, dtype="bfloat16", shard_bytes=1 << 30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, r"also has model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+ and 6 more"),
        ({"intermediate": 56}, r"mlp\.gate_proj\.weight has shape \[56, 32\], not \[48, 32\]"),
        ({"hidden": 64}, r"config has head_dim 16, not 8"),
    ],
)
def test_other_shapes_are_named(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tuned = small(tmp_path / "tuned", **changes)
    with pytest.raises(UserError, match=rf"{tuned} is not a fine-tuned version of {folder}: .*{message}"):
        compare(folder, tuned)


def test_other_architectures_are_named(folder: Path, tmp_path: Path) -> None:
    tuned = small(tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(UserError, match="its config has model_type mistral, not llama"):
        compare(folder, tuned)


def test_names_that_differ_by_their_prefix_are_told_apart_from_missing_ones(folder: Path, tmp_path: Path) -> None:
    """The conversion that left the published Llama at its initialisation."""
    tuned = small(tmp_path / "tuned")
    for file in (*tuned.glob("*.safetensors"), tuned / "model.safetensors.index.json"):
        content = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(content.replace(b'"model.', b'"language_model.model.'))
        else:
            edit_header(file, rename)
    with pytest.raises(
        UserError, match=r"same tensors under other names \(language_model\.model\.\S+ for model\.\S+\)"
    ):
        compare(folder, tuned)


def rename(header: dict[str, Any]) -> None:
    for name in [name for name in header if name.startswith("model.")]:
        header[f"language_model.{name}"] = header.pop(name)


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    base = small(tmp_path / "base", tied=True)
    tuned = small(tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    compare(base, tuned)
    compare(tuned, base)


def test_freshly_initialised_llama_looks_untrained_and_a_trained_one_does_not(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "fresh")
    small(tmp_path / "trained", hidden=64, intermediate=160)
    assert matches(tmp_path / "fresh") == {True}
    assert matches(tmp_path / "trained") == {False}


def matches(folder: Path) -> set[bool]:
    with Weights(folder) as weights:
        scale = weights.topology.initializer_range
        tensors = [weights.tensor(matrix.name) for matrix in weights.topology.matrices]
    return {looks_untrained(torch.linalg.svdvals(t), (t.shape[0], t.shape[1]), scale) is not None for t in tensors}
