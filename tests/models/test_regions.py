"""Region maps are exact, and the Fourier features are GLIGEN's."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hcma_fast.models.regions import FOURIER_WIDTH, cell_coverage, fourier_embed

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GRID = 4
unit = st.floats(0, 1)
intervals = st.tuples(unit, unit).map(sorted)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def coverage(box: tuple[float, float, float, float], rows: int, columns: int) -> Tensor:
    boxes = torch.tensor(box, dtype=torch.float64).view(1, 1, 4)
    return cell_coverage(boxes, rows, columns)[0, 0].view(rows, columns)


def exact(low: float, high: float, cell: int, cells: int) -> Fraction:
    """Share of a cell that an interval covers, in rational numbers: no rounding at all."""
    start, stop = Fraction(cell, cells), Fraction(cell + 1, cells)
    return max(Fraction(0), min(Fraction(high), stop) - max(Fraction(low), start)) * cells


@untimed
@given(intervals, intervals, grids)
def test_coverage_is_exact(xs: list[float], ys: list[float], grid: tuple[int, int]) -> None:
    rows, columns = grid
    found = coverage((xs[0], ys[0], xs[1], ys[1]), rows, columns)
    for row in range(rows):
        for column in range(columns):
            share = exact(*ys, row, rows) * exact(*xs, column, columns)
            assert float(found[row, column]) == pytest.approx(float(share), abs=1e-14)


@untimed
@given(intervals, intervals, grids)
def test_cells_add_up_to_the_box(xs: list[float], ys: list[float], grid: tuple[int, int]) -> None:
    rows, columns = grid
    found = coverage((xs[0], ys[0], xs[1], ys[1]), rows, columns)
    area = (xs[1] - xs[0]) * (ys[1] - ys[0])
    assert float(found.sum()) / (rows * columns) == pytest.approx(area, abs=1e-14)
    assert found.min() >= 0 and found.max() <= 1 + 1e-14


def test_coverage_against_supersampling() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 5, 2, 2, generator=generator)
    boxes = torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)
    fine = 400
    points = (torch.arange(fine) + 0.5) / fine
    x0, y0, x1, y1 = (side[..., None] for side in boxes.unbind(-1))
    in_x, in_y = (points > x0) & (points < x1), (points > y0) & (points < y1)
    inside = (in_y[..., :, None] & in_x[..., None, :]).float()
    cells = torch.nn.functional.avg_pool2d(inside, fine // GRID).flatten(-2)
    # each edge is off by half a point at most, in a cell of 100 points
    torch.testing.assert_close(cell_coverage(boxes, GRID, GRID), cells, rtol=0, atol=0.025)


def test_whole_image_and_cell_aligned_boxes() -> None:
    torch.testing.assert_close(coverage((0, 0, 1, 1), 3, 5), torch.ones(3, 5).double())
    assert coverage((0.25, 0.5, 0.75, 1), 2, 4).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    # rows first: a wide, low box fills a row
    wide = coverage((0, 0, 1, 0.5), 2, 3)
    torch.testing.assert_close(wide, torch.tensor([[1.0] * 3, [0.0] * 3]).double())


@pytest.mark.parametrize("side", [1e-1, 1e-3, 1e-6])
def test_box_smaller_than_a_cell(side: float) -> None:
    boxes = torch.tensor([[[0.3, 0.55, 0.3 + side, 0.55 + side]]])
    found = cell_coverage(boxes, GRID, GRID)[0, 0]
    assert found.nonzero().tolist() == [[2 * GRID + 1]]
    assert float(found.sum()) == pytest.approx((side * GRID) ** 2, rel=0.2)


def test_padding_has_no_coverage() -> None:
    assert not cell_coverage(torch.zeros(1, 2, 4), GRID, GRID).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fourier_features_are_gligens(dtype: torch.dtype) -> None:
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = fourier_embed(boxes)
    assert features.shape == (2, 3, FOURIER_WIDTH) and features.dtype == dtype
    expected = get_fourier_embeds_from_boundingbox(FOURIER_WIDTH // 8, boxes)
    torch.testing.assert_close(features, expected.to(dtype), rtol=0, atol=2e-5)
