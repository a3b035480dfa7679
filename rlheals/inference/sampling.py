"""Which sampling settings a model is asked with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, StrictBool, ValidationError

from rlheals.errors import UserError
from rlheals.inference.engine import Sampling
from rlheals.models.checkpoint import generation_config, generation_file
from rlheals.params import Count, NucleusShare, Rate, Temperature  # noqa: TC001  read by pydantic

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Inference

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}
"""Fields of a generation config that change responses and that our engines do not all have, with the values, beside
null, that switch each off."""
UNSUPPORTED_SAMPLED: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""The same for fields that count only when tokens are sampled."""


def sampling_of(inference: Inference, model_dir: Path, max_new_tokens: int, seed: int) -> Sampling:
    """The settings of a params block, or with ``sampling: model`` those of the model's own generation config.

    The paper evaluated with the defaults the models ship with, whatever they are. A generation config without
    ``do_sample`` means greedy, and one that leaves a number out means the library's, as in its ``generate``: when
    sampling, temperature 1 and the 50 likeliest tokens.

    Args:
        inference: the block ``inference`` of params.
        model_dir: Hugging Face folder.
        max_new_tokens: token budget of a response.
        seed: of the random numbers.

    Raises:
        UserError: the generation config cannot be read, or asks for what our engines do not do.
    """
    if inference.sampling == "explicit":
        chosen: _Chosen | Inference = inference
    else:
        chosen = _chosen_by(model_dir)
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        seed=seed,
        repetition_penalty=chosen.repetition_penalty,
        stop=tuple(inference.stop),
    )


class _Chosen(BaseModel):
    """What is taken of a generation config."""

    do_sample: StrictBool
    temperature: Temperature
    top_p: NucleusShare
    top_k: Count
    repetition_penalty: Rate


def _chosen_by(model_dir: Path) -> _Chosen:
    """The settings of a model's own generation config, gaps filled as the library's ``generate`` fills them."""
    own, file = generation_config(model_dir), generation_file(model_dir)
    values = own._get_default_generation_params()
    values |= {name: value for name, value in own.to_dict().items() if value is not None}
    unsupported = UNSUPPORTED | (UNSUPPORTED_SAMPLED if values["do_sample"] else {})
    for name, off in unsupported.items():
        value = values.get(name)
        if value is not None and value not in off:
            raise UserError(
                f"{file} sets {name} to {str(value)[:80]}, which our engines do not do; set inference.sampling: "
                "explicit, and the settings that you want beside it."
            )
    if not values["do_sample"]:
        values |= GREEDY  # whatever they are, they change nothing
    try:
        return _Chosen.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field, said = first["loc"][0], first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{file}: {field}: {said} (got {str(first['input'])[:80]}); correct it, or set inference.sampling: "
            "explicit."
        ) from error
