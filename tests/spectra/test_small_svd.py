"""Decompositions go on where LAPACK's divide and conquer gives up, and keep its bits where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from rlheals.restoration.orthonormal import DirectRotation, geodesic, orthonormal, polar
from rlheals.spectra.small_svd import svd, svdvals

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED = {"one": (torch.float32,), "two": (torch.float32, torch.float64)}


def gives_up(on: tuple[torch.dtype, ...], own: Callable[..., Any]) -> Callable[..., Any]:
    """LAPACK as it is for some overlaps: no convergence in these types."""

    def run(matrix: torch.Tensor, **options: Any) -> Any:
        if matrix.dtype in on:
            raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]
        return own(matrix, **options)

    return run


@pytest.fixture(params=REFUSED)
def stubborn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, gives_up(REFUSED[request.param], getattr(torch.linalg, name)))


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("stubborn")
@pytest.mark.parametrize("shape", [(8, 8), (9, 5), (5, 9)])
def test_another_way_is_found(shape: tuple[int, int]) -> None:
    whole = matrix(*shape)
    left, values, right = svd(whole, full_matrices=False)
    assert {part.dtype for part in (left, values, right, svdvals(whole))} == {torch.float32}
    torch.testing.assert_close((left * values) @ right, whole)
    torch.testing.assert_close(svdvals(whole), values)


@pytest.mark.usefixtures("stubborn")
def test_rotations_between_bases_are_found() -> None:
    old, new = orthonormal(matrix(12, 8)).split(4, dim=1)
    torch.testing.assert_close(polar(old[:4]) @ polar(old[:4]).mT, torch.eye(4))
    assert DirectRotation(old, new).sine == pytest.approx(2.0, rel=1e-5)
    turned = geodesic(old, new).turn_(old.clone())
    torch.testing.assert_close(new @ (new.mT @ turned), turned, atol=1e-5, rtol=0)


def test_the_first_way_keeps_its_bits() -> None:
    whole = matrix(9, 9)
    assert all(torch.equal(*pair) for pair in zip(svd(whole), torch.linalg.svd(whole), strict=True))
    assert torch.equal(svdvals(whole), torch.linalg.svdvals(whole))


def test_what_is_not_finite_is_still_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        svd(torch.full((3, 3), float("nan")))
