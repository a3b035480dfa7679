"""Strict reading and writing of Hugging Face model folders: every tensor accounted for, or a clear error."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from rlheals.errors import UserError, disk_errors, first_line
from rlheals.models.folders import INDEX as INDEX
from rlheals.models.folders import WEIGHTS as WEIGHTS
from rlheals.models.folders import check_adapter, check_names, check_pointer, explain
from rlheals.publish import MANIFEST, sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOATING = {"F64", "F32", "F16", "BF16"}
_BUFFER = re.compile(r"(?:^|\.)(rotary_emb\.\w+|inv_freq|masked_bias|position_ids)$")
REPAIR = "copy it again from its source, or delete it and run the stage that writes it"


def load_model(path: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load the causal language model in folder ``path``, in evaluation mode.

    Args:
        path: a Hugging Face folder with ``config.json`` and safetensors, in one file or sharded.
        dtype: type in memory, ``float32`` or ``bfloat16``; floating-point weights of another type are cast.
        device: torch device.

    Raises:
        UserError: no config; pickled, truncated or corrupted weights; a tensor missing, unexpected or of another
            shape than the config says; NaN or infinite weights; a digest that differs from a manifest's; a generation
            config that cannot be read.
    """
    check_digests(path)
    buffers = check_files(path)
    skeleton(path)  # before the weights are read: a config that describes no model is told as such
    generation = generation_config(path)
    model, loaded = _from_pretrained(path, dtype)
    _check_loaded(loaded, buffers, str(path))
    check_finite(model.state_dict(), str(path))
    model.generation_config = generation  # the library's own has nothing of a composite config's text model
    return model.to(device).eval()


def _from_pretrained(path: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what the library says of names and shapes after its own conversion of what is on disk."""
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    with quiet_library():
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES[dtype], output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except MemoryError:
            raise
        except Exception as error:  # the library raises many types for files that do not fit the config
            raise UserError(
                f"{path} does not load as a causal language model ({first_line(error)}); use the config and weights of "
                "one and the same model."
            ) from error
    return model, loaded


def _check_loaded(loaded: Mapping[str, Any], buffers: set[str], where: str) -> None:
    """Check that every tensor of the model came from the files, and every one of the files but buffers went into it.

    Raises:
        UserError: naming ``where`` and the tensors that are missing, unexpected or of another shape.
    """
    shapes = [
        f"{name} has shape {list(found)}, not {list(wanted)}" for name, found, wanted in loaded["mismatched_keys"]
    ]
    unexpected = sorted(name for name in loaded["unexpected_keys"] if name not in buffers)
    _raise_problems(sorted(loaded["missing_keys"]), unexpected, sorted(shapes), where)


def _raise_problems(missing: list[str], unexpected: list[str], shapes: list[str], where: str) -> None:
    problems = [
        f"{name_some(names)} {verb}" for names, verb in ((missing, "missing"), (unexpected, "unexpected")) if names
    ]
    problems += [name_some(shapes)] if shapes else []
    if problems:
        raise UserError(
            f"{where} does not hold the weights its config.json describes: {'; '.join(problems)}. "
            "Use the config and weights of one and the same model."
        )


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer in folder ``path``.

    Raises:
        UserError: it is missing or unreadable, or has no chat template or end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many types for a bad file
        raise UserError(f"{path} holds no readable tokenizer ({first_line(error)}); {REPAIR}.") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {path} has no chat template; add chat_template.jinja to the folder.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no end token; set eos_token in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked, so any token serves
    return tokenizer


def generation_file(path: Path) -> Path:
    """The file that holds the generation config of folder ``path``."""
    file = path / GENERATION_CONFIG
    return file if file.is_file() else path / CONFIG


def generation_config(path: Path) -> Any:
    """How the model in folder ``path`` is sampled and which tokens end its responses, by its own files.

    Without ``generation_config.json`` these are what ``config.json`` says of it, or the part on the text model, as
    Hugging Face does. What the file says is taken, not what a config class fills in.

    Raises:
        UserError: the file cannot be read, or the end tokens it names are no token ids.
    """
    from transformers import GenerationConfig

    file = generation_file(path)
    content = read_json(file)
    try:
        if file.name == CONFIG:
            config = GenerationConfig.from_model_config(content)
        else:
            config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises many types for a bad file
        raise UserError(f"{file} holds no readable generation settings ({first_line(error)}); {REPAIR}.") from error
    end = config.eos_token_id
    tokens = end if isinstance(end, list) else [] if end is None else [end]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise UserError(f"{file}: eos_token_id is {end!r}, which is no token id and no list of such; correct it.")
    return config


def load_state(path: Path) -> dict[str, Tensor]:
    """All weights of folder ``path`` by name, for `Engine.swap`, without building a model.

    Raises:
        UserError: as `load_model`, except that names and shapes are checked by the engine.
    """
    check_digests(path)
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        with _readable(file), safe_open(file, framework="pt") as weights:
            state.update({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
    check_finite(state, str(path))
    return state


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer as a folder that loads by itself, readable by all users.

    Raises:
        UserError: the disk is full or not writable.
    """
    with disk_errors(directory), quiet_bars():
        directory.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        tidy(directory)


def tidy(directory: Path) -> None:
    """Drop what differs between equal runs or is no result, and let every user read the rest."""
    for name in ("README.md", "training_args.bin"):
        (directory / name).unlink(missing_ok=True)
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(0o644)  # HF writes weights with mode 600, which a shared cache cannot serve


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in the index's order.

    Raises:
        UserError: there are none (the sentence says what the folder is instead), the index is unreadable or names a
            file that is not there, two sets of weights lie side by side, one is a git-lfs pointer, or an adapter lies
            there.
    """
    check_adapter(path)
    whole, indexed = (path / WEIGHTS).is_file(), (path / INDEX).is_file()
    if not whole and not indexed:
        raise explain(path)
    files = [path / name for name in dict.fromkeys(_weight_map(path).values())] if indexed else [path / WEIGHTS]
    if whole and path / WEIGHTS not in files:
        raise UserError(
            f"{path} holds two sets of weights, {WEIGHTS} and the shards that {INDEX} names, of which loaders take one "
            "or the other; delete the one that is out of date."
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing though {INDEX} names it; {REPAIR}.")
        check_pointer(file)
    return files


def check_files(path: Path) -> set[str]:
    """Check the headers of a folder's weight files, without reading a weight.

    Returns:
        The tensors that are buffers, see `is_buffer`.

    Raises:
        UserError: as `weight_files`; a file is truncated or corrupted, a weight is quantised, an adapter is not merged,
            or a sharded index disagrees with its files.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(path):
        with _readable(file), safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  not a dict
                dtypes[name] = weights.get_slice(name).get_dtype()
                check_floating(file, name, dtypes[name])
    check_names(path, sorted(dtypes))
    if (path / INDEX).is_file():
        check_index(path, set(dtypes))
    return {name for name, dtype in dtypes.items() if is_buffer(name, dtype)}


def is_buffer(name: str, dtype: str = "F32") -> bool:
    """Whether a tensor is no weight but a table that the model computes from its config, which old savers stored.

    Args:
        name: of the tensor.
        dtype: of the tensor, as safetensors names it. Masks and positions are of types that no quantised weight has.

    >>> is_buffer("layers.0.self_attn.rotary_emb.inv_freq"), is_buffer("h.0.attn.bias", "BOOL"), is_buffer("a.bias")
    (True, True, False)
    """
    return bool(_BUFFER.search(name)) or dtype in ("BOOL", "I64") or (dtype == "U8" and name.endswith("attn.bias"))


def check_floating(file: Path, name: str, dtype: str) -> None:
    """Raise `UserError` when tensor ``name`` of ``file`` is of a safetensors type that is not plain floating point."""
    if dtype not in FLOATING and not is_buffer(name, dtype):
        raise UserError(f"{file}: tensor {name} is {dtype}, not floating point; use an unquantised checkpoint.")


def check_state(found: Mapping[str, tuple[int, ...]], model: Any, where: str) -> None:
    """Check that ``found`` has exactly the tensors of ``model``; a tied tensor may be stored once or under each name.

    Raises:
        UserError: naming ``where`` and the tensors that are missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners = {**{source: target for target, source in tied.items()}, **tied}
    missing = [name for name in expected if name not in found and partners.get(name) not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} has shape {list(found[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    _raise_problems(missing, unexpected, shapes, where)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `UserError` naming the first tensor of ``state`` with a NaN or an infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{where}: tensor {name} holds NaN or infinite values; the checkpoint is unusable, retrain it."
            )


def check_digests(path: Path) -> None:
    """Compare the folder's files with the manifest beside them or one level up, where there is one.

    Raises:
        UserError: a listed file is missing or its sha256 differs.
    """
    for directory in (path, path.resolve().parent):
        if not (directory / MANIFEST).is_file():
            continue
        prefix = "" if directory == path else f"{path.resolve().name}/"
        for name, digest in read_json(directory / MANIFEST).items():
            if not name.startswith(prefix) or Path(name).suffix == ".parquet":
                continue
            file = directory / name
            if not file.is_file() or sha256_file(file) != digest:
                raise UserError(f"{file} is missing or corrupted (its sha256 is not the manifest's); {REPAIR}.")


def skeleton(path: Path) -> Any:
    """The model that ``config.json`` describes, on the meta device: names and shapes without memory.

    Raises:
        UserError: there is no config, or it describes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}, so it is not a Hugging Face model folder; fix the path or {REPAIR}.")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library raises many types for a bad config
        raise UserError(
            f"{path / CONFIG} describes no model that can be built ({first_line(error)}); {REPAIR}."
        ) from error


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Tell an unreadable safetensors file as a `UserError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise damaged(file, first_line(error)) from error


def damaged(file: Path, reason: str) -> UserError:
    """The error to raise for a weight file that cannot be what was saved."""
    return UserError(f"{file} is truncated or corrupted ({reason}); {REPAIR}.")


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep the library's own progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep progress bars and what the library reports of a load off the terminal; it is told in our own sentences."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_bars():
            yield
    finally:
        logging.set_verbosity(level)


def _weight_map(path: Path) -> dict[str, str]:
    mapping = read_json(path / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path / INDEX} has no weight_map; {REPAIR}.")
    for name, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path / INDEX} gives {file!r} as the file of {name}, not the name of one; {REPAIR}.")
    return mapping


def check_index(path: Path, stored: set[str]) -> None:
    """Raise `UserError` when the sharded folder's index does not name exactly the ``stored`` tensors."""
    named = set(_weight_map(path))
    if named != stored:
        raise UserError(f"{path / INDEX} and its files disagree on {name_some(sorted(named ^ stored))}; {REPAIR}.")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; `UserError` when it holds none."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not valid JSON; {REPAIR}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object; {REPAIR}.")
    return content


def name_some(names: list[str], shown: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
