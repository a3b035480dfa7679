"""Which sampling settings a model is asked with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.inference.engine import Sampling
from rlheals.inference.stops import generation_config

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Inference


def sampling_of(inference: Inference, model_dir: Path, max_new_tokens: int, seed: int) -> Sampling:
    """The settings of a params block, or with ``sampling: model`` those of the model's own generation config.

    The paper evaluated with the defaults the models ship with, whatever they are. A generation config without
    ``do_sample`` means greedy, and one that leaves a number out means the library's: temperature 1, no filter.

    Args:
        inference: the block ``inference`` of params.
        model_dir: Hugging Face folder.
        max_new_tokens: token budget of a response.
        seed: of the random numbers.
    """
    stop = tuple(inference.stop)
    if inference.sampling == "explicit":
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=inference.temperature,
            top_p=inference.top_p,
            top_k=inference.top_k,
            seed=seed,
            repetition_penalty=inference.repetition_penalty,
            stop=stop,
        )
    own = generation_config(model_dir)
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=float(_or(own.temperature, 1.0)) if own.do_sample else 0.0,
        top_p=float(_or(own.top_p, 1.0)),
        top_k=int(_or(own.top_k, 0)),
        seed=seed,
        repetition_penalty=float(_or(own.repetition_penalty, 1.0)),
        stop=stop,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
