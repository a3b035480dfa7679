"""Start and stop vLLM without leaving a mark on the rest of the process."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlheals.errors import UserError, first_line
from rlheals.inference.vllm.checks import check_installed, check_model
from rlheals.inference.vllm.settings import arguments, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rlheals.inference.vllm.settings import VllmSettings


_running: set[int] = set()
"""Engines of this process that have not been stopped."""


def start(folder: Path, config: Any, settings: VllmSettings, context: int) -> Any:
    """A ``vllm.LLM`` that serves ``folder``.

    Args:
        folder: Hugging Face folder.
        config: its config.
        settings: what is asked.
        context: longest conversation in tokens.

    Raises:
        UserError: vLLM is missing or of another release, does not serve the model, or does not start; another engine
            runs in this process.
    """
    if _running:
        # Stopping one ends the process groups that all share, and the others could not answer any more.
        raise UserError("a vLLM engine runs in this process already; swap weights in it, or close() it first.")
    check_installed(settings.device)
    os.environ.update(environment(settings))
    print(f"vllm: starting with {folder} (about 10 s)", file=sys.stderr)
    with _unmarked(), _quiet() if settings.in_process else contextlib.nullcontext():
        check_model(folder, config, settings)
        from vllm import LLM

        try:
            llm = LLM(model=str(folder), tokenizer=str(folder), **arguments(settings, config, context))
        except Exception as error:  # whatever its workers raise
            raise UserError(
                f"vLLM does not start with {folder} ({first_line(error, 300)}); lower inference.memory_fraction, "
                "inference.max_sequences or inference.max_context if memory is short, or set inference.engine: "
                "transformers."
            ) from error
    _running.add(id(llm))
    return llm


def shut_down(llm: Any) -> None:
    """Stop an engine, whatever state it is in, so that another can be started in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    _running.discard(id(llm))
    core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    with contextlib.suppress(Exception):  # a dead engine may not even stop
        core.shutdown()  # type: ignore[union-attr]
    del llm, core
    with _unmarked():
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _unmarked() -> Iterator[None]:
    """Give back what vLLM takes from its process: random states, and the function that sets the number of threads."""
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what the engine's C++ parts and loaders print while it starts; errors are exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
