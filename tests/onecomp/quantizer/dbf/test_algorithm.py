"""The factors against slow references, and that every part of the search lowers the error."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.quantizer.dbf import refine as search
from onecomp.quantizer.dbf.admm import Search, factorise
from onecomp.quantizer.dbf.algorithm import dbf_quantize
from onecomp.quantizer.dbf.coordinates import Balancing, Coordinates, balance, damped
from onecomp.quantizer.dbf.factors import BinaryFactors, rank_one, signs
from onecomp.quantizer.drift import drifted

SEARCH = Search(num_steps=8, reg=0.03, adapt_rho=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(size: int, seed: int = 5) -> Tensor:
    """A few directions dominate, as in language models."""
    inputs = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    inputs[:, :3] *= 20
    return 2 / len(inputs) * inputs.T @ inputs


def random_factors(layers: int, out: int, rank: int, columns: int) -> BinaryFactors:
    return BinaryFactors(
        draw(layers, out).abs() + 0.1,
        signs(draw(layers, out, rank, seed=1)),
        draw(layers, rank, seed=2).abs() + 0.1,
        signs(draw(layers, rank, columns, seed=3)),
        draw(layers, columns, seed=4).abs() + 0.1,
    )


def copied(factors: BinaryFactors) -> BinaryFactors:
    return BinaryFactors(**{name: tensor.clone() for name, tensor in vars(factors).items()})


def error(weight: Tensor, hessian: Tensor, factors: BinaryFactors) -> float:
    off = (weight - factors.weight()).double()
    return ((off @ hessian.double()) * off).sum().item()


@pytest.mark.parametrize("shape", [(2, 48, 32), (1, 24, 40), (1, 32, 32)])
def test_a_product_of_binary_factors_is_found_again_better_than_by_its_start(shape):
    weight, hessian = draw(*shape), hessian_of(shape[2])
    few = Search(1, 0.03, adapt_rho=True)
    errors = [
        error(weight, hessian, dbf_quantize(weight, hessian, 20, settings, None))
        for settings in (few, replace(few, num_steps=16))
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < 0.5 * ((weight @ hessian) * weight).sum()


def test_the_hessian_matters_with_balancing_and_without():
    weight, hessian = draw(1, 40, 32), hessian_of(32)
    for balancing in (None, Balancing(40, 1.0, "l1"), Balancing(40, 1.0, "l2")):
        seen = dbf_quantize(weight, hessian, 16, SEARCH, balancing)
        blind = dbf_quantize(weight, torch.eye(32), 16, SEARCH, balancing)
        assert error(weight, hessian, seen) < 0.5 * error(weight, hessian, blind)


def test_more_than_the_diagonal_of_the_hessian_matters():
    inputs = draw(128, 4, seed=7) @ draw(4, 32, seed=8) + 0.2 * draw(128, 32, seed=9)
    weight, hessian = draw(1, 40, 32), inputs.T @ inputs
    seen = dbf_quantize(weight, hessian, 16, SEARCH, None)
    partly = dbf_quantize(weight, torch.diag(hessian.diagonal()), 16, SEARCH, None)
    assert error(weight, hessian, seen) < 0.8 * error(weight, hessian, partly)


def test_balancing_changes_the_factors_and_its_unit_does_not():
    weight, hessian = draw(1, 40, 32) * torch.logspace(-1, 1, 40)[:, None], hessian_of(32)
    plain, one, other, squares = (
        dbf_quantize(weight, hessian, 16, SEARCH, b).row_signs
        for b in (None, Balancing(40, 1.0, "l1"), Balancing(40, 4.0, "l1"), Balancing(5, 1.0, "l2"))
    )
    assert not torch.equal(plain, one)
    assert not torch.equal(one, squares)
    assert (one == other).float().mean() > 0.95


@pytest.mark.parametrize(("mode", "power"), [("l1", 1), ("l2", 2)])
def test_balanced_rows_and_columns_have_equal_norms(mode, power):
    weight = draw(30, 20) * torch.logspace(-2, 1, 30)[:, None]
    rows, columns = balance(weight, Balancing(60, 3.0, mode))
    mass = (rows[:, None] * weight * columns).abs() ** power
    torch.testing.assert_close(mass.sum(dim=1), torch.full((30,), 3.0**power), rtol=2e-3, atol=0)
    per_column = torch.full((20,), 30 * 3.0**power / 20)
    torch.testing.assert_close(mass.sum(dim=0), per_column, rtol=2e-3, atol=0)


def test_factors_do_not_depend_on_random_numbers_or_change_global_flags():
    weight, hessian = draw(1, 24, 32), hessian_of(32)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(dbf_quantize(weight, hessian, 12, SEARCH, None))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0].weight(), found[1].weight())
    now = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    assert now == flags


def test_layers_solved_together_are_as_good_as_each_alone():
    weight, hessian = torch.cat([draw(1, 30, 24), 0.01 * draw(1, 30, 24, seed=9)]), hessian_of(24)
    together = dbf_quantize(weight, hessian, 10, SEARCH, None)
    for i in range(2):
        alone = dbf_quantize(weight[i : i + 1], hessian, 10, SEARCH, None)
        pair = replace(together, **{k: v[i : i + 1] for k, v in vars(together).items()})
        ratio = error(weight[i], hessian, pair) / error(weight[i], hessian, alone)
        assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_any_scale_of_weights_gives_the_same_signs(scale):
    weight, hessian = draw(1, 24, 32), hessian_of(32)
    unit = dbf_quantize(weight, hessian, 12, SEARCH, None)
    scaled = dbf_quantize(weight * scale, hessian, 12, SEARCH, None)
    assert (unit.row_signs == scaled.row_signs).float().mean() > 0.98


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_hard_inputs_give_finite_factors(rank):
    weight, few = draw(1, 16, 20), draw(5, 20, seed=3)
    few[:, 4] = 0
    singular = few.T @ few
    cases = [(weight, singular), (weight, torch.zeros(20, 20)), (0 * weight, singular)]
    cases.append((torch.ones(1, 16, 20), singular))
    for hard, hessian in cases:
        factors = dbf_quantize(hard, hessian, rank, SEARCH, Balancing(40, 1.0, "l1"))
        assert factors.weight().isfinite().all()
        assert set(factors.row_signs.unique().tolist()) <= {1.0, -1.0}
        assert set(factors.column_signs.unique().tolist()) <= {1.0, -1.0}
        scales = factors.row_scale, factors.middle, factors.column_scale
        assert all((scale >= 0).all() for scale in scales)


def test_what_overflows_is_an_error_of_its_own():
    weight = draw(1, 16, 20)
    weight[0, 0, 0] = math.nan
    with pytest.raises(QuantizationError, match=r"not finite|No eigenvectors"):
        dbf_quantize(weight, hessian_of(20), 8, SEARCH, None)


def test_real_factors_have_magnitudes_of_rank_one():
    weight, hessian = draw(1, 24, 20), damped(hessian_of(20), 0.0)
    coordinates = Coordinates.of(weight, hessian, Balancing(10, 1.0, "l1"))
    for factor in factorise(weight, coordinates, 8, SEARCH):
        values = torch.linalg.svdvals(factor.abs())[0]
        assert values[1] < 1e-5 * values[0]


def test_levels_cover_all_directions_and_each_run_has_one():
    weight, hessian = draw(1, 24, 32), damped(hessian_of(32), 0.0)
    coordinates = Coordinates.of(weight, hessian, None)
    edges = [edge for run in coordinates.runs for edge in run]
    assert edges[0] == 0
    assert edges[-1] == 32
    assert edges[1:-1:2] == edges[2::2]
    for first, last in coordinates.runs:
        assert (coordinates.levels[first:last] == coordinates.levels[first]).all()


def test_rank_one_is_the_leading_singular_pair():
    magnitudes = draw(2, 9, 7).abs()
    column, row = rank_one(magnitudes * signs(draw(2, 9, 7, seed=2)), 30)
    left, values, right = torch.linalg.svd(magnitudes)
    expected = values[:, :1, None] * left[..., :1] @ right[:, :1]
    torch.testing.assert_close(column[..., None] * row[:, None], expected)


def test_normalising_keeps_the_product_and_leaves_no_negative_scale():
    factors = random_factors(2, 6, 4, 5)
    factors = replace(
        factors,
        row_scale=factors.row_scale * signs(draw(2, 6)),
        middle=1e-6 * factors.middle * signs(draw(2, 4)),
        column_scale=1e6 * factors.column_scale * signs(draw(2, 5)),
    )
    normal = factors.normalised()
    torch.testing.assert_close(normal.weight(), factors.weight())
    scales = normal.row_scale, normal.middle, normal.column_scale
    assert all((scale > 1e-3).all() and (scale < 1e2).all() for scale in scales)


# Refining


def brute_force_row(weight: Tensor, hessian: Tensor, factors: BinaryFactors, row: int) -> float:
    """Least error over all flips of one sign of a row of A."""
    best = error(weight, hessian, factors)
    for column in range(factors.row_signs.shape[2]):
        flipped = factors.row_signs.clone()
        flipped[0, row, column] *= -1
        best = min(best, error(weight, hessian, replace(factors, row_signs=flipped)))
    return best


def test_sign_flips_of_either_factor_lower_the_error_by_themselves():
    weight, hessian = draw(1, 20, 16), hessian_of(16)
    factors = search.fit_scales(weight, hessian, random_factors(1, 20, 8, 16))
    before = error(weight, hessian, factors)
    for flip, which in (
        (search.flip_row_signs, "row_signs"),
        (search.flip_column_signs, "column_signs"),
    ):
        flipped = copied(factors)
        flip(weight, hessian, flipped)
        changed = (getattr(flipped, which) != getattr(factors, which)).sum()
        assert changed > 0
        assert error(weight, hessian, flipped) < before


def test_after_enough_passes_no_flip_of_a_row_sign_helps():
    weight, hessian = draw(1, 6, 12), hessian_of(12)
    factors = search.fit_scales(weight, hessian, random_factors(1, 6, 9, 12))
    for _ in range(20):
        search.flip_row_signs(weight, hessian, factors)
    reached = error(weight, hessian, factors)
    for row in range(6):
        assert brute_force_row(weight, hessian, factors, row) >= reached * (1 - 1e-5)


def test_after_enough_passes_no_flip_of_a_column_sign_helps():
    weight, hessian = draw(1, 12, 10), hessian_of(10)
    factors = search.fit_scales(weight, hessian, random_factors(1, 12, 5, 10))
    for _ in range(40):
        search.flip_column_signs(weight, hessian, factors)
    reached = error(weight, hessian, factors)
    for row in range(5):
        for column in range(10):
            flipped = factors.column_signs.clone()
            flipped[0, row, column] *= -1
            other = replace(factors, column_signs=flipped)
            assert error(weight, hessian, other) >= reached * (1 - 1e-5)


def test_flips_that_would_harm_together_are_not_all_taken():
    """All columns carry the same input, so that each flip alone repairs what one should."""
    hessian = torch.ones(12, 12) + 1e-3 * torch.eye(12)
    factors = replace(random_factors(1, 4, 12, 12), column_scale=torch.ones(1, 12))
    weight = factors.weight() + 0.3 * draw(1, 4, 12, seed=8)
    factors = replace(factors, column_signs=-factors.column_signs)
    before = error(weight, hessian, factors)
    for _ in range(5):
        search.flip_column_signs(weight, hessian, factors)
        after = error(weight, hessian, factors)
        assert after <= before * (1 + 1e-5)
        before = after


@pytest.mark.parametrize("name", ["row_scale", "middle", "column_scale"])
def test_fitted_scales_are_least_squares_solutions(name):
    weight, hessian = draw(1, 20, 16), hessian_of(16)
    factors = random_factors(1, 20, 8, 16)
    for _ in range(200):
        factors = search.fit_scales(weight, hessian, factors)
    reached = error(weight, hessian, factors)
    for sign in (-1, 1):
        shifted = getattr(factors, name) * (1 + sign * 0.02 * draw(1, 1).sign())
        nudged = shifted * (1 + 0.02 * draw(*shifted.shape, seed=3))
        assert error(weight, hessian, replace(factors, **{name: nudged})) > reached


def test_no_part_of_refining_raises_the_error():
    weight, hessian = draw(2, 20, 16), damped(hessian_of(16), 0.0)
    factors = random_factors(2, 20, 8, 16)
    reached = error(weight, hessian, factors)
    for step in (search.fit_scales, search.flip_row_signs, search.flip_column_signs) * 3:
        factors = step(weight, hessian, factors) or factors
        after = error(weight, hessian, factors)
        assert after <= reached * (1 + 1e-5)
        reached = after


def test_columns_that_no_token_used_keep_their_scale():
    weight, hessian = draw(1, 20, 16), hessian_of(16)
    hessian[3], hessian[:, 3] = 0, 0
    factors = random_factors(1, 20, 8, 16)
    fitted = search.fit_scales(weight, hessian, factors)
    assert fitted.column_scale[0, 3] == pytest.approx(factors.column_scale[0, 3].item())


def test_drift_gives_up_error_on_the_inputs_for_error_on_noisy_ones():
    weight, hessian = draw(1, 40, 32), hessian_of(32)
    noisy = drifted(hessian, 1.0)
    exact, robust = (dbf_quantize(weight, hessian, 16, SEARCH, None, ratio) for ratio in (0.0, 1.0))
    assert error(weight, hessian, exact) < error(weight, hessian, robust)
    assert error(weight, noisy, robust) < error(weight, noisy, exact)
