"""vLLM behind the project's `Engine`: started once, then given the weights of one model after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.inference.vllm.settings import VllmSettings as VllmSettings

if TYPE_CHECKING:
    from rlheals.inference.vllm.engine import VllmEngine as VllmEngine
