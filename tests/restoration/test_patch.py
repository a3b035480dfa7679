from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlheals.errors import UserError
from rlheals.restoration.patch import (
    Ends,
    Origin,
    Patch,
    PatchWriter,
    compose_patches,
    invert_patch,
    make_patch,
    model_digest,
    tensor_digest,
)
from rlheals.restoration.patch_content import FORMAT
from rlheals.spectra.reader import Weights
from tests.restoration.folders import drifted, low_rank, same_bits, state, write

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def more_drift(name: str, tensor: Tensor) -> Tensor:
    return drifted(name, drifted(name, tensor)) if "layers.1" in name else drifted(name, tensor)


def applied(patch: Path, folder: Path) -> dict[str, Tensor]:
    before = state(folder)
    with Patch(patch) as opened, Weights(folder) as weights:
        opened.check_base(weights)
        return {n: opened.apply(n, tensor) if n in opened.entries else tensor for n, tensor in before.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.fixture(params=["float32", "bfloat16"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, and what two stretches of training make of it."""
    dtype = request.param
    folders = [write(tmp_path / name, dtype=dtype, change=c) for name, c in (("a", None), ("b", drifted))]
    return folders[0], folders[1], write(tmp_path / "c", dtype=dtype, change=more_drift)


def test_a_patch_gives_the_other_model_bit_for_bit_and_back(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, two, _ = models
    make_patch(one, two, tmp_path / "p")
    invert_patch(tmp_path / "p", tmp_path / "back")
    assert equal(applied(tmp_path / "p", one), state(two))
    assert equal(applied(tmp_path / "back", two), state(one))
    with Patch(tmp_path / "p") as patch, Patch(tmp_path / "back") as back:
        assert [origin.inverted for origin in (*patch.origins, *back.origins)] == [False, True]
        assert patch.origins[0].target["name"] == "a"


def test_a_low_rank_change_is_stored_as_factors(tmp_path: Path) -> None:
    shape = {"hidden": 256, "intermediate": 64, "layers": 1}
    one, two = write(tmp_path / "a", **shape), write(tmp_path / "b", **shape, change=low_rank)
    make_patch(one, two, tmp_path / "p")
    invert_patch(tmp_path / "p", tmp_path / "back")
    with Patch(tmp_path / "p") as patch, Weights(one) as weights:
        assert {name.split(".")[-2]: entry.ranks for name, entry in patch.entries.items()} == {
            "q_proj": (2,),
            "k_proj": (2,),
        }
        assert patch.bytes < 0.7 * 4 * sum(torch.Size(weights.shapes[name]).numel() for name in patch.entries)
    assert equal(applied(tmp_path / "p", one), state(two))
    assert equal(applied(tmp_path / "back", two), state(one))


def test_composed_patches_are_one_after_the_other(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, two, three = models
    make_patch(one, two, tmp_path / "p")
    make_patch(two, three, tmp_path / "q")
    compose_patches(tmp_path / "p", tmp_path / "q", tmp_path / "pq")
    assert equal(applied(tmp_path / "pq", one), state(three))
    with Patch(tmp_path / "pq") as patch, Patch(tmp_path / "p") as first:
        assert len(patch.origins) == 2
        assert patch.bytes < 1.2 * first.bytes, "steps without factors add up to one"
    invert_patch(tmp_path / "pq", tmp_path / "back")
    assert equal(applied(tmp_path / "back", three), state(one))


def test_steps_with_factors_are_kept_one_after_the_other(tmp_path: Path) -> None:
    shape = {"hidden": 256, "intermediate": 64, "layers": 1}
    one, two = write(tmp_path / "a", **shape), write(tmp_path / "b", **shape, change=low_rank)
    three = write(tmp_path / "c", **shape, change=lambda name, tensor: drifted(name, low_rank(name, tensor)))
    make_patch(one, two, tmp_path / "p")
    make_patch(two, three, tmp_path / "q")
    compose_patches(tmp_path / "p", tmp_path / "q", tmp_path / "pq")
    invert_patch(tmp_path / "pq", tmp_path / "back")
    assert equal(applied(tmp_path / "pq", one), state(three))
    assert equal(applied(tmp_path / "back", three), state(one))
    with Patch(tmp_path / "back") as patch:
        assert patch.entries["model.layers.0.self_attn.q_proj.weight"].ranks == (0, 2)


def test_a_step_that_the_next_one_undoes_is_dropped(tmp_path: Path) -> None:
    """There and back over two stretches, the first of low rank, and then somewhere else."""
    shape = {"hidden": 256, "intermediate": 64, "layers": 1}
    one, two = write(tmp_path / "a", **shape), write(tmp_path / "b", **shape, change=low_rank)
    three = write(tmp_path / "c", **shape, change=lambda name, tensor: drifted(name, low_rank(name, tensor)))
    other = write(tmp_path / "d", **shape, change=drifted)
    for name, before, after in (("p", one, two), ("q", two, three), ("r", one, other)):
        make_patch(before, after, tmp_path / name)
    compose_patches(tmp_path / "p", tmp_path / "q", tmp_path / "pq")
    for name in ("p", "pq"):
        invert_patch(tmp_path / name, tmp_path / f"{name}-back")
    compose_patches(tmp_path / "p-back", tmp_path / "r", tmp_path / "there")
    compose_patches(tmp_path / "p", tmp_path / "there", tmp_path / "p-there")
    compose_patches(tmp_path / "pq-back", tmp_path / "r", tmp_path / "far")
    compose_patches(tmp_path / "pq", tmp_path / "far", tmp_path / "pq-far")
    name = "model.layers.0.self_attn.q_proj.weight"
    for whole in ("p-there", "pq-far"):
        assert equal(applied(tmp_path / whole, one), state(other))
        with Patch(tmp_path / whole) as patch, Patch(tmp_path / "r") as alone:
            assert patch.entries[name] == alone.entries[name]
        with Patch(tmp_path / "pq") as patch:
            assert patch.entries[name].ranks[0] == 2, "steps with factors are among what is dropped"
    invert_patch(tmp_path / "pq-far", tmp_path / "home")
    assert equal(applied(tmp_path / "home", other), state(one))


def test_a_patch_and_its_inverse_cancel(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    make_patch(models[0], models[1], tmp_path / "p")
    invert_patch(tmp_path / "p", tmp_path / "back")
    compose_patches(tmp_path / "p", tmp_path / "back", tmp_path / "none")
    with Patch(tmp_path / "none") as patch:
        assert patch.entries == {}
        with Weights(models[0]) as weights, pytest.raises(UserError, match="changes nothing"):
            patch.check_base(weights, same_tensors_only=True)


def test_another_base_is_refused_by_the_first_tensor_that_differs(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    one, two, three = models
    make_patch(one, two, tmp_path / "p")
    with Patch(tmp_path / "p") as patch, Weights(two) as weights:
        first = next(iter(weights.shapes))
        with pytest.raises(UserError, match=f"already has the {first}"):
            patch.check_base(weights)
    make_patch(two, three, tmp_path / "q")
    with Patch(tmp_path / "q") as patch, Weights(one) as weights:
        differs = next(name for name in weights.shapes if "layers.1" in name)
        with pytest.raises(UserError, match=f"the sha256 of {differs} is .* apply it to b"):
            patch.check_base(weights)
    with pytest.raises(UserError, match=f"needs another {differs}"):
        compose_patches(tmp_path / "q", tmp_path / "q", tmp_path / "qq")
    assert not (tmp_path / "qq").exists()


def test_the_whole_model_has_to_be_the_one_it_was_made_for(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a"), write(tmp_path / "b", change=low_rank)
    other = write(tmp_path / "c", change=lambda name, tensor: tensor * 1.5 if "down_proj" in name else tensor)
    three = write(tmp_path / "d", change=lambda name, tensor: low_rank(name, drifted(name, tensor)))
    make_patch(one, two, tmp_path / "p")
    invert_patch(tmp_path / "p", tmp_path / "back")
    make_patch(two, three, tmp_path / "q")
    compose_patches(tmp_path / "p", tmp_path / "q", tmp_path / "pq")
    invert_patch(tmp_path / "pq", tmp_path / "pq-back")
    for name, fits in (("p", one), ("back", two), ("pq", one), ("pq-back", three)):
        with Patch(tmp_path / name) as patch, Weights(fits) as weights:
            patch.check_base(weights)
    with Patch(tmp_path / "p") as patch, Weights(other) as weights:
        patch.check_base(weights, same_tensors_only=True)
        with pytest.raises(UserError, match=r"is for another model than .*; apply it to a or"):
            patch.check_base(weights)


def test_patches_that_do_not_follow_lead_to_no_known_model(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a"), write(tmp_path / "b", change=low_rank)
    other = write(tmp_path / "c", change=lambda name, tensor: tensor * 1.5 if "down_proj" in name else tensor)
    make_patch(one, two, tmp_path / "p")
    make_patch(one, other, tmp_path / "q")
    compose_patches(tmp_path / "p", tmp_path / "q", tmp_path / "pq")
    assert not equal(applied(tmp_path / "pq", one), state(two))
    invert_patch(tmp_path / "pq", tmp_path / "back")
    both = write(
        tmp_path / "d", change=lambda name, tensor: tensor * 1.5 if "down_proj" in name else low_rank(name, tensor)
    )
    with Patch(tmp_path / "back") as patch, Weights(both) as weights:
        patch.check_base(weights, same_tensors_only=True)
        with pytest.raises(UserError, match="does not tell which whole model"):
            patch.check_base(weights)


def test_digests_are_those_of_the_reader(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with Weights(models[0]) as weights, Weights(write(tmp_path / "again", shard_bytes=2**30)) as one_file:
        for name in weights.shapes:
            assert tensor_digest(weights.tensor(name)) == weights.digest(name)
        same = weights.dtypes == one_file.dtypes
        assert (model_digest(weights) == model_digest(one_file)) == same


def test_the_file_is_safetensors_with_its_recipe(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    make_patch(models[0], models[1], tmp_path / "p")
    with safe_open(tmp_path / "p", framework="pt") as file:
        content = json.loads(file.metadata()[FORMAT])
        names = set(file.keys())
        read = {name: file.get_tensor(name) for name in names}
    assert content["version"] == 1
    assert {name.rsplit("/", 2)[0] for name in names} == set(content["tensors"])
    with Patch(tmp_path / "p") as patch:
        for name in patch.entries:
            step = next(iter(patch.steps(name)))
            assert step.forward.dense is None or torch.equal(step.forward.dense, read[f"{name}/0/forward.dense"])
    assert ((tmp_path / "p").stat().st_mode & 0o777) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "p"]


def test_what_cannot_be_patched_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, two, _ = models
    out = tmp_path / "p"
    with pytest.raises(UserError, match="nothing to patch"):
        make_patch(one, one, out)
    other = write(tmp_path / "half", dtype="float16", change=drifted)
    with pytest.raises(UserError, match="but float16 in"):
        make_patch(one, other, out)
    with pytest.raises(UserError, match="is not a fine-tuned version"):
        make_patch(one, write(tmp_path / "small", layers=1), out)
    with pytest.raises(UserError, match="would lie inside the model folder"):
        make_patch(one, two, one / "config.json")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists and is no patch"):
        make_patch(one, two, tmp_path / "notes")
    assert not out.exists()
    assert json.loads((one / "config.json").read_text())["model_type"] == "llama"


def test_damaged_and_foreign_files_are_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "p"
    make_patch(models[0], models[1], path)
    whole = path.read_bytes()
    for cut in (whole[:-3], whole[:40], b"", whole + b"x", b"\xff" * 64):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="no safetensors file or is damaged"):
            Patch(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no patch of rlheals"):
        Patch(path)
    save_file({"a": torch.zeros(2)}, path, metadata={FORMAT: json.dumps({"version": 2})})
    with pytest.raises(UserError, match="update rlheals"):
        Patch(path)
    save_file({"a": torch.zeros(2)}, path, metadata={FORMAT: json.dumps({"version": 1, "tensors": {}})})
    with pytest.raises(UserError, match="damaged patch"):
        Patch(path)
    with pytest.raises(UserError, match="cannot be read"):
        Patch(tmp_path / "missing")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="so it was altered"):
        applied(path, models[0])


def test_a_writer_that_stops_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p"

    def fail() -> None:
        with PatchWriter(path) as writer:
            writer.add("w", torch.zeros(4), torch.ones(4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with PatchWriter(path) as writer:
        writer.add("same", torch.ones(3), torch.ones(3))
        writer.add("sign", torch.zeros(3), -torch.zeros(3))
        writer.finish([Origin({}, {}, {})], Ends())
    with Patch(path) as patch:
        assert list(patch.entries) == ["sign"]
    with PatchWriter(path) as writer:  # a patch may be replaced
        writer.finish([], Ends())


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PatchWriter(path) as writer:
        writer.add("w", torch.zeros(4), torch.ones(4))
        with pytest.raises(UserError, match=f"another run is writing {path}; wait"):
            PatchWriter(path)
        writer.finish([], Ends())
        with pytest.raises(UserError, match="another run is writing"):
            PatchWriter(path)
    with Patch(path) as patch:
        assert list(patch.entries) == ["w"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_no_part_of_the_next_file(tmp_path: Path) -> None:
    (tmp_path / ".p.data").write_bytes(b"x" * 1000)
    (tmp_path / ".p.partial").write_bytes(b"x" * 1000)
    with PatchWriter(tmp_path / "p") as writer:
        writer.add("w", torch.zeros(4), torch.ones(4))
        writer.finish([], Ends())
    with Patch(tmp_path / "p") as patch:
        assert torch.equal(patch.apply("w", torch.zeros(4)), torch.ones(4))
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]
