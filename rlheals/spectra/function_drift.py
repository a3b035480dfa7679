"""What a change of weights does to the function: next-token distributions and hidden states, on given tokens.

Stands beside the drift of the weights, so that a turn that does nothing is seen as such. Everything is measured at the
same positions of the same texts, teacher-forced. A model's `States` are read once and may be compared with many others;
they hold hidden states at a bounded number of positions, never logits, which are formed a few positions at a time.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rlheals.errors import UserError
from rlheals.spectra.angles import principal_angles
from rlheals.spectra.noise import add_noise, change_norm
from rlheals.spectra.nulls import prediction_band

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

POSITIONS = 2048
"""Positions that are measured at most, spread evenly over all texts."""
SHIFT_COMPONENTS = 2
"""Principal components of the base along which the shift of the mean is measured, as in a plot of the first two."""
ANGLE_COMPONENTS = 8
"""Principal components whose spans are compared."""
_LOGITS = 1 << 22
"""Logits held at a time by one model."""
_FROM_BASE_ALONE = ("entropy_before", "margin_before")


class Batch(NamedTuple):
    """Texts of one forward pass, padded on the right.

    Attributes:
        token_ids: (texts, length) int64.
        mask: (texts, length), 1 at tokens and 0 at padding; every token is a position that can be measured.
    """

    token_ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class FunctionRow:
    """One number of one comparison.

    Attributes:
        layer: 0 for the embedding's output, 1 … L for the output of each block (the last one after the final norm, as
            transformers returns it); -1 for next-token distributions.
        quantity: of the distributions, means over positions: ``kl_base_tuned`` = KL(base ‖ tuned) in nats,
            ``entropy_before`` and ``entropy_after`` in nats, ``margin_before`` and ``margin_after``, the probability
            of the likeliest token less that of the second. Of hidden states: ``cka``, linear CKA (1 where one is the
            other turned, scaled and moved); ``pca_shift``, the distance between the mean states along the base's
            first principal components, each in units of the base's standard deviation along it; ``pca_angle``, the
            mean principal angle, in radians, between the spans of the leading principal components.
        value: the measured number.
        tokens: positions behind it.
        noise_low: lower end of the 95 % prediction interval of base + Gaussian noise with each tensor's norm of
            change; None without draws, and for what depends on the base alone.
        noise_high: its upper end.

    Source: Kornblith et al. 2019 (arXiv 1905.00414) for CKA; the source paper's plots of hidden states for the shift
    along two principal components.
    """

    layer: int
    quantity: str
    value: float
    tokens: int
    noise_low: float | None = None
    noise_high: float | None = None


class Components(NamedTuple):
    """Mean (width,), leading directions (width, d) and standard deviations (d,) of hidden states, float64."""

    mean: Tensor
    directions: Tensor
    deviations: Tensor


@dataclass(frozen=True)
class States:
    """What one model makes of the texts at the measured positions.

    Attributes:
        hidden: for the embedding and each block, (positions, width), in the model's precision.
        head: (vocabulary, width) weight of the output head, a copy; ``head_bias`` (vocabulary,) or None.
    """

    hidden: tuple[Tensor, ...]
    head: Tensor
    head_bias: Tensor | None

    @property
    def positions(self) -> int:
        """How many positions were measured."""
        return self.hidden[0].shape[0]

    def log_probabilities(self, part: slice) -> Tensor:
        """(positions, vocabulary) of the next token after some of the positions, float32 (float64 stays)."""
        logits = torch.nn.functional.linear(self.hidden[-1][part], self.head, self.head_bias)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    @cached_property
    def components(self) -> tuple[Components, ...]:
        """Leading principal components of each layer, computed once however many models this one is compared with."""
        return tuple(principal_components(hidden, ANGLE_COMPONENTS) for hidden in self.hidden)


def function_drift(
    base_model: Any,
    tuned_model: Any,
    batches: Sequence[Batch],
    *,
    draws: int = 0,
    seed: int = 0,
) -> list[FunctionRow]:
    """Compare two Hugging Face causal language models on the same tokens.

    For models that do not fit into memory together, or for many pairs, use `read_states`, `compare_states` and
    `noise_bands` one by one.

    Args:
        base_model: the reference; it carries the noise of the draws and is given back bit for bit.
        tuned_model: of the same architecture and vocabulary.
        batches: at least one token in all.
        draws: noise models behind each band; a band needs two at least.
        seed: of the draws.

    Raises:
        UserError: no tokens, other vocabularies, or a model that changes its logits after the output head.
    """
    before, after = read_states(base_model, batches), read_states(tuned_model, batches)
    rows = compare_states(before, after)
    if draws < 2:
        return rows
    norms = change_norms(base_model.state_dict(), tuned_model.state_dict())
    return noise_bands(rows, base_model, before, batches, norms, draws=draws, seed=seed)


def read_states(model: Any, batches: Sequence[Batch], positions: int = POSITIONS) -> States:
    """Run a model over all texts, batch by batch, and keep its hidden states at evenly spread positions.

    Args:
        model: a Hugging Face causal language model; its mode is restored.
        batches: the texts.
        positions: kept at most.

    Raises:
        UserError: no tokens, or logits that are not plainly head(hidden state).
    """
    kept = _spread(batches, positions)
    was_training = model.training
    model.eval()
    pieces = []
    with torch.inference_mode():
        _check_head(model, batches[0])
        for batch, chosen in zip(batches, kept, strict=True):
            if bool(chosen.any()):
                pieces.append(_hidden(model, batch, chosen))
    model.train(was_training)
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    hidden = tuple(torch.cat(layer) for layer in zip(*pieces, strict=True))
    return States(hidden, head.weight.detach().clone(), None if bias is None else bias.detach().clone())


def compare_states(before: States, after: States) -> list[FunctionRow]:
    """All rows of one pair, without bands; the quantities are defined in `FunctionRow`.

    Raises:
        UserError: the models have other vocabularies, widths or layers.
    """
    _check_same(before, after)
    numbers = [(-1, quantity, value) for quantity, value in _distributions(before, after).items()]
    for layer, (old, new) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        numbers.append((layer, "cka", linear_cka(old, new)))
        first, second = before.components[layer], after.components[layer]
        numbers.append((layer, "pca_shift", _shift(first, second)))
        numbers.append((layer, "pca_angle", _angle(first, second)))
    return [FunctionRow(*number, tokens=before.positions) for number in numbers]


def noise_bands(
    rows: Sequence[FunctionRow],
    base_model: Any,
    base: States,
    batches: Sequence[Batch],
    norms: Mapping[str, float],
    *,
    draws: int,
    seed: int,
) -> list[FunctionRow]:
    """The rows with bands from the base model plus noise; the base is given back bit for bit, whatever happens.

    Args:
        rows: of `compare_states`.
        base_model: carries the noise.
        base: its states.
        batches: the texts they were read from.
        norms: Frobenius norm of each tensor's change, see `change_norms`.
        draws: two at least.
        seed: of the draws.
    """
    kept = {name: tensor.detach().clone() for name, tensor in base_model.state_dict().items()}
    found = []
    with _given_back(base_model, kept):
        for draw in range(draws):
            base_model.load_state_dict(noisy_state(kept, norms, f"{seed}/{draw}", tied=_shared(base_model)))
            noise = compare_states(base, read_states(base_model, batches, base.positions))
            found.append([row.value for row in noise])
    low, high = prediction_band(np.array(found))
    return [
        row if row.quantity in _FROM_BASE_ALONE else replace(row, noise_low=float(least), noise_high=float(most))
        for row, least, most in zip(rows, low, high, strict=True)
    ]


def change_norms(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of each floating-point tensor's change; tensors of the same name must have the same shape."""
    return {name: change_norm(base[name], tuned[name]) for name in base if base[name].is_floating_point()}


def noisy_state(
    base: Mapping[str, Tensor], norms: Mapping[str, float], seed: int | str, tied: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A full state dict of the base plus Gaussian noise of the given Frobenius norm a tensor, in the base's dtypes.

    In half precision noise below a weight's rounding is rounded away, as a real change of that size would be.

    Args:
        base: full state dict; not changed.
        norms: by tensor; tensors that it lacks stay as they are.
        seed: the same seed gives the same noise, tensor by tensor.
        tied: names whose tensor is another one, such as a tied head, by the name of that other one.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in base.items():
        source = (tied or {}).get(name, name)
        norm = norms.get(source, 0.0)
        made[name] = add_noise(tensor, norm, f"{seed}/{source}").to(tensor.dtype) if norm > 0 else tensor
    return made


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment ``‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`` of column-centred (n, p) and (n, q) states.

    From whichever is smaller, the products over positions or over dimensions. 1 where one is an orthogonal map of the
    other, scaled and moved; nan where a side does not vary.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), eq. 4.
    """
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        x_gram, y_gram = x @ x.mT, y @ y.mT
        shared = (x_gram * y_gram).sum()
    else:
        shared, x_gram, y_gram = (y.mT @ x).square().sum(), x.mT @ x, y.mT @ y
    return float(shared / (x_gram.norm() * y_gram.norm()))


def principal_components(states: Tensor, count: int) -> Components:
    """The ``count`` leading principal components of (n, width) states; fewer where the states span fewer dimensions.

    From the eigenvectors of the smaller one of the two Gram matrices in float64. Standard deviations are over n.
    """
    wide = states.double()
    mean = wide.mean(0)
    wide = wide - mean
    over_positions = wide.shape[0] < wide.shape[1]
    values, vectors = torch.linalg.eigh(wide @ wide.mT if over_positions else wide.mT @ wide)
    values, vectors = values.flip(0), vectors.flip(1)
    spanned = int((values > 1e-12 * values[0].clamp_min(1e-300)).sum())
    values, vectors = values[: min(count, spanned)], vectors[:, : min(count, spanned)]
    if over_positions:
        vectors = torch.linalg.qr(wide.mT @ vectors).Q
    return Components(mean, vectors, (values / wide.shape[0]).sqrt())


def _spread(batches: Sequence[Batch], positions: int) -> list[Tensor]:
    """Which positions of each batch are kept: all, or every so many, so that the texts' ends are met like the rest."""
    total = sum(int(batch.mask.bool().sum()) for batch in batches)
    if total == 0:
        raise UserError("there is no token to compare the models on; give prompts that are not empty.")
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[torch.linspace(0, total - 1, min(total, positions), dtype=torch.float64).round().long()] = True
    kept, start = [], 0
    for batch in batches:
        mask = batch.mask.bool().cpu()
        chosen = torch.zeros_like(mask)
        count = int(mask.sum())
        chosen[mask] = wanted[start : start + count]
        kept.append(chosen)
        start += count
    return kept


def _hidden(model: Any, batch: Batch, chosen: Tensor) -> list[Tensor]:
    """Hidden states of the embedding and each block at the chosen positions.

    The last one is normed already; norming it once more would make other distributions.
    """
    ids, mask = batch.token_ids.to(model.device), batch.mask.long().to(model.device)
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    where = chosen.to(model.device)
    return [state[where] for state in (*states.hidden_states[:-1], states.last_hidden_state)]


def _check_head(model: Any, batch: Batch) -> None:
    """Refuse a model whose logits are not head(hidden): scaled or soft-capped ones would be measured wrongly."""
    ids = batch.token_ids[:1, :4].to(model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected, found = model(input_ids=ids, use_cache=False).logits, model.get_output_embeddings()(hidden)
    if not torch.allclose(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()), equal_nan=True):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (scaling or soft-capping), which the "
            "drift of next-token distributions does not do; leave function drift out (--no-function)."
        )


def _check_same(before: States, after: States) -> None:
    shapes = [[state.head.shape[0], *(layer.shape for layer in state.hidden)] for state in (before, after)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the models cannot be compared on the same tokens: vocabulary, layers or width differ ({shapes[0][0]} and "
            f"{shapes[1][0]} tokens, {len(shapes[0]) - 2} and {len(shapes[1]) - 2} blocks); compare models of one base."
        )


def _distributions(before: States, after: States) -> dict[str, float]:
    """Means over positions of what the next-token distributions give, some positions at a time."""
    sums: dict[str, float] = {}
    step = max(1, _LOGITS // before.head.shape[0])
    with torch.inference_mode():
        for start in range(0, before.positions, step):
            part = slice(start, start + step)
            old, new = before.log_probabilities(part), after.log_probabilities(part)
            numbers = {
                "kl_base_tuned": (old.exp() * (old - new)).sum(-1),
                "entropy_before": _entropy(old),
                "entropy_after": _entropy(new),
                "margin_before": _margin(old),
                "margin_after": _margin(new),
            }
            for name, values in numbers.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {name: total / before.positions for name, total in sums.items()}


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _margin(log_probabilities: Tensor) -> Tensor:
    best = log_probabilities.topk(2, dim=-1).values.exp()
    return best[..., 0] - best[..., 1]


def _shift(base: Components, moved: Components) -> float:
    along = (moved.mean - base.mean) @ base.directions[:, :SHIFT_COMPONENTS]
    return float((along / base.deviations[:SHIFT_COMPONENTS]).norm())


def _angle(base: Components, moved: Components) -> float:
    shared = min(base.directions.shape[1], moved.directions.shape[1])
    return float(principal_angles(base.directions[:, :shared], moved.directions[:, :shared]).mean())


def _shared(model: Any) -> dict[str, str]:
    """Names in the state dict that are another one's tensor, by that other name."""
    first: dict[tuple[int, int], str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        owner = first.setdefault((tensor.data_ptr(), tensor.numel()), name)
        if owner != name:
            found[name] = owner
    return found


@contextmanager
def _given_back(model: Any, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Whatever the body loads into the model, it holds ``state`` again afterwards."""
    try:
        yield
    finally:
        model.load_state_dict(state)
