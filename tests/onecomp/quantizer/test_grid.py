import re

import pytest
import torch
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.quantizer.grid import Grid, GridSearch, fit_grid, round_to_nearest

WIDTHS = [1, 2, 3, 4, 5, 8]


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom, as weights with outliers."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, *shape, generator=generator)
    return 0.02 * normal[0] / (normal[1:].square().mean(dim=0)).sqrt()


def dequantized(groups: Tensor, grid: Grid) -> Tensor:
    codes = round_to_nearest(groups, grid)
    return (codes - grid.zero_point[:, None]) * grid.scale[:, None]


def error(groups: Tensor, grid: Grid, norm: float = 2.4) -> Tensor:
    return (dequantized(groups, grid) - groups).abs().double().pow(norm).sum(dim=1)


@pytest.mark.parametrize("wbits", WIDTHS)
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_an_asymmetric_grid_holds_zero_exactly(wbits, mse, shift):
    groups = heavy_tailed(3, 32, 10) + shift
    groups[:, 5] = 0
    search = GridSearch(100) if mse else None
    grid = fit_grid(groups, wbits=wbits, sym=False, search=search)
    assert torch.equal(dequantized(groups, grid)[:, 5], torch.zeros(3, 10))


@pytest.mark.parametrize("wbits", WIDTHS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_scales_are_float16_numbers_and_zero_points_are_codes(wbits, sym, mse):
    groups = heavy_tailed(3, 32, 10)
    grid = fit_grid(groups, wbits=wbits, sym=sym, search=GridSearch(100) if mse else None)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert (grid.scale != 0).all()
    assert torch.equal(grid.zero_point.round(), grid.zero_point)
    assert ((grid.zero_point >= 0) & (grid.zero_point <= grid.maxq)).all()
    if sym:
        assert (grid.zero_point == 2 ** (wbits - 1)).all()


@pytest.mark.parametrize("wbits", WIDTHS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_weight_is_off_by_more_than_half_a_step(wbits, sym, sign):
    """Also where all weights have one sign: the grid reaches the largest of them."""
    groups = sign * heavy_tailed(3, 32, 10).abs()
    grid = fit_grid(groups, wbits=wbits, sym=sym)
    off = (dequantized(groups, grid) - groups).abs()
    # Scales are rounded to 11 bits, which moves the ends of the range by 2**-11 of themselves.
    assert (
        off <= 0.5 * grid.scale[:, None] + 2**-10 * groups.abs().amax(dim=1, keepdim=True)
    ).all()


def test_an_asymmetric_grid_spans_the_weights_and_a_symmetric_one_twice_the_largest():
    groups = torch.tensor([-1.0, 0.5, 2.0])[None, :, None]
    asymmetric = fit_grid(groups, wbits=2, sym=False)
    assert (asymmetric.scale.item(), asymmetric.zero_point.item()) == (1, 1)
    symmetric = fit_grid(groups, wbits=2, sym=True)
    assert (symmetric.scale.item(), symmetric.zero_point.item()) == (pytest.approx(4 / 3, 1e-3), 2)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_zero_and_tiny_rows_stay_finite_and_near_zero(sym, mse, size):
    groups = torch.full((2, 16, 3), size)
    grid = fit_grid(groups, wbits=4, sym=sym, search=GridSearch(100) if mse else None)
    assert torch.isfinite(grid.scale).all()
    assert torch.equal(dequantized(groups, grid), torch.zeros_like(groups))


@pytest.mark.parametrize("sym", [False, True])
def test_groups_and_rows_are_independent_of_each_other(sym):
    groups = heavy_tailed(4, 32, 10)
    search = GridSearch(100)
    together = fit_grid(groups, wbits=3, sym=sym, search=search)
    for g in range(4):
        alone = fit_grid(groups[g : g + 1, :, 3:4], wbits=3, sym=sym, search=search)
        assert torch.equal(alone.scale[0], together.scale[g, 3:4])
        assert torch.equal(alone.zero_point[0], together.zero_point[g, 3:4])


@pytest.mark.parametrize("wbits", [3, 4])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("size", [32, 128, 576])
def test_coarse_to_fine_search_is_within_a_thousandth_of_the_full_search(wbits, sym, size):
    groups = heavy_tailed(1, size, 100, seed=size)
    coarse, full = (
        error(groups, fit_grid(groups, wbits=wbits, sym=sym, search=search)).sum()
        for search in (GridSearch(), GridSearch(stride=1))
    )
    assert full <= coarse * (1 + 1e-6)
    assert coarse <= full * 1.001


@pytest.mark.parametrize("wbits", WIDTHS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_search_is_never_worse_than_the_whole_range(wbits, sym, norm):
    groups = heavy_tailed(1, 64, 30)
    plain = error(groups, fit_grid(groups, wbits=wbits, sym=sym), norm)
    search = GridSearch(norm=norm)
    found = error(groups, fit_grid(groups, wbits=wbits, sym=sym, search=search), norm)
    assert (found <= plain * (1 + 1e-4)).all()
    assert found.sum() <= plain.sum()


def test_importance_moves_the_grid_towards_the_columns_that_matter():
    groups = heavy_tailed(1, 64, 50)
    importance = torch.ones(1, 64)
    importance[0, :4] = 1000
    plain, weighted = (
        fit_grid(groups, wbits=3, sym=True, search=GridSearch(norm=2.0), importance=given)
        for given in (None, importance)
    )
    before, after = ((dequantized(groups, g) - groups).square()[0] for g in (plain, weighted))
    assert (importance.T @ torch.ones(1, 50) * (after - before)).sum() < 0
    assert after[:4].sum() < before[:4].sum()


def test_a_symmetric_search_uses_a_negative_scale_for_a_longer_positive_side():
    groups = torch.linspace(-7, 8, 16)[None, :, None]
    grid = fit_grid(groups, wbits=4, sym=True, search=GridSearch())
    assert grid.scale.item() < 0
    assert error(groups, grid).item() < error(-groups, fit_grid(-groups, wbits=4, sym=True)).item()


@pytest.mark.parametrize("sym", [False, True])
def test_zeros_and_weights_without_importance_do_not_disturb_the_search(sym):
    groups = heavy_tailed(2, 16, 10)
    with_zeros = torch.cat([groups, torch.zeros_like(groups)], dim=1)
    important = torch.cat([torch.ones(2, 16), torch.zeros(2, 16)], dim=1)
    settings = {"wbits": 3, "sym": sym, "search": GridSearch()}
    grid = fit_grid(groups, **settings)
    assert torch.equal(fit_grid(with_zeros, **settings, importance=important).scale, grid.scale)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_a_scale_that_does_not_fit_float16_is_refused(sym, mse):
    groups = torch.full((1, 8, 2), 1e7)
    message = "does not fit float16 (largest 65504)."
    with pytest.raises(QuantizationError, match=re.escape(message)):
        fit_grid(groups, wbits=1, sym=sym, search=GridSearch(2) if mse else None)
