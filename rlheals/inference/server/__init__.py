"""An OpenAI-compatible server, such as ``vllm serve`` on another host, behind the project's `Engine`."""

from __future__ import annotations

from rlheals.inference.server.engine import ServerEngine as ServerEngine
