import pytest
import torch
from torch import Tensor

from onecomp.linalg import HessianFactor, damped_hessian
from onecomp.quantizer.qbb.algorithm import descend, with_one_more
from onecomp.quantizer.qbb.fit import refitted
from onecomp.quantizer.qbb.levels import Bases, BasisLevels
from onecomp.quantizer.qbb.starts import (
    even_levels,
    fitted_levels,
    greedy_levels,
    start_levels,
)
from onecomp.quantizer.qbb.walk import compensated, moved

PERCDAMP = 0.01


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def draw_bases(columns: Tensor, num_bases: int, num_groups: int = 1) -> Bases:
    """The plain start, which no Hessian has been looked at for."""
    return even_levels(columns, num_bases=num_bases, num_groups=num_groups).rounded(columns)


def all_sums(alpha: Tensor) -> Tensor:
    """Every sum of signed scales of one group of one row, by code."""
    codes = range(2 ** len(alpha))
    signs = [[1.0 if code >> i & 1 else -1.0 for i in range(len(alpha))] for code in codes]
    return torch.tensor(signs, dtype=alpha.dtype) @ alpha


@pytest.mark.parametrize("num_bases", [1, 2, 4])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_rounding_takes_the_nearest_of_all_sums(num_bases, num_groups):
    columns = draw(12, 5)
    levels = BasisLevels(draw(num_groups, num_bases, 5, seed=1).abs())
    bases = levels.rounded(columns)
    values = bases.columns()
    for column in range(12):
        group = column // (12 // num_groups)
        for row in range(5):
            sums = all_sums(levels.alpha[group, :, row])
            torch.testing.assert_close(values[column, row], sums[int(bases.codes[column, row])])
            nearest = (sums - columns[column, row]).abs().min()
            distance = (values[column, row] - columns[column, row]).abs()
            torch.testing.assert_close(distance, nearest)


def test_bases_are_sign_matrices_times_row_scales():
    columns = draw(12, 5)
    bases = draw_bases(columns, 3)
    total = sum(bases.signs(base) @ torch.diag(bases.levels.alpha[0, base]) for base in range(3))
    torch.testing.assert_close(bases.columns(), total)


def test_identity_hessian_makes_compensation_rounding():
    columns = draw(40, 6)
    levels = even_levels(columns, num_bases=3, num_groups=1)
    factor = HessianFactor.of(torch.eye(40), percdamp=PERCDAMP)
    assert torch.equal(compensated(columns, levels, factor).codes, levels.rounded(columns).codes)


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("by_activation", [False, True])
def test_compensation_equals_the_brain_surgeon_one_by_one(num_groups, by_activation):
    """Columns are removed one at a time from the explicit inverse, in float64."""
    size = 160
    columns, hessian = draw(size, 7), correlated_hessian(size)
    order = torch.arange(size)
    if by_activation:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    levels = even_levels(columns, num_bases=2, num_groups=num_groups)
    factor = HessianFactor.of(hessian, percdamp=PERCDAMP, order=order, dtype=torch.float64)
    found = compensated(columns, levels, factor)

    live = columns[order].double()
    inverse = torch.linalg.inv(damped_hessian(hessian.double(), PERCDAMP)[order][:, order])
    for i, column in enumerate(order.tolist()):
        group = column // (size // num_groups)
        values, codes = levels.nearest(group, live[i : i + 1].float())
        assert torch.equal(codes[0], found.codes[column])
        error = (live[i] - values[0]) / inverse[i, i]
        live = live - inverse[:, i : i + 1] * error
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]


@pytest.mark.parametrize("num_groups", [1, 4])
def test_moves_equal_those_one_by_one(num_groups):
    size = 160
    columns, hessian = draw(size, 7), correlated_hessian(size)
    start = draw_bases(columns, 2, num_groups)
    found = moved(columns, start, hessian)
    values = start.columns().double()
    for column in range(size):
        gradient = hessian[column].double() @ (columns - values)
        wish = values[column] + gradient / hessian[column, column]
        best, codes = start.levels.nearest(column // (size // num_groups), wish[None].float())
        values[column] = best[0]
        assert torch.equal(codes[0], found.codes[column])


@pytest.mark.parametrize("num_bases", [1, 2, 3])
def test_scales_are_those_of_least_squares(num_bases):
    columns, hessian = draw(48, 7), correlated_hessian(48)
    bases = draw_bases(columns, num_bases)
    found = refitted(columns, bases, hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(7):
        signs = torch.stack([bases.signs(i)[:, row] for i in range(num_bases)], dim=1).double()
        solution = torch.linalg.lstsq(root @ signs, root @ columns[:, row].double()).solution
        torch.testing.assert_close(
            found.columns()[:, row], (signs @ solution).float(), atol=2e-3, rtol=2e-3
        )
    assert (found.levels.alpha >= 0).all()


def test_scales_of_groups_fall_to_the_joint_solution():
    columns, hessian = draw(48, 7), correlated_hessian(48)
    bases = draw_bases(columns, 2, 4)
    for _ in range(60):
        bases = refitted(columns, bases, hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(7):
        signs = torch.zeros(48, 8, dtype=torch.float64)
        for group in range(4):
            part = slice(group * 12, group * 12 + 12)
            for base in range(2):
                signs[part, 2 * group + base] = bases.signs(base)[part, row].double()
        target = root @ columns[:, row].double()
        best = target - root @ signs @ torch.linalg.lstsq(root @ signs, target).solution
        error = bases.errors(columns, hessian)[row]
        assert error <= 1.05 * best.square().sum()


def test_signs_flip_from_the_start_and_the_error_falls_because_of_it():
    columns, hessian = draw(64, 20), correlated_hessian(64)
    start = greedy_levels(columns, torch.ones(64), num_bases=4, num_groups=1).rounded(columns)
    only_scales = start
    for _ in range(20):
        only_scales = refitted(columns, only_scales, hessian)
    found = descend(columns, start, hessian, num_rounds=20)
    assert all((found.signs(base) != start.signs(base)).any() for base in range(4))
    assert found.errors(columns, hessian).sum() < 0.5 * only_scales.errors(columns, hessian).sum()


@pytest.mark.parametrize("num_groups", [1, 4])
def test_no_move_raises_the_error_of_a_row(num_groups):
    columns, hessian = draw(64, 20), damped_hessian(correlated_hessian(64), PERCDAMP)
    bases = draw_bases(columns, 3, num_groups)
    error = bases.errors(columns, hessian)
    for move in (refitted, moved, refitted, moved, refitted):
        bases = move(columns, bases, hessian)
        before, error = error, bases.errors(columns, hessian)
        assert (error <= before * (1 + 1e-5)).all()


def test_the_start_is_no_worse_than_greedy_or_even_levels():
    columns, importance = draw(64, 20) ** 3, draw(64, seed=3).square()
    counts = {"num_bases": 3, "num_groups": 1}
    for other in (
        greedy_levels(columns, importance, **counts),
        even_levels(columns, **counts),
        even_levels(columns, **counts, shrink=0.5),
    ):
        found = start_levels(columns, importance, **counts).rounded(columns)
        errors, other_errors = (
            ((columns - bases.columns()).square() * importance[:, None]).sum(dim=0)
            for bases in (found, other.rounded(columns))
        )
        assert (errors <= other_errors * 1.001).all()


def test_scales_are_held_by_float16():
    columns, hessian = draw(64, 20), correlated_hessian(64)
    levels = fitted_levels(columns, draw_bases(columns, 3).levels, torch.ones(64))
    found = descend(columns, levels.rounded(columns), hessian, num_rounds=3).levels.alpha
    assert torch.equal(found, found.half().float())


def test_one_more_base_takes_the_signs_that_are_left():
    columns = draw(64, 20)
    bases = descend(columns, draw_bases(columns, 2), torch.eye(64), num_rounds=3)
    more = with_one_more(columns, bases, torch.ones(64))
    assert more.levels.num_bases == 3
    assert torch.equal(more.signs(0), bases.signs(0))
    assert torch.equal(more.signs(2) > 0, columns >= bases.columns())
    assert (more.errors(columns, torch.eye(64)) < bases.errors(columns, torch.eye(64))).all()


def test_equal_bases_are_no_obstacle():
    columns, hessian = draw(64, 4), correlated_hessian(64)
    codes = (columns >= 0).to(torch.uint8) * 3
    found = refitted(columns, Bases(codes, BasisLevels(torch.ones(1, 2, 4))), hessian)
    one = refitted(columns, Bases(codes & 1, BasisLevels(torch.ones(1, 1, 4))), hessian)
    torch.testing.assert_close(found.columns(), one.columns(), rtol=3e-3, atol=0)
