"""Rayleigh–Ritz in float64: from a matrix, and maybe a rough right basis, to singular vectors orthonormal to 1e-12.

The Gram matrix of the columns is diagonalised (SciPy's ``syevr``, relatively robust representations, the eigensolver
with the smallest workspace; ``syevd``, divide and conquer, for tall matrices, where memory is no question). Squaring
loses what lies below ``sqrt(eps)`` of the largest singular value, so only the vectors within `WINDOW` of the largest
are accepted, the rest is projected away from them and taken up again by itself: each round sees only its own scale,
down to the rounding of the matrix, where the basis is completed. Nothing divides by a spectral gap, so clusters, tiny
values and exact rank deficiency need no special care.

Bases are held as rows (``r × m``, the transposes), which is also how the store lays them out. For an (m, n) matrix
with m ≥ n the peak is the matrix itself, both bases and one n × n matrix; see `refine`.

Sources: Golub and Van Loan, Matrix Computations, 8.6 (Gram, Rayleigh–Ritz); Dhillon and Parlett 2004 (syevr); Higham
1986 (SIAM J. Sci. Stat. Comput. 7; Newton steps to the polar factor); Giraud, Langou, Rozložník and van den Eshof 2005
(block Gram–Schmidt, "twice is enough"); Higham, Accuracy and Stability of Numerical Algorithms, chapter 19
(Householder QR). The alternative of Ogita and Aishima 2020 (Japan J. Indust. Appl. Math. 37) corrects both bases at
once, but needs three further r × r matrices and care with clusters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

ORTHONORMAL = 8e-13
"""A panel of vectors is repaired when an entry of ``|QᵀQ − 1|`` exceeds this."""
WINDOW = 1e-3
"""A round of the Gram method accepts singular values down to this share of its largest."""
_PANEL = 128
_BLOCK = 128
_PASSES = 4
_NEARLY = 1e-7  # up to here one Newton step to the polar factor, which squares the error, does for Householder QR
_PROBES = 64
_SEED = 20201207


class Triples(NamedTuple):
    """``W = left_rowsᵀ · diag(values) · right_rows``: (r, m), (r,) and (r, n) in float64; vectors are rows.

    ``orthonormality`` is the largest entry of ``|QᵀQ − 1|`` over both bases, measured on all pairs.
    """

    left_rows: Tensor
    values: Tensor
    right_rows: Tensor
    orthonormality: float


def row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of 128 rows of a matrix in float64."""
    for start in range(0, matrix.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, matrix.shape[0]))
        yield block, matrix[block].to(torch.float64)


def refine(matrix: Tensor, right_rows: Tensor | None = None) -> Triples:
    """Thin singular value decomposition of an (m, n) matrix, m ≥ n, in float64.

    Peak memory beyond the matrix: both bases (8(m + n)n bytes) and, for a badly conditioned matrix or with
    ``right_rows``, up to 8n² bytes more. Values under ``n · eps · largest`` are set to 0.

    Args:
        matrix: (m, n), finite, on any device and of any floating type; it is not written to.
        right_rows: (n, n) approximate right singular vectors to start from; overwritten. Without, the axes.

    Raises:
        numpy.linalg.LinAlgError, torch.linalg.LinAlgError: the eigensolver did not converge.
    """
    rows, rank = matrix.shape
    right, spectrum = _first_round(matrix, right_rows)
    left = torch.empty(rank, rows, dtype=torch.float64, device=matrix.device)
    values = torch.zeros(rank, dtype=torch.float64, device=matrix.device)
    error, start = orthonormalise_rows(right), 0
    floor = rank * torch.finfo(torch.float64).eps * math.sqrt(max(float(spectrum[0]), 0.0))
    while start < rank:
        _apply(matrix, right[start:], left[start:])
        norms = left[start:].norm(dim=1)
        if float(norms.max()) <= floor:
            break
        accepted = _leading(spectrum)
        end = start + accepted
        if accepted == 0 or float(norms[:accepted].min()) <= floor:
            accepted = max(1, int((norms[:accepted].cpu() > floor).long().cumprod(0).sum()))
            end = start + accepted
        error = max(error, _accept(left, values, norms, start, end))
        start = end
        if start < rank:
            spectrum = _next_round(matrix, left, right, start)
            error = max(error, orthonormalise_rows(right, start))
    error = max(error, _complete(left, start))
    _sort(left, values, right)
    return Triples(left, values, right, error)


def _first_round(matrix: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Right basis (rows) and the eigenvalues of the Gram matrix, descending."""
    rank = matrix.shape[1]
    if basis is not None:
        orthonormalise_rows(basis)
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=matrix.device)
    for _, block in row_blocks(matrix):
        _add_gram(gram, block if basis is None else block @ basis.mT)
    spectrum, rotation = _eigh_descending(gram, "evd" if matrix.shape[0] >= 2 * rank else "evr")
    del gram
    if basis is None:
        return rotation, spectrum
    _rotate(basis, rotation)
    return basis, spectrum


def _next_round(matrix: Tensor, left: Tensor, right: Tensor, start: int) -> Tensor:
    """Rotate the right vectors from ``start`` on to the singular vectors of what the accepted ones leave over.

    The Gram matrix of the rest lies in the rows of ``left`` that are still free, so a round needs only one more matrix.
    """
    rest, done = right[start:], left[:start]
    size = rest.shape[0]
    overlap = torch.zeros(start, size, dtype=torch.float64, device=matrix.device)
    for block, part in row_blocks(matrix):
        overlap.addmm_(done[:, block], part @ rest.mT)
    gram = left[start:].view(-1)[: size * size].view(size, size).zero_()
    for block, part in row_blocks(matrix):
        _add_gram(gram, torch.addmm(part @ rest.mT, done[:, block].mT, overlap, alpha=-1))
    del overlap
    spectrum, rotation = _eigh_descending(gram, "evr")
    gram.copy_(rotation)
    del rotation
    _rotate(rest, gram)
    return spectrum


def _add_gram(gram: Tensor, block: Tensor) -> None:
    """Add ``blockᵀ block`` to the lower triangle of ``gram``, on a CPU with half the work of the whole product."""
    if gram.is_cuda:
        gram.addmm_(block.mT, block)
        return
    from scipy.linalg.blas import dsyrk

    # The transposes are column-major, as BLAS wants them, so nothing is copied; the lower triangle is their upper one.
    dsyrk(1.0, block.numpy().T, beta=1.0, c=gram.numpy().T, overwrite_c=1, lower=0)


def _eigh_descending(gram: Tensor, driver: Literal["evd", "evr"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors as rows of the lower triangle of ``gram``, which is destroyed.

    Divide and conquer (``evd``) and robust representations (``evr``) take about equally long. The first gives vectors
    orthonormal to 5e-15, in place, with a workspace of two more matrices; the second to 1e-12, as one more matrix.
    For Gaussian matrices of rank 1024 and 2048 on one thread; `drivers` has the date.
    """
    gram.neg_()  # LAPACK sorts upwards, and reversing the vectors afterwards would take a copy of them
    if gram.is_cuda:
        values, vectors = torch.linalg.eigh(gram)
        return -values, vectors.mT.contiguous()
    from scipy.linalg import eigh

    flipped = gram.numpy().T  # column-major, as LAPACK wants it, so nothing is copied; the lower triangle is the upper
    found, columns = eigh(flipped, lower=False, overwrite_a=True, check_finite=False, driver=driver)
    return -torch.from_numpy(found), torch.from_numpy(columns.T).contiguous()


def _rotate(basis: Tensor, rotation: Tensor) -> None:
    """``basis ← rotation · basis`` in place, by blocks of columns."""
    for start in range(0, basis.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        basis[:, block] = rotation @ basis[:, block]


def _apply(matrix: Tensor, right: Tensor, out: Tensor) -> None:
    """``out ← (matrix · rightᵀ)ᵀ``: images of the right vectors, as rows."""
    for block, part in row_blocks(matrix):
        out[:, block] = (part @ right.mT).mT  # a fifth faster than written in place


def _leading(spectrum: Tensor) -> int:
    """How many leading eigenvalues of a Gram matrix lie within `WINDOW` of the largest singular value."""
    inside = spectrum >= spectrum[0] * WINDOW**2
    return int(inside.long().cumprod(0).sum())


def _accept(left: Tensor, values: Tensor, norms: Tensor, start: int, end: int) -> float:
    """Turn the images in rows ``start`` to ``end`` into left singular vectors and singular values; the error left."""
    worst = 0.0
    for first in range(start, end, _PANEL):
        last = min(first + _PANEL, end)
        panel, length = left[first:last], norms[first - start : last - start]
        panel /= length[:, None]
        image = panel.clone()
        worst = max(worst, _orthonormalise_panel(left[:first], panel))
        values[first:last] = (length * (panel * image).sum(dim=1)).clamp_min_(0.0)
    return worst


def _complete(left: Tensor, start: int) -> float:
    """Fill the rows from ``start`` on with an orthonormal basis of what those before leave, from fixed draws."""
    draw = torch.Generator().manual_seed(_SEED)
    worst = 0.0
    for first in range(start, left.shape[0], _PANEL):
        panel = left[first : first + _PANEL]
        panel.copy_(torch.randn(panel.shape, generator=draw, dtype=torch.float64))
        panel /= panel.norm(dim=1, keepdim=True)
        worst = max(worst, _orthonormalise_panel(left[:first], panel))
    return worst


def orthonormalise_rows(rows: Tensor, start: int = 0) -> float:
    """Make the rows from ``start`` on orthonormal, also to those before, in place; rows that already are stay as is.

    Returns:
        The largest entry of ``|Q Qᵀ − 1|`` over all pairs with a row from ``start`` on, measured after the repair.
    """
    worst = 0.0
    for first in range(start, rows.shape[0], _PANEL):
        worst = max(worst, _orthonormalise_panel(rows[:first], rows[first : first + _PANEL]))
    return worst


def _orthonormalise_panel(done: Tensor, panel: Tensor) -> float:
    """Block Gram–Schmidt against the orthonormal rows ``done``, then Householder QR within; until nothing is left."""
    for _ in range(_PASSES):
        overlap, within = panel @ done.mT, panel @ panel.mT
        within.diagonal().sub_(1.0)
        error = max(_largest(overlap), _largest(within))
        if error <= ORTHONORMAL:
            break
        panel.addmm_(overlap, done, alpha=-1)
        if error <= _NEARLY:
            panel.addmm_(within.addmm_(overlap, overlap.mT, alpha=-1), panel.clone(), alpha=-0.5)
            continue
        basis, triangle = torch.linalg.qr(panel.mT)
        sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        panel.copy_(basis.mT).mul_(sign[:, None])
    return error


def _largest(values: Tensor) -> float:
    """Largest size of an entry, without a copy; 0 when there is none."""
    return max(map(abs, map(float, torch.aminmax(values)))) if values.numel() else 0.0


def _sort(left: Tensor, values: Tensor, right: Tensor) -> None:
    """Order the triples by falling singular value, moving only those out of place."""
    order = torch.argsort(values, descending=True, stable=True)
    moved = (order != torch.arange(order.numel(), device=order.device)).nonzero()[:, 0]
    for each in (left, values, right):
        each[moved] = each[order[moved]]


def fix_signs(left_rows: Tensor, right_rows: Tensor) -> None:
    """Make the entry of largest size in each left vector positive, in place; of equal ones, the first counts."""
    for first in range(0, left_rows.shape[0], _PANEL):
        panel = left_rows[first : first + _PANEL]
        largest = panel.gather(1, panel.abs().argmax(dim=1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(panel.dtype)
        panel *= sign
        right_rows[first : first + _PANEL] *= sign


def reconstruction_error(matrix: Tensor, triples: Triples) -> float:
    """Relative Frobenius norm of ``W − U diag(σ) Vᵀ``, estimated with 64 fixed Gaussian probes; 0 for W = 0.

    The squared norm of the error applied to Gaussian vectors is an unbiased estimate of its squared Frobenius norm
    (Hutchinson 1990), off by less than a quarter as a rule, and costs 1/30 of the exact figure.
    """
    draw = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(matrix.shape[1], _PROBES, generator=draw, dtype=torch.float64).to(matrix.device)
    inner = (triples.right_rows @ probes) * triples.values[:, None]
    missed = norm = 0.0
    for block, part in row_blocks(matrix):
        missed += float((part @ probes - triples.left_rows[:, block].mT @ inner).square().sum()) / _PROBES
        norm += float(part.square().sum())
    return math.sqrt(missed / norm) if norm else 0.0
