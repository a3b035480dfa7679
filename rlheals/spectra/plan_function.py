"""How long function drift will take: measured on the model's own architecture with one layer and with two.

Everything but the embedding and the head grows with the layers, so the two give the whole model; few texts give all
texts. Weights are random, because none are needed to know a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlheals.errors import UserError, first_line
from rlheals.spectra.function_question import as_batches
from rlheals.spectra.noise import add_noise
from rlheals.spectra.sampled_texts import TEXTS, TOKENS, sample
from rlheals.spectra.timing import timed

if TYPE_CHECKING:
    from pathlib import Path

FEW_TEXTS, FEW_TOKENS = 8, 6
_NOISE = 1 << 20  # numbers of the tensor on which the cost of noise is measured


@dataclass(frozen=True)
class FunctionCost:
    """Seconds of function drift.

    Attributes:
        texts: sampling the texts, once.
        compare: running both models of a pair and comparing them.
        draw: one noise model of a pair.
    """

    texts: float
    compare: float
    draw: float


def function_cost(base: Path, device: str = "cpu") -> FunctionCost:
    """The cost for the model in folder ``base``, from its config alone.

    Raises:
        UserError: its architecture cannot be built with fewer layers.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        layers = int(config.get_text_config().num_hidden_layers)
        one, two = (_measured(base, count, device) for count in (1, 2))
    except Exception as error:  # the library raises many types for what it cannot build
        raise UserError(f"{base} cannot be built with fewer layers, to time it ({first_line(error)}).") from error
    whole = {name: one[name] + (layers - 1) * max(0.0, two[name] - one[name]) for name in one}
    noise = whole["numbers"] * _noise_rate()
    return FunctionCost(whole["texts"], whole["compare"], noise + whole["draw"])


def _measured(base: Path, layers: int, device: str) -> dict[str, float]:
    """Seconds of each part with so many layers, for all texts; the noise itself left out, its numbers told."""
    from rlheals.spectra.function_drift import function_drift

    one, other = (_random_model(base, layers, device, seed) for seed in (0, 1))
    numbers = sum(parameter.numel() for parameter in one.parameters())
    vocabulary = one.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (FEW_TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    batches = as_batches(ids.tolist())
    _, sampled = timed(lambda: sample(one, 0, 0, tokens=FEW_TOKENS), device)
    _, compared = timed(lambda: function_drift(one, other, batches), device)
    _, drawn = timed(lambda: function_drift(one, other, batches, draws=2), device)
    share = TEXTS / FEW_TEXTS
    draw = max(0.0, (drawn - compared) / 2 - numbers * _noise_rate())
    steps = (TOKENS - 1) / (FEW_TOKENS - 1)
    return {"texts": sampled * steps, "compare": compared * share, "draw": draw * share, "numbers": float(numbers)}


def _random_model(base: Path, layers: int, device: str, seed: int) -> Any:
    """The architecture of the folder with so many layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == whole:  # one entry for each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).to(device).eval()


def _noise_rate() -> float:
    """Seconds a number of a noise model."""
    tensor = torch.zeros(math.isqrt(_NOISE), math.isqrt(_NOISE))
    return timed(lambda: add_noise(tensor, 1.0, "0"), "cpu")[1] / tensor.numel()
