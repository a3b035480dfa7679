"""The checked decomposition: quality, determinism, fall-back, bad input, memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import svd

from rlheals.errors import UserError
from rlheals.spectra import drivers, factorise
from rlheals.spectra.drivers import Driver
from rlheals.spectra.factorise import singular_values
from rlheals.spectra.refine import Triples, refine
from tests.spectra.test_memory import ENVIRONMENT


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(60, 60), (90, 30), (30, 90)])
def test_against_scipy(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    found = factorise.factorise(matrix)
    left, values, right = svd(matrix.double().numpy(), full_matrices=False, lapack_driver="gesvd")
    np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-11)
    sign = np.sign(left[np.abs(left).argmax(axis=0), np.arange(values.size)])
    np.testing.assert_allclose(found.left.numpy(), left * sign, atol=1e-9)
    np.testing.assert_allclose(found.right.numpy(), right.T * sign, atol=1e-9)
    assert found.driver == "gram"
    assert found.reconstruction_error < 1e-12
    assert found.orthonormality_error < 1e-12


@pytest.mark.parametrize("shape", [(150, 150), (150, 300)])
def test_same_bytes_and_signs(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    first, second = factorise.factorise(matrix), factorise.factorise(matrix.clone())
    for one, two in zip(
        (first.left, first.values, first.right), (second.left, second.values, second.right), strict=True
    ):
        assert torch.equal(one, two)
    largest = first.left.gather(0, first.left.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


def failing(name: str, error: Exception | None = None) -> Driver:
    def run(matrix: torch.Tensor) -> Triples:
        if error:
            raise error
        found = refine(matrix)
        found.left_rows[0] = found.left_rows[1] * (float("nan") if matrix.shape[0] == 41 else 1.0)
        return found

    return Driver(name, ("cpu",), run, 0.0)


@pytest.mark.parametrize("error", [None, np.linalg.LinAlgError("x"), torch.linalg.LinAlgError("x")])
@pytest.mark.parametrize("rows", [40, 41])
def test_safe_driver_takes_over(error: Exception | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drivers.DRIVERS, "bad", failing("bad", error))
    found = factorise.factorise(draw(rows, 40), "bad")
    assert found.driver == "gesdd"
    assert found.reconstruction_error < 1e-12
    assert found.orthonormality_error < 1e-12


def test_qr_iteration_where_divide_and_conquer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gram", "gesdd"):
        monkeypatch.setitem(drivers.DRIVERS, name, failing(name, np.linalg.LinAlgError("x")))
    assert factorise.factorise(draw(40, 40)).driver == "gesvd"
    monkeypatch.setitem(drivers.DRIVERS, "gesvd", failing("gesvd", np.linalg.LinAlgError("x")))
    with pytest.raises(UserError, match="No driver could decompose a 40 × 40 matrix"):
        factorise.factorise(draw(40, 40))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value: float) -> None:
    matrix = draw(300, 20)
    matrix[299, 3] = value
    for action in (factorise.factorise, singular_values):
        with pytest.raises(UserError, match="300 × 20 matrix holds NaN or infinite"):
            action(matrix)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int8)])
def test_not_a_matrix(bad: torch.Tensor) -> None:
    with pytest.raises(UserError, match="has no singular values"):
        factorise.factorise(bad)


@pytest.mark.parametrize("shape", [(50, 50), (40, 200)])
def test_singular_values(shape: tuple[int, int]) -> None:
    matrix = draw(*shape).bfloat16()
    assert torch.allclose(singular_values(matrix), factorise.factorise(matrix).values, rtol=1e-9)


MEMORY = """
import pathlib, resource, sys, tempfile, torch
from rlheals.spectra.factorise import factorise
from rlheals.spectra.store import FactorStore
driver, limit = sys.argv[3], float(sys.argv[4])
rows, columns, rank = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
torch.set_num_threads(1)
factorise(torch.randn(300, 300), driver)
status = pathlib.Path("/proc/self/status").read_text().splitlines()
now = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
size = 4 * rows * columns
resource.setrlimit(resource.RLIMIT_AS, (now + int(limit * size), -1))
torch.manual_seed(0)
matrix = torch.randn(rows, rank) @ torch.randn(rank, columns) if rank else torch.randn(rows, columns)
with tempfile.TemporaryDirectory() as folder:
    with FactorStore(pathlib.Path(folder), 1 << 40, driver=driver).factors(lambda: matrix, "x") as found:
        assert found.left(slice(0, 8)).shape == (rows, 8)
        assert found.orthonormality_error < 1e-12 and found.driver == driver
"""


def limited(rows: int, columns: int, driver: str, limit: float, rank: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MEMORY, *map(str, (rows, columns, driver, limit, rank))]
    environment = {**ENVIRONMENT, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("rows", "columns", "limit", "rank"),
    [(1536, 1536, 7.5, 0), (1024, 4096, 6.0, 0), (4096, 1024, 6.0, 0), (1536, 1536, 8.5, 8)],
)
def test_address_space_in_tensors(rows: int, columns: int, limit: float, rank: int) -> None:
    """The matrix, its decomposition and the writing of the entry fit under this many float32 sizes of the matrix."""
    done = limited(rows, columns, "gram", limit, rank)
    assert done.returncode == 0, done.stderr


def test_the_limit_can_be_missed() -> None:
    done = limited(1536, 1536, "gesdd", 8.0)
    assert done.returncode != 0
