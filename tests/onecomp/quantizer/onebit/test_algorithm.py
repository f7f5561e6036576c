import pytest
import torch
from torch import Tensor

from onecomp.linalg import HessianFactor, damped_hessian
from onecomp.quantizer.binary_levels import sign_mean
from onecomp.quantizer.onebit.algorithm import (
    OneBit,
    ScaleStart,
    balancing,
    in_storable_scales,
    leading_pair,
    search,
    sign_start,
    with_compensated_signs,
    with_fitted_columns,
    with_fitted_rows,
    with_turned_signs,
)

PERCDAMP = 0.01


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return damped_hessian(2 / len(rows) * rows.T @ rows, PERCDAMP)


def start_of(weight: Tensor, hessian: Tensor) -> OneBit:
    return sign_start(weight, ScaleStart().scales(weight, hessian.diagonal()))


def test_the_leading_pair_is_that_of_the_singular_value_decomposition():
    magnitudes = draw(20, 30).abs()
    row, column = leading_pair(magnitudes)
    left, values, right = torch.linalg.svd(magnitudes)
    leading = values[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(torch.outer(row, column), leading)


def test_balancing_makes_sums_equal():
    magnitudes = draw(20, 30).abs() * torch.logspace(-2, 2, 30)
    rows, columns = balancing(magnitudes, 100, 2.0)
    balanced = rows[:, None] * magnitudes * columns
    torch.testing.assert_close(balanced.sum(dim=1), torch.full((20,), 2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((30,), 4 / 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("use_importance_scaling", [False, True])
@pytest.mark.parametrize("use_balancing", [False, True])
def test_all_weighing_is_undone_on_the_scales(use_importance_scaling, use_balancing):
    """Of a weight whose magnitudes are an outer product, they are found however it was weighed."""
    expected = torch.outer(torch.logspace(-1, 1, 20), torch.logspace(1, -2, 30))
    importance = torch.logspace(-2, 2, 30)
    rule = ScaleStart(use_importance_scaling, use_balancing)
    row_scale, column_scale = rule.scales(expected * draw(20, 30).sign(), importance)
    torch.testing.assert_close(torch.outer(row_scale, column_scale), expected)


def test_importance_matters_and_the_balanced_sum_does_not():
    weight, importance = draw(20, 30), torch.logspace(-2, 2, 30)
    plain, weighed, balanced, other_sum = (
        torch.outer(*rule.scales(weight, importance))
        for rule in (
            ScaleStart(use_importance_scaling=False, use_balancing=False),
            ScaleStart(use_balancing=False),
            ScaleStart(),
            ScaleStart(balance_alpha=7.0),
        )
    )
    errors = [((weight.abs() - part).square() * importance).sum() for part in (plain, weighed)]
    assert errors[1] < errors[0]
    torch.testing.assert_close(other_sum, balanced)
    assert not torch.allclose(balanced, weighed)


def test_row_scales_are_those_of_least_squares():
    weight, hessian = draw(9, 40), correlated_hessian(40)
    found = with_fitted_rows(weight.T, start_of(weight, hessian), hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(9):
        signed = (found.signs[:, row] * found.column_scale).double()[:, None]
        solution = torch.linalg.lstsq(root @ signed, root @ weight[row].double()[:, None]).solution
        torch.testing.assert_close(found.row_scale[row].double(), solution[0, 0], rtol=1e-4, atol=0)


def test_column_scales_fall_to_those_of_least_squares():
    weight, hessian = draw(30, 12), correlated_hessian(12)
    found = with_fitted_rows(weight.T, start_of(weight, hessian), hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    signed = (found.signs * found.row_scale).double()
    design = torch.cat([root @ torch.diag(signed[:, row]) for row in range(30)])
    target = torch.cat([root @ weight[row].double() for row in range(30)])
    best = target - design @ torch.linalg.lstsq(design, target).solution
    for _ in range(5):
        found = with_fitted_columns(weight.T, found, hessian)
    assert found.error(weight.T, hessian) < 1.0001 * best.square().sum()
    assert (found.column_scale > 0).all()


def test_compensation_under_column_scales_equals_the_brain_surgeon():
    weight, hessian = draw(9, 40), correlated_hessian(40)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = HessianFactor.of(hessian, percdamp=PERCDAMP, order=order, dtype=torch.float64)
    start = start_of(weight, hessian)
    found = with_compensated_signs(weight.T, start, factor)
    live = weight.T[order].double()
    inverse = torch.linalg.inv(damped_hessian(hessian.double(), PERCDAMP)[order][:, order])
    for i, column in enumerate(order.tolist()):
        signs = torch.where(live[i] >= 0, 1.0, -1.0)
        assert torch.equal(signs, found.signs[column])
        error = (live[i] - signs * start.row_scale * start.column_scale[column]) / inverse[i, i]
        live = live - inverse[:, i : i + 1] * error
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]


def test_no_move_raises_the_error():
    weight, hessian = draw(30, 64), correlated_hessian(64)
    found = start_of(weight, hessian)
    error = found.error(weight.T, hessian)
    for move in 2 * (with_fitted_rows, with_fitted_columns, with_turned_signs):
        found = move(weight.T, found, hessian)
        before, error = error, found.error(weight.T, hessian)
        assert error <= before * (1 + 1e-5)


def test_signs_flip_from_the_start_and_the_error_falls_because_of_it():
    weight, hessian = draw(30, 64), correlated_hessian(64)
    start = only_scales = start_of(weight, hessian)
    for _ in range(10):
        only_scales = with_fitted_rows(weight.T, only_scales, hessian)
        only_scales = with_fitted_columns(weight.T, only_scales, hessian)
    found = search(weight.T, start, hessian, num_rounds=10)
    assert (found.signs != start.signs).any()
    assert found.error(weight.T, hessian) < 0.7 * only_scales.error(weight.T, hessian)


def test_column_scales_help():
    weight, hessian = draw(30, 64) * torch.logspace(-1, 1, 64), correlated_hessian(64)
    found = search(weight.T, start_of(weight, hessian), hessian, num_rounds=10)
    without = OneBit.of(sign_mean(weight.T))
    for _ in range(10):
        without = with_turned_signs(weight.T, without, hessian)
        without = with_fitted_rows(weight.T, without, hessian)
    assert found.error(weight.T, hessian) < 0.9 * without.error(weight.T, hessian)


def test_storable_scales_cost_next_to_nothing():
    weight, hessian = 1e-3 * draw(30, 64), correlated_hessian(64)
    found = search(weight.T, start_of(weight, hessian), hessian, num_rounds=3)
    stored = in_storable_scales(weight.T, found, hessian)
    assert torch.equal(stored.row_scale, stored.row_scale.half().float())
    assert torch.equal(stored.column_scale, stored.column_scale.half().float())
    assert stored.error(weight.T, hessian) < 1.001 * found.error(weight.T, hessian)


@pytest.mark.parametrize("num_rounds", [40, 400])
@pytest.mark.parametrize(("zero_rows", "zero_columns"), [(0, 60), (60, 0), (62, 63), (64, 64)])
def test_balancing_stays_finite_however_many_rows_and_columns_are_zero(
    num_rounds, zero_rows, zero_columns
):
    magnitudes = draw(64, 96).abs()
    magnitudes[:zero_rows], magnitudes[:, :zero_columns] = 0, 0
    for factors in balancing(magnitudes, num_rounds, 1.0):
        assert factors.isfinite().all()
        assert (factors > 0).all()
