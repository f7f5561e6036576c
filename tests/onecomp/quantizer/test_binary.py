import re
from itertools import product

import pytest
import torch
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import HessianFactor
from onecomp.quantizer.binary import (
    Binary,
    Levels,
    best_rows,
    compensated,
    descend,
    refitted,
    sign_mean,
    turned,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def exact(levels: Levels) -> Levels:
    return levels


def turned_one_by_one(columns: Tensor, binary: Binary, hessian: Tensor) -> Tensor:
    """Signs after one pass that measures the whole error of a row before and after each turn."""
    signs = binary.signs.double()
    rows, levels = columns.double(), binary.levels
    wide = levels.centre.double(), levels.half.double()
    centre, half = (w.repeat_interleave(len(columns) // len(w), dim=0) for w in wide)

    def error(row: int, candidate: Tensor) -> Tensor:
        left = rows[:, row] - centre[:, row] - half[:, row] * candidate
        return left @ hessian.double() @ left

    for row, column in product(range(columns.shape[1]), range(len(columns))):
        other = signs[:, row].clone()
        other[column] *= -1
        if error(row, other) < error(row, signs[:, row]):
            signs[:, row] = other
    return signs.float()


@pytest.mark.parametrize(("size", "num_groups"), [(40, 1), (40, 2), (150, 3)])
def test_turning_signs_is_coordinate_descent_on_the_output_error(size, num_groups):
    columns, hessian = draw(size, 5), correlated_hessian(size)
    start = sign_mean(columns, num_groups)
    found, num_turned = turned(columns, start, hessian)
    assert torch.equal(found.signs, turned_one_by_one(columns, start, hessian))
    assert num_turned == int((found.signs != start.signs).sum()) > 0
    assert (found.errors(columns, hessian) < start.errors(columns, hessian)).all()


def test_a_column_that_no_token_uses_keeps_its_sign():
    columns, hessian = draw(20, 6), correlated_hessian(20)
    hessian[3], hessian[:, 3] = 0, 0
    start = sign_mean(columns)
    found, _ = turned(columns, start, hessian)
    assert torch.equal(found.signs[3], start.signs[3])


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("fit_centre", [True, False])
def test_levels_are_refitted_by_least_squares_under_the_hessian(num_groups, fit_centre):
    columns, hessian = draw(24, 7), correlated_hessian(24)
    start = sign_mean(columns, num_groups)
    fit = refitted(columns, start, hessian, storable=exact, fit_centre=fit_centre)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(7):
        member = torch.eye(num_groups).repeat_interleave(24 // num_groups, dim=0)
        basis = member * start.signs[:, row, None]
        basis = torch.cat([member, basis], dim=1) if fit_centre else basis
        slow = torch.linalg.lstsq(root @ basis.double(), root @ columns[:, row].double()).solution
        values = fit.columns()[:, row].double()
        assert torch.allclose(values, basis.double() @ slow, atol=1e-4)
    assert (fit.levels.half >= 0).all()


def test_tied_levels_are_those_of_one_long_row():
    columns, hessian = draw(12, 4), correlated_hessian(12)
    start = sign_mean(columns, tied=True)
    tied = refitted(columns, start, hessian, storable=exact, tied=True)
    long = Binary(start.signs.T.reshape(-1, 1), Levels(*(x[:, :1] for x in ends(start.levels))))
    alone = refitted(
        columns.T.reshape(-1, 1), long, torch.block_diag(*[hessian] * 4), storable=exact
    )
    assert torch.allclose(tied.columns(), alone.columns().reshape(4, 12).T, atol=1e-5)
    assert (tied.levels.half == tied.levels.half[:, :1]).all()


def ends(levels: Levels) -> tuple[Tensor, Tensor]:
    return levels.centre, levels.half


def test_levels_are_what_float16_holds_and_never_worse_for_it():
    columns, hessian = draw(32, 9), correlated_hessian(32)
    start = sign_mean(columns)
    fit = refitted(columns, start, hessian)
    assert all(torch.equal(x, x.half().float()) for x in ends(fit.levels))
    fit_ends = refitted(columns, start, hessian, storable=Levels.ends_in_float16)
    assert all(torch.equal(x, x.half().float()) for x in fit_ends.levels.ends())
    again = refitted(columns, fit, hessian)
    assert (again.errors(columns, hessian) <= fit.errors(columns, hessian) * (1 + 1e-6)).all()


def test_rows_whose_signs_all_agree_get_levels_as_small_as_their_weights():
    columns, hessian = draw(32, 9).abs(), correlated_hessian(32)
    fit = refitted(columns, sign_mean(columns), hessian)
    assert (fit.signs == fit.signs[:1]).all()
    assert max(end.abs().max() for end in fit.levels.ends()) < 10
    plain = sign_mean(columns).errors(columns, hessian)
    assert (fit.errors(columns, hessian) <= plain * (1 + 1e-5)).all()


def test_a_level_beyond_float16_is_an_error():
    message = "A level of 7e+04 does not fit float16 (largest 65504)."
    with pytest.raises(QuantizationError, match=re.escape(message)):
        sign_mean(torch.full((4, 1), 7e4))


def test_compensation_is_nearest_under_the_identity_and_better_than_that_under_others():
    columns, levels = draw(48, 30), sign_mean(draw(48, 30), 2).levels
    nearest = levels.nearest(columns)
    identity = HessianFactor.of(torch.eye(48), percdamp=0.01)
    assert torch.equal(compensated(columns, levels, identity).signs, nearest.signs)
    hessian = correlated_hessian(48)
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor = HessianFactor.of(hessian, percdamp=0.01, order=order)
    found = compensated(columns, levels, factor)
    assert found.errors(columns, hessian).sum() < nearest.errors(columns, hessian).sum()


def test_signs_of_three_weights_end_at_the_best_of_all():
    hessian = torch.tensor([[2.0, 1.5, 0.0], [1.5, 2.0, 0.5], [0.0, 0.5, 1.0]])
    columns = draw(3, 50)
    start = sign_mean(columns)
    candidates = [
        refitted(columns, Binary(signs[:, None].expand(3, 50).contiguous(), start.levels), hessian)
        for signs in torch.tensor(list(product((-1.0, 1.0), repeat=3)))
    ]
    _, least, _ = best_rows(columns, candidates, hessian)
    found = descend(columns, start, hessian, num_rounds=20)
    reached = found.errors(columns, hessian) <= least * 1.001 + 1e-6
    assert reached.float().mean() > 0.5
    assert (found.errors(columns, hessian) <= start.errors(columns, hessian) + 1e-6).all()


def test_every_round_of_the_descent_lowers_the_error_and_turns_signs():
    columns, hessian = draw(96, 64), correlated_hessian(96)
    start = sign_mean(columns)
    outcomes = [descend(columns, start, hessian, num_rounds=n) for n in range(6)]
    errors = [binary.errors(columns, hessian).sum().item() for binary in outcomes]
    assert errors == sorted(errors, reverse=True)
    assert errors[5] < 0.5 * errors[0]
    assert (outcomes[5].signs != start.signs).float().mean() > 0.05


def test_the_best_of_each_row_is_taken_or_of_all_rows_where_they_are_tied():
    columns, hessian = draw(16, 40), correlated_hessian(16)
    one, other = sign_mean(columns), sign_mean(columns + draw(16, 40, seed=5))
    errors = torch.stack([b.errors(columns, hessian) for b in (one, other)])
    best, error, chosen = best_rows(columns, [one, other], hessian)
    assert torch.equal(error, errors.amin(dim=0))
    assert set(chosen.tolist()) == {0, 1}
    assert torch.allclose(best.errors(columns, hessian), error)
    _, error, chosen = best_rows(columns, [other, one], hessian, tied=True)
    assert chosen.unique().tolist() == [int(errors[0].sum() < errors[1].sum())]
    assert torch.equal(error, errors[0] if chosen[0] else errors[1])


def test_binaries_split_by_rows_and_join_again():
    binary = sign_mean(draw(8, 10), 2)
    joined = Binary.join(binary.split([3, 7]))
    assert torch.equal(joined.columns(), binary.columns())
