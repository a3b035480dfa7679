"""What a folder is that is no plain model folder, and what to do about it, in one sentence.

People point at what their training framework left: an adapter, shards of an optimiser, the folder above. Each kind
has a sentence of its own, so that nobody repairs the wrong thing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = "adapter_model.*"
_LFS = b"version https://git-lfs"
_SHARD = re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$")
_PICKLED = ("pytorch_model*.bin", "pytorch_model*.pt", "consolidated*.pth", "model*.pt", "model*.pth", "model*.bin")
_NO_WEIGHTS = ("optimizer.*", "scheduler.*", "training_args.bin", "rng_state*.pth", "scaler.pt")
_UNMERGED = re.compile(r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.")
_SHOWN = 3


def check_adapter(path: Path) -> None:
    """Refuse a folder whose weights are not the whole model, because loaders attach the adapter beside them.

    Raises:
        UserError: there are files of an adapter.
    """
    found = sorted([*path.glob(ADAPTER_CONFIG), *path.glob(_ADAPTERS)])
    if not found:
        return
    if any(path.glob("*.safetensors.index.json")) or any(_weights_of(path)):
        raise UserError(
            f"{path} holds full weights and {found[0].name} beside them, so loaders answer with the adapter on top; "
            "if it is merged already, delete the adapter's files, else merge it and point to the merged folder."
        )
    raise UserError(
        f"{path} is an adapter, which is a change and not a model; merge it into its base (merge_and_unload of PEFT, "
        "then save_pretrained) and point to the merged folder."
    )


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse weights that were saved with the layers of an adapter in them.

    Raises:
        UserError: a tensor belongs to one.
    """
    found = next((name for name in names if _UNMERGED.search(name)), None)
    if found is not None:
        raise UserError(
            f"{path} was saved with an adapter that is not merged (tensor {found}); merge it (merge_and_unload of "
            "PEFT), save the model again, and point to the new folder."
        )


def check_pointer(file: Path) -> None:
    """Refuse the few lines that git-lfs leaves in the place of a file that was not downloaded.

    Raises:
        UserError: ``file`` is such a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise UserError(f"{file} is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder.")


def explain(path: Path) -> UserError:
    """The error to raise for a folder without ``model.safetensors`` and its index."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.is_file() else "does not exist"
        return UserError(f"{path} {what}; point to a Hugging Face model folder or run the stage that writes it.")
    for kind in (_shards_alone, _sharded_training, _inner_folder, _pickled, _other_formats, _only_training_state):
        sentence = kind(path)
        if sentence:
            return UserError(sentence)
    return UserError(f"{path} has no {WEIGHTS}; point to a Hugging Face model folder or run the stage that writes it.")


def _weights_of(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("model*.safetensors") if file.name == WEIGHTS or _SHARD.match(file.name))


def _shards_alone(path: Path) -> str:
    shards = _weights_of(path)
    if not shards:
        return ""
    return (
        f"{path} holds shards such as {shards[0].name} but not {INDEX}, which says what belongs to the model; copy the "
        "index from the source too, or save the model again."
    )


def _sharded_training(path: Path) -> str:
    if any(path.glob("*.distcp")) or any(path.glob("pytorch_model_fsdp*")):
        where = next((each for each in sorted(path.glob("pytorch_model_fsdp*")) if each.is_dir()), path)
        return (
            f"{path} holds the sharded state of FSDP and no model; consolidate it (accelerate merge-weights {where} "
            "OUT) and point to the result, with config and tokenizer beside it."
        )
    if any(path.glob("global_step*")) or any(path.glob("*_model_states.pt")):
        return (
            f"{path} holds the sharded state of DeepSpeed and no model; gather it (zero_to_fp32.py in that folder) and "
            "point to the result, with config and tokenizer beside it."
        )
    return ""


def _inner_folder(path: Path) -> str:
    candidates = [*path.glob("checkpoint-*"), *path.glob("snapshots/*"), *path.glob("*")]
    inner = list(dict.fromkeys(each for each in candidates if each.is_dir() and _holds_model(each)))
    if not inner:
        return ""
    names = ", ".join(str(each.relative_to(path)) for each in sorted(inner, key=_by_number)[:_SHOWN])
    return f"{path} is no model folder but holds some ({names}); point to one of these."


def _holds_model(path: Path) -> bool:
    return (path / "config.json").is_file() and bool((path / INDEX).is_file() or _weights_of(path))


def _by_number(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _pickled(path: Path) -> str:
    found = sorted(file for pattern in _PICKLED for file in path.glob(pattern))
    if not found:
        return ""
    return (
        f"{found[0]} is a pickled checkpoint, which can run code when loaded; convert it to safetensors "
        "(save_pretrained of a recent transformers does) and point to the new folder."
    )


def _other_formats(path: Path) -> str:
    found = sorted(file for pattern in ("*.gguf", "consolidated*.safetensors", "*.h5") for file in path.glob(pattern))
    if not found:
        return ""
    return f"{found[0]} is not in the format of transformers; convert the model, or download that version of it."


def _only_training_state(path: Path) -> str:
    found = sorted(file for pattern in _NO_WEIGHTS for file in path.glob(pattern))
    if not found:
        return ""
    return f"{path} holds the state of a training run ({found[0].name}) but no weights; point to a folder with a model."
