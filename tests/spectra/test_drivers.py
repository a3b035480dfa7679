"""Every registered driver gives the decomposition; the table names drivers that exist."""

from __future__ import annotations

import pytest
import torch

from rlheals.errors import UserError
from rlheals.spectra.drivers import (
    DRIVERS,
    SAFE,
    TABLE,
    choose,
    decompose,
    driver_named,
    shape_class,
    singular_values_of,
)

CPU = sorted(name for name, driver in DRIVERS.items() if "cpu" in driver.devices)
CUDA = sorted(name for name, driver in DRIVERS.items() if "cuda" in driver.devices)


def draw(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def check(matrix: torch.Tensor, name: str) -> None:
    before = matrix.clone()
    found = decompose(matrix, DRIVERS[name])
    assert torch.equal(matrix, before)
    wide = matrix.double()
    rank = min(matrix.shape)
    unit = torch.eye(rank, dtype=torch.float64, device=matrix.device)
    for rows in (found.left_rows, found.right_rows):
        assert rows.dtype == torch.float64
        assert rows.is_contiguous()
        assert float((rows @ rows.mT - unit).abs().max()) <= 1e-12
    assert found.orthonormality <= 1e-12
    assert float(((found.left_rows.mT * found.values) @ found.right_rows - wide).norm() / wide.norm()) < 1e-11
    expected = torch.linalg.svdvals(wide)
    assert float((found.values - expected).abs().max() / expected[0]) < 1e-12


@pytest.mark.parametrize("shape", [(90, 90), (200, 50), (50, 200), (1, 7), (7, 1)])
@pytest.mark.parametrize("name", CPU)
def test_cpu_drivers(name: str, shape: tuple[int, int]) -> None:
    check(draw(*shape), name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(90, 90), (200, 50), (50, 200)])
@pytest.mark.parametrize("name", CUDA)
def test_cuda_drivers(name: str, shape: tuple[int, int]) -> None:
    check(draw(*shape).cuda(), name)


def test_shape_classes() -> None:
    assert shape_class(128, 4096) == "small"
    assert shape_class(1024, 1024) == shape_class(1024, 2047) == "square"
    assert shape_class(2048, 1024) == shape_class(1024, 2048) == "tall"


def test_table_names_registered_drivers() -> None:
    assert {device for device, _ in TABLE} == {"cpu", "cuda"}
    for (device, kind), name in TABLE.items():
        assert kind in ("small", "square", "tall")
        assert driver_named(name, device).name == name
    assert choose(600, 600, "cpu") == TABLE["cpu", "square"]
    assert driver_named(SAFE, "cpu")


@pytest.mark.parametrize(("name", "device"), [("gesdx", "cpu"), ("cusolver_gesvdj", "cpu"), ("gesdd", "cuda")])
def test_unknown_driver(name: str, device: str) -> None:
    with pytest.raises(UserError, match=f"no driver '{name}' for {device}; choose auto or one of .*gram"):
        driver_named(name, device)


@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90)])
def test_singular_values(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(singular_values_of(matrix), expected, rtol=1e-12, atol=0)
