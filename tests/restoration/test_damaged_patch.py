"""Patches with flipped bytes: a sentence, or the weights that were promised, and never anything else."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rlheals.commands.patch import as_content
from rlheals.errors import UserError
from rlheals.restoration.patch import Patch, compose_patches, invert_patch, make_patch
from rlheals.restoration.patch_content import CHECK, FORMAT
from rlheals.spectra.reader import Weights
from tests.restoration.folders import low_rank, same_bits, state, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SHAPE = {"layers": 1, "hidden": 64, "intermediate": 48}


def few(name: str, tensor: Tensor) -> Tensor:
    """The tensor with two other numbers, which are stored by their positions."""
    if "down_proj" not in name:
        return tensor
    changed = tensor.clone()
    changed[0, 0] += 1
    changed[3, 5] -= 2
    return changed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and patches with factors and with positions."""
    root = tmp_path_factory.mktemp("patches")
    base = write(root / "base", **SHAPE)
    for name, change in (("factors", low_rank), ("positions", few)):
        make_patch(base, write(root / f"after-{name}", **SHAPE, change=change), root / name)
    return root


def applied(patch: Path, base: Path) -> dict[str, Tensor]:
    with Patch(patch) as opened, Weights(base) as weights:
        opened.check_base(weights)
        return {name: opened.apply(name, weights.tensor(name)) for name in opened.entries}


def uses(patch: Path, other: Path) -> list[Callable[[], object]]:
    """All that is done with a patch but applying it."""

    def shown() -> object:
        with Patch(patch) as opened:
            return as_content(opened)

    out = patch.with_name("out")
    return [
        lambda: invert_patch(patch, out),
        lambda: compose_patches(patch, other, out),
        lambda: compose_patches(other, patch, out),
        shown,
    ]


@pytest.mark.parametrize("kind", ["factors", "positions"])
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5), st.booleans()
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bytes_are_noticed(made: Path, kind: str, flips: list[tuple[float, int]], in_header: bool) -> None:
    whole = bytearray((made / kind).read_bytes())
    length = int.from_bytes(whole[:8], "little") + 8 if in_header else len(whole)
    for place, byte in flips:
        whole[int(place * length)] = byte
    path = made / "flipped"
    path.write_bytes(whole)
    with suppress(UserError):
        after = state(made / f"after-{kind}")
        assert all(same_bits(after[name], tensor) for name, tensor in applied(path, made / "base").items())
    for use in uses(path, made / kind):
        with suppress(UserError):
            use()


@pytest.mark.parametrize(
    ("kind", "part", "change", "told"),
    [
        ("positions", "positions", lambda tensor: tensor + 10**6, "positions are not those"),
        ("positions", "positions", lambda tensor: -1 - tensor, "positions are not those"),
        ("positions", "positions", lambda tensor: tensor[:1], "not as many"),
        ("positions", "positions", lambda tensor: tensor.float(), "another type"),
        ("positions", "values", lambda tensor: tensor.long(), "another type"),
        ("factors", "left", lambda tensor: tensor[:-1], "other shapes"),
        ("factors", "right", lambda tensor: tensor.double(), "another type"),
        ("factors", "dense", lambda tensor: tensor[:-1], "not as many as the weight's"),
    ],
)
def test_parts_that_do_not_fit_are_told(
    made: Path, kind: str, part: str, change: Callable[[Tensor], Tensor], told: str
) -> None:
    with safe_open(made / kind, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith(part))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, made / "altered", metadata=metadata)
    with pytest.raises(UserError, match=told):
        applied(made / "altered", made / "base")
    with pytest.raises(UserError, match=told):
        uses(made / "altered", made / kind)[0]()


@pytest.mark.parametrize(
    ("key", "value"),
    [("shape", [64, 6400000000]), ("shape", ["64", 64]), ("dtype", "I8"), ("before", 3), ("ranks", [-1]), ("ranks", 2)],
)
@pytest.mark.parametrize("signed", [True, False])
def test_a_description_of_another_type_is_told(made: Path, key: str, value: object, signed: bool) -> None:
    """Also where it has a sha256 of its own that fits."""
    with safe_open(made / "factors", framework="pt") as file:
        content = json.loads(file.metadata()[FORMAT])
    for entry in content["tensors"].values():
        entry[key] = value
    text = json.dumps(content)
    check = hashlib.sha256(text.encode()).hexdigest() if signed else "0" * 64
    save_file({"a": torch.zeros(2)}, made / "described", metadata={FORMAT: text, CHECK: check})
    with pytest.raises(UserError, match=r"damaged|lacks"):
        invert_patch(made / "described", made / "out")
