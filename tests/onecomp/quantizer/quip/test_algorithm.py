import pytest
import torch
from torch import Tensor

from onecomp.linalg import HessianFactor, quadratic_form
from onecomp.quantizer.quip.algorithm import Rounding, greedy, ldlq, normal_scale

PERCDAMP = 0.01
SIZES = [1, 5, 16, 17, 50]
"""Columns: less than one leaf, one, and unequal halves."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def damped(hessian: Tensor) -> Tensor:
    hessian = hessian.double()
    return hessian + PERCDAMP * hessian.diagonal().mean() * torch.eye(len(hessian))


def factor_of(hessian: Tensor) -> HessianFactor:
    return HessianFactor.of(hessian, percdamp=PERCDAMP, dtype=torch.float64)


def solve(columns: Tensor, hessian: Tensor, wbits: int, *, row_scale: bool = True) -> Rounding:
    scale = normal_scale(columns, wbits=wbits, row_scale=row_scale)
    return ldlq(columns, factor_of(hessian), scale, wbits)


def improve(columns: Tensor, hessian: Tensor, start: Rounding, num_passes: int = 1) -> Rounding:
    return greedy(columns, hessian, start, num_passes=num_passes, percdamp=PERCDAMP)


def error(columns: Tensor, hessian: Tensor, rounding: Rounding) -> float:
    """Under the damped Hessian, which the solver lowers."""
    return quadratic_form((columns - rounding.columns()).double(), damped(hessian)).sum().item()


def nearest_level(values: Tensor, largest: float) -> Tensor:
    return (torch.round(values - 0.5) + 0.5).clamp(-largest, largest)


def linear_feedback(columns: Tensor, hessian: Tensor, scale: Tensor, wbits: int) -> Tensor:
    """Levels by the paper's LDLQ as it is written: ``H = (U + 1) D (U + 1)ᵀ``, feedback ``U``.

    The error of each column against the *original* weight feeds those behind it; float64.
    """
    reversed_lower = torch.linalg.cholesky(damped(hessian).flip(0, 1))
    upper = reversed_lower.flip(0, 1)
    feedback = upper / upper.diagonal()
    weight = (columns / scale).double()
    levels = torch.zeros_like(weight)
    for k in range(len(weight)):
        errors = weight[:k] - levels[:k]
        target = weight[k] + feedback[:k, k] @ errors
        levels[k] = nearest_level(target, (2**wbits - 1) / 2)
    return levels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wbits", [1, 2, 4, 8])
@pytest.mark.parametrize("row_scale", [False, True])
def test_ldlq_is_the_papers_linear_feedback(size, wbits, row_scale):
    columns, hessian = draw(size, 30), correlated_hessian(size)
    rounding = solve(columns, hessian, wbits, row_scale=row_scale)
    expected = linear_feedback(columns, hessian, rounding.scale, wbits)
    assert torch.equal(rounding.levels.double(), expected)


@pytest.mark.parametrize("wbits", [1, 3, 8])
def test_without_correlations_ldlq_rounds_to_the_nearest_level(wbits):
    columns = draw(40, 30)
    rounding = solve(columns, torch.eye(40), wbits)
    expected = nearest_level(columns / rounding.scale, rounding.largest)
    assert torch.equal(rounding.levels, expected)


@pytest.mark.parametrize("wbits", [2, 4])
def test_feedback_lowers_the_output_error(wbits):
    columns, hessian = draw(64, 40), correlated_hessian(64)
    rounding = solve(columns, hessian, wbits)
    nearest = solve(columns, torch.eye(64), wbits)
    assert error(columns, hessian, rounding) < 0.8 * error(columns, hessian, nearest)


@pytest.mark.parametrize("wbits", range(1, 9))
def test_the_first_scale_is_the_best_for_normal_weights(wbits):
    columns = draw(20_000, 1)
    scale = normal_scale(columns, wbits=wbits, row_scale=True)

    def squared_error(step: Tensor) -> Tensor:
        levels = nearest_level(columns / step, (2**wbits - 1) / 2)
        return (columns - levels * step).square().sum()

    best = squared_error(scale)
    assert best < squared_error(1.15 * scale)
    assert best < squared_error(scale / 1.15)


def test_a_row_of_zeros_stays_nearly_zero():
    columns = draw(24, 6)
    columns[:, 2] = 0
    rounding = improve(columns, correlated_hessian(24), solve(columns, correlated_hessian(24), 4))
    assert rounding.columns()[:, 2].abs().max() < 1e-20
    assert rounding.columns().isfinite().all()


def one_by_one(columns: Tensor, hessian: Tensor, start: Rounding, scale: Tensor) -> Tensor:
    """A greedy pass as it is defined: each level tries all values, all else as it is."""
    hessian, levels = damped(hessian), start.levels.double().clone()
    values = torch.arange(-start.largest, start.largest + 1, dtype=torch.float64)
    for i in range(len(levels)):
        trials = levels.repeat(len(values), 1, 1)
        trials[:, i] = values[:, None]
        rest = columns.double() - trials * scale
        errors = torch.einsum("vir,ij,vjr->vr", rest, hessian, rest)
        levels[i] = values[errors.argmin(dim=0)]
    return levels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wbits", [1, 2, 3])
@pytest.mark.parametrize("row_scale", [False, True])
def test_a_greedy_pass_takes_the_best_of_all_values_in_turn(size, wbits, row_scale):
    columns, hessian = draw(size, 12), correlated_hessian(size)
    start = solve(columns, torch.eye(size), wbits, row_scale=row_scale)
    scale = best_scale(columns, hessian, start)
    found = improve(columns, hessian, start)
    assert torch.equal(found.levels.double(), one_by_one(columns, hessian, start, scale))


def best_scale(columns: Tensor, hessian: Tensor, rounding: Rounding) -> Tensor:
    """Least squares in one scale, or one for each row, for given levels."""
    levels, hessian = rounding.levels.double(), damped(hessian)
    agreement, energy = (levels * (hessian @ other) for other in (columns.double(), levels))
    if len(rounding.scale) == 1:
        return agreement.sum() / energy.sum()
    return agreement.sum(dim=0) / energy.sum(dim=0)


@pytest.mark.parametrize("wbits", [1, 2, 4])
@pytest.mark.parametrize("row_scale", [False, True])
def test_every_greedy_pass_moves_levels_and_lowers_the_error(wbits, row_scale):
    columns, hessian = draw(80, 40), correlated_hessian(80)
    before = solve(columns, hessian, wbits, row_scale=row_scale)
    for _ in range(3):
        after = improve(columns, hessian, before)
        assert (after.levels != before.levels).any()
        assert error(columns, hessian, after) < error(columns, hessian, before)
        before = after


def test_the_last_scale_is_the_best_for_the_last_levels():
    columns, hessian = draw(48, 20), correlated_hessian(48)
    found = improve(columns, hessian, solve(columns, hessian, 2))
    expected = best_scale(columns, hessian, found)
    torch.testing.assert_close(found.scale.double(), expected, rtol=1e-5, atol=0)


def test_the_arguments_stay_as_they_are():
    columns, hessian = draw(40, 12), correlated_hessian(40)
    kept = columns.clone(), hessian.clone()
    start = solve(columns, hessian, 2)
    levels = start.levels.clone()
    improve(columns, hessian, start, num_passes=2)
    assert torch.equal(columns, kept[0])
    assert torch.equal(hessian, kept[1])
    assert torch.equal(start.levels, levels)


def test_a_rounding_takes_part_in_training():
    """Columns are settled in inference mode; what comes out is used outside of it."""
    columns, hessian = draw(40, 12), correlated_hessian(40)
    factor = torch.ones((), requires_grad=True)
    for rounding in (
        solve(columns, hessian, 2),
        improve(columns, hessian, solve(columns, hessian, 2)),
    ):
        (factor * rounding.columns()).sum().backward()
    assert factor.grad is not None
