"""What each edit does to one matrix: small registered functions on cached factors, pure, one matrix at a time.

Every operator gives the target plus a correction, so that what it leaves alone keeps its bits as far as rounding lets
it, and reads only the singular vectors it needs. Work is done in float32, in float64 for float64 weights.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

from rlheals.errors import UserError
from rlheals.restoration.edit import BY_ANGLES
from rlheals.restoration.job import Edited, Job, MatrixView, Pair, Result, distance
from rlheals.restoration.matching import of_norm
from rlheals.restoration.orthonormal import (
    DirectRotation,
    Planes,
    blocks_of,
    carried_by_rest,
    equal_planes,
    geodesic,
    principal_angles_of,
    random_planes,
    rest_of,
    sine_norm,
)
from rlheals.spectra.angles import SIDES, Side, side_reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from rlheals.restoration.edit import Edit
    from rlheals.spectra.factors import FactorView

__all__ = ["OPERATORS", "Edited", "MatrixView", "Pair", "apply_edit", "distance", "operator"]

_BY_FACTORS = ("directions", "values", "rotate", "random_rotation", "round_trip")
_BLOCK = 1 << 20
OPERATORS: dict[str, Callable[[Job], Result]] = {}


def operator(work: Callable[[Job], Result]) -> Callable[[Job], Result]:
    """Register an operator under its function's name."""
    OPERATORS[work.__name__] = work
    return work


def apply_edit(edit: Edit, pair: Pair, *, name: str, inputs_first: bool = False) -> Edited:
    """Edit one tensor.

    An edit that changes nothing (an empty window, a dose of 0, a reference equal to the target, or one that has none of
    the singular directions that it takes) returns the target's tensor itself.

    Args:
        edit: what to do; its scope is the caller's business.
        pair: the tensor of both models.
        name: of the tensor; random controls and amounts depend on it.
        inputs_first: the matrix is stored as (inputs, outputs), see `rlheals.models.topology.Matrix`.

    Raises:
        UserError: the two have different shapes, or the operator cannot take a tensor that is no matrix.
    """
    job = Job(edit, name, pair, inputs_first)
    if job.reference.shape != job.target.shape:
        raise UserError(
            f"tensor {name} is {list(job.reference.shape)} in {edit.reference} but {list(job.target.shape)} in "
            f"{edit.target}; edit models of one architecture."
        )
    if job.target.dim() != 2 and edit.operator not in ("reset", "swap", "interpolate", "noise"):
        raise UserError(f"{edit.operator} edits matrices, but tensor {name} is {list(job.target.shape)}.")
    if _is_identity(job):
        return Edited(job.target, 0.0, 0.0, job.note)
    if edit.operator in _BY_FACTORS:
        vars(job).pop("reference")  # a tensor less in memory; read again if it is needed after all
    result = OPERATORS[edit.operator](job)
    job.read.clear()
    tensor = result.tensor.to(job.target.dtype)
    return Edited(tensor, result.defect, distance(tensor, job.target), job.note)


def _is_identity(job: Job) -> bool:
    """Whether the edit must return the target as it is."""
    if job.edit.operator == "round_trip":
        return False
    if job.edit.amount(job.name) == 0.0 or (job.target.dim() == 2 and not job.width):
        return True
    if job.edit.operator in ("noise", "random_rotation"):
        return False
    equal = torch.equal(job.reference.to(job.target.dtype), job.target)
    return equal and (not _copies(job) or _same_bits(job.copy, job.target))


def _copies(job: Job) -> bool:
    """Whether the edit gives the reference's very tensor, signs of zeros included."""
    operator = job.edit.operator
    return operator in ("swap", "reset") or (operator == "interpolate" and job.edit.amount(job.name) == 1.0)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of equal values are equal bit for bit: a block at a time, 0 and -0 being what may differ."""
    pairs = zip(*(torch.split(tensor.reshape(-1), _BLOCK) for tensor in (one, other)), strict=True)
    return all(torch.equal(torch.signbit(mine), torch.signbit(theirs)) for mine, theirs in pairs)


@operator
def swap(job: Job) -> Result:
    """The reference's matrix."""
    return Result(job.copy)


@operator
def reset(job: Job) -> Result:
    """The reference's tensor, vectors of the layer too."""
    return Result(job.copy)


@operator
def interpolate(job: Job) -> Result:
    """``(1 − t) W_T + t W_B``; the reference's tensor itself at t = 1.

    As a control it is a step of the norm that its t has, also after rounding.
    """
    share = job.edit.amount(job.name)
    if share == 1.0:
        return Result(job.copy)

    def moved(share: float) -> Tensor:
        return job.wide(job.target).lerp_(job.reference.to(job.dtype), share)

    if not job.rounds or job.name not in dict(job.edit.amounts):
        return Result(moved(share))
    return Result(of_norm(moved, job.target, share * distance(job.reference, job.target), share, most=1.0))


@operator
def values(job: Job) -> Result:
    """The window's singular values of the reference under the target's vectors."""
    return Result(_add_triples(job, job.wide(job.target), job.tuned, job.base.values - job.tuned.values, job.window))


@operator
def directions(job: Job) -> Result:
    """The window's vectors of the reference, with basis ``all`` its values too; the target's values and other vectors.

    Vectors of one side only take the sign that fits their partner: of the two ways to write a pair of the reference,
    the one that is nearer to the target's pair.
    """
    if job.width == job.rank:
        return _all_directions(job)
    rest, defect = _rest(job)
    sigma = job.spectrum((job.base if job.edit.basis == "all" else job.tuned).values, job.window)
    left, right = (_window_vectors(job, side) for side in SIDES)
    if len(job.sides) == 1:
        sigma = sigma * _signs(job)
    return Result(rest.addmm_(left * sigma, right.mT), defect)


def _all_directions(job: Job) -> Result:
    """`directions` of the whole rank: no basis is mixed."""
    if job.edit.official or job.edit.basis == "all":
        return Result(job.copy)
    if job.edit.basis == "uv":
        return Result(
            _add_triples(job, job.wide(job.reference), job.base, job.tuned.values - job.base.values, job.window)
        )
    sigma = job.spectrum(job.tuned.values, job.window) * _signs(job)
    left, right = (_window_vectors(job, side) for side in SIDES)
    return Result((left * sigma) @ right.mT)


def _add_triples(job: Job, matrix: Tensor, view: FactorView, weights: Tensor, spans: list[slice]) -> Tensor:
    """Add ``Σ weights[i] u_i v_iᵀ`` over the spans to ``matrix`` in place, a block of vectors at a time."""
    for block in blocks_of(spans):
        left, right = (side_reader(view, side)(block).to(job.dtype) for side in SIDES)
        matrix.addmm_(left * job.spectrum(weights, [block]), right.mT)
    return matrix


def _window_vectors(job: Job, side: Side) -> Tensor:
    """The vectors that the edited matrix has in the window."""
    return job.columns(job.base if side in job.sides else job.tuned, side, job.window)


def _signs(job: Job) -> Tensor:
    """For each triple of the window +1 or −1: the sign of the reference's pair that is nearer to the target's."""
    cosines = torch.zeros(job.width, dtype=job.dtype)
    parts = blocks_of(job.window)
    for block, cosine in zip(parts, torch.split(cosines, [part.stop - part.start for part in parts]), strict=True):
        for side in SIDES:
            ours, theirs = (side_reader(view, side)(block) for view in (job.tuned, job.base))
            cosine += (ours * theirs).sum(dim=0)
    return torch.where(cosines < 0, -1.0, 1.0).to(job.dtype)


def _rest(job: Job) -> tuple[Tensor, float]:
    """The target without its window, turned so that it is orthogonal to the reference's window; and the defect."""
    matrix, sines = _rest_by_factors(job) if 3 * job.width > job.rank else _rest_by_matrix(job)
    return matrix, math.sqrt(2.0 / job.rank) * max(sines)


def _rest_by_matrix(job: Job) -> tuple[Tensor, list[float]]:
    """`_rest` from the vectors of the window alone: cheaper for narrow windows."""
    left, right = (job.columns(job.tuned, side, job.window) for side in SIDES)
    sigma = job.spectrum(job.tuned.values, job.window)
    matrix = job.wide(job.target).addmm_(left * sigma, right.mT, alpha=-1.0)
    sines = []
    for side in job.sides:
        old, new = _both(job, side, job.window)
        if job.edit.official:
            sines.append(sine_norm(old, new))
            continue
        rotation = DirectRotation(old, new)
        rotation.carry_(matrix if side == "left" else matrix.mT)
        sines.append(rotation.sine)
    return matrix, sines


def _rest_by_factors(job: Job) -> tuple[Tensor, list[float]]:
    """`_rest` as the sum of the triples that stay: cheaper for wide windows."""
    spans = rest_of(job.window, job.rank)
    frames = {side: job.columns(job.tuned, side, spans) for side in SIDES}
    sines = []
    for side in job.sides:
        few, outside = _few(job, side)
        old, new = _both(job, side, few)
        if job.edit.official:
            sines.append(sine_norm(old, new))
        elif outside:
            frames[side], sine = carried_by_rest(old, new)
            sines.append(sine)
        else:
            rotation = DirectRotation(old, new)
            frames[side] = rotation.carry_(frames[side].clone())
            sines.append(rotation.sine)
    sigma = job.spectrum(job.tuned.values, spans)
    return (frames["left"] * sigma) @ frames["right"].mT, sines


def _both(job: Job, side: Side, spans: list[slice]) -> tuple[Tensor, Tensor]:
    """The same vectors of the target and of the reference."""
    return job.columns(job.tuned, side, spans), job.columns(job.base, side, spans)


def _few(job: Job, side: Side) -> tuple[list[slice], bool]:
    """The columns whose span determines the window's rotation on this side, and whether these are the ones outside."""
    square = job.target.shape[0 if side == "left" else 1] == job.rank
    if square and 2 * job.width >= job.rank:
        return rest_of(job.window, job.rank), True
    return job.window, False


@operator
def rotate(job: Job) -> Result:
    """The target turned a share t of the way from its window's spans to the reference's; its vectors ride along."""
    share = job.edit.amount(job.name)

    def planes(side: Side) -> Planes | None:
        spans, _ = _few(job, side)
        return geodesic(*_both(job, side, spans)) if spans else None

    return Result(_turn(job, planes, share))


@operator
def random_rotation(job: Job) -> Result:
    """A control: the target's window turned by the angles it has to the reference's, but in a random direction.

    With an amount for the tensor, as many dimensions as its rank turn instead, in random planes by one angle, such that
    the change has this norm: for whole spectra, whose spans have no angles, and for edits that are no matter of angles.
    """
    norm = dict(job.edit.amounts).get(job.name)
    has_angles = job.edit.controlled in BY_ANGLES and job.width < job.rank
    if norm is not None and not has_angles:
        return Result(_turn_to_norm(job, norm))

    def planes(side: Side) -> Planes | None:
        spans, _ = _few(job, side)
        if not spans:
            return None
        old, new = _both(job, side, spans)
        count = min(old.shape[1], old.shape[0] - old.shape[1])
        return random_planes(old, principal_angles_of(old, new)[:count], _generator(job, side)) if count else None

    return Result(_turn(job, planes, job.edit.dose))


def _turn(job: Job, planes: Callable[[Side], Planes | None], share: float) -> Tensor:
    """The target with each side turned in its planes."""
    matrix = job.wide(job.target)
    for side in job.sides:
        found = planes(side)
        job.read.clear()
        if found is not None:
            found.turn_(matrix if side == "left" else matrix.mT, share)
    return matrix


def _turn_to_norm(job: Job, norm: float) -> Tensor:
    """The target turned in random planes by the one angle that changes it by this Frobenius norm, if any does."""
    start = job.wide(job.target)
    planes: dict[Side, Planes] = {}
    for side in job.sides:
        length = job.target.shape[0 if side == "left" else 1]
        planes[side] = equal_planes(length, job.rank // 2, _generator(job, side), start)
    if job.rounds:
        first = norm / max(norm, float(torch.linalg.vector_norm(start)))
        return of_norm(lambda angle: _turn(job, planes.get, angle), job.target, norm, first, most=math.pi)
    angle = 0.01
    for _ in range(12):
        turned = _turn(job, planes.get, angle)
        found = distance(turned, start)
        if abs(found - norm) <= 1e-4 * norm or angle >= math.pi or not found:
            break
        angle = min(math.pi, angle * norm / found)
    return turned


@operator
def noise(job: Job) -> Result:
    """A control: Gaussian noise whose norm is the tensor's amount, else the dose times the drift from the reference."""
    norm = dict(job.edit.amounts).get(job.name)
    if norm is None:
        norm = job.edit.dose * distance(job.reference, job.target)
    draw = torch.randn(job.target.shape, generator=_generator(job, ""), dtype=job.dtype)
    length = float(torch.linalg.vector_norm(draw))
    if job.rounds:
        return Result(of_norm(lambda size: (draw * (size / length)).add_(job.target), job.target, norm, norm))
    return Result(draw.mul_(norm / length).add_(job.target))


@operator
def round_trip(job: Job) -> Result:
    """A control: the target put together again from its own factors, which changes nothing but rounding."""
    matrix = torch.zeros(job.target.shape, dtype=job.dtype)
    return Result(_add_triples(job, matrix, job.tuned, job.tuned.values, [slice(0, job.rank)]))


@operator
def remove_inside(job: Job) -> Result:
    """The target without the part of its drift from the reference's right vectors in the window to its left ones."""
    drift, block = _drift(job)
    left, right = block
    core = left.mT @ drift @ right
    return Result(job.wide(job.target).addmm_(left, core @ right.mT, alpha=-job.edit.dose))


@operator
def remove_outside(job: Job) -> Result:
    """The target without the rest of its drift."""
    drift, block = _drift(job)
    left, right = block
    core = left.mT @ drift @ right
    outside = drift.addmm_(left, core @ right.mT, alpha=-1.0)
    return Result(job.wide(job.target).add_(outside, alpha=-job.edit.dose))


def _drift(job: Job) -> tuple[Tensor, list[Tensor]]:
    """``W_T − W_B``, and the reference's vectors of the window on both sides."""
    drift = job.wide(job.target).sub_(job.reference.to(job.dtype))
    return drift, [job.columns(job.base, side, job.window) for side in SIDES]


def _generator(job: Job, side: str) -> torch.Generator:
    """A stream of its own for each seed, tensor and side, the same in every process."""
    digest = hashlib.sha256(f"{job.edit.seed}|{job.name}|{side}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
