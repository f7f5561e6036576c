import pytest
import torch
from torch import Tensor

from onecomp.linalg import HessianFactor, quadratic_form
from onecomp.quantizer.gptq.algorithm import (
    GridRule,
    Solution,
    column_blocks,
    fit_static_grid,
    gptq_quantize,
    nearest_solution,
)
from onecomp.quantizer.grid import GridSearch, fit_grid

PERCDAMP = 0.01
SEARCH = GridSearch(40)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def falling_diagonal(hessian: Tensor) -> Tensor:
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def brain_surgeon(
    weight: Tensor, hessian: Tensor, rule: GridRule, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and dequantized weight by removing one column at a time from the explicit inverse.

    The optimal brain surgeon step of the paper's equation 2, O(n³) a column, in float64.
    """
    size = weight.shape[1]
    order = torch.arange(size) if order is None else order
    static = fit_static_grid(weight, rule) if rule.static else None
    live = weight[:, order].double()
    hessian = hessian.double()
    hessian = hessian + PERCDAMP * hessian.diagonal().mean() * torch.eye(size)
    inverse = torch.linalg.inv(hessian[order][:, order])
    codes, values = torch.empty_like(live), torch.empty_like(live)
    for i in range(size):
        if rule.static:
            grid, group = static, int(order[i]) // rule.groupsize
        elif i % rule.groupsize == 0:
            columns = live[:, i : i + rule.groupsize].T.float()[None]
            grid = fit_grid(columns, wbits=rule.wbits, sym=rule.sym, search=rule.search)
            group = 0
        scale, zero_point = grid.scale[group], grid.zero_point[group]
        codes[:, i] = (torch.round(live[:, i].float() / scale) + zero_point).clamp(0, grid.maxq)
        values[:, i] = (codes[:, i].float() - zero_point) * scale
        error = (live[:, i] - values[:, i]) / inverse[i, i]
        live = live - error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    back = torch.argsort(order)
    return codes[:, back], values[:, back]


def solve(weight: Tensor, hessian: Tensor, rule: GridRule, **options: object) -> Solution:
    order = falling_diagonal(hessian) if options.pop("actorder", False) else None
    factor = HessianFactor.of(hessian, percdamp=PERCDAMP, order=order, dtype=torch.float64)
    return gptq_quantize(weight, factor, rule, **options)


def output_error(weight: Tensor, solution: Solution, hessian: Tensor) -> Tensor:
    return quadratic_form((weight.T - solution.columns()).double(), hessian.double())


@pytest.mark.parametrize("wbits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("groupsize", [64, 16])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("search", [None, GridSearch(10)])
def test_identity_hessian_makes_gptq_round_to_nearest(wbits, groupsize, sym, static, search):
    weight = draw(8, 64)
    rule = GridRule(wbits, groupsize, sym, search, static)
    solution = solve(weight, torch.eye(64), rule)
    nearest = nearest_solution(weight, fit_static_grid(weight, rule), groupsize)
    assert torch.equal(solution.codes, nearest.codes)
    assert torch.equal(solution.columns(), nearest.columns())


@pytest.mark.parametrize(
    ("size", "groupsize", "blocksize"),
    [(48, 48, 16), (48, 24, 16), (48, 8, 20), (48, 16, 128), (60, 12, 7), (64, 32, 32)],
)
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_codes_equal_the_brain_surgeon_one_by_one(
    size, groupsize, blocksize, actorder, sym, static
):
    weight, hessian = draw(20, size), correlated_hessian(size)
    rule = GridRule(4, groupsize, sym, static=static)
    solution = solve(weight, hessian, rule, blocksize=blocksize, actorder=actorder)
    codes, values = brain_surgeon(
        weight, hessian, rule, falling_diagonal(hessian) if actorder else None
    )
    assert torch.equal(solution.codes.T.double(), codes)
    torch.testing.assert_close(solution.columns().T.double(), values)


@pytest.mark.parametrize("wbits", [2, 3])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("actorder", [False, True])
def test_searched_grids_equal_the_brain_surgeon_too(wbits, sym, actorder):
    weight, hessian = draw(20, 48), correlated_hessian(48)
    rule = GridRule(wbits, 16, sym, SEARCH)
    solution = solve(weight, hessian, rule, blocksize=20, actorder=actorder)
    codes, _ = brain_surgeon(weight, hessian, rule, falling_diagonal(hessian) if actorder else None)
    assert torch.equal(solution.codes.T.double(), codes)


@pytest.mark.parametrize("groupsize", [64, 32, 16, 4])
@pytest.mark.parametrize("static", [False, True])
def test_blocksize_does_not_change_the_codes(groupsize, static):
    weight, hessian = draw(20, 64), correlated_hessian(64)
    rule = GridRule(4, groupsize, sym=True, static=static)
    expected = solve(weight, hessian, rule, blocksize=64)
    for blocksize in (1, 7, 16, 24, 128):
        found = solve(weight, hessian, rule, blocksize=blocksize)
        assert torch.equal(found.codes, expected.codes)


def test_a_live_grid_sees_corrections_made_inside_the_current_block():
    """Two groups in one column block: the second is fitted after the first moved its weights."""
    weight, hessian = draw(6, 32), correlated_hessian(32)
    rule = GridRule(4, 16, sym=True)
    live = solve(weight, hessian, rule, blocksize=32).grid
    original = fit_static_grid(weight, rule)
    assert torch.equal(live.scale[0], original.scale[0])
    assert not torch.equal(live.scale[1], original.scale[1])
    alone = solve(weight, hessian, rule, blocksize=16).grid
    torch.testing.assert_close(live.scale, alone.scale, rtol=2**-10, atol=0)


@pytest.mark.parametrize("num_columns", [1, 12, 96, 130])
@pytest.mark.parametrize("blocksize", [1, 8, 16, 128])
@pytest.mark.parametrize("groups", [None, 1, 2, 5])
def test_no_column_block_cuts_a_group_unless_it_is_wider(num_columns, blocksize, groups):
    groupsize = None if groups is None or num_columns % groups else num_columns // groups
    blocks = list(column_blocks(num_columns, blocksize, groupsize))
    assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])]
    assert blocks[-1][1] == num_columns
    assert all(0 < b - a <= blocksize for a, b in blocks)
    for a, b in blocks if groupsize else []:
        assert a % groupsize == 0 or a // groupsize == (b - 1) // groupsize
        assert b % groupsize == 0 or a // groupsize == (b - 1) // groupsize


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_group_of_each_column(actorder, static):
    weight, hessian = draw(6, 48), correlated_hessian(48)
    solution = solve(weight, hessian, GridRule(4, 16, sym=True, static=static), actorder=actorder)
    position = torch.arange(48)
    if actorder and not static:
        position = torch.argsort(falling_diagonal(hessian))
    assert torch.equal(solution.group_of_column, position // 16)


@pytest.mark.parametrize("sym", [False, True])
def test_static_grids_are_those_of_the_original_weight(sym):
    weight, hessian = draw(6, 48), correlated_hessian(48)
    rule = GridRule(4, 16, sym, SEARCH, static=True)
    solution = solve(weight, hessian, rule, actorder=True)
    expected = fit_static_grid(weight, rule)
    assert torch.equal(solution.grid.scale, expected.scale)
    assert torch.equal(solution.grid.zero_point, expected.zero_point)


@pytest.mark.parametrize("wbits", [2, 3, 4])
@pytest.mark.parametrize("groupsize", [96, 16])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_output_error_is_below_rounding_on_correlated_inputs(wbits, groupsize, actorder, static):
    weight, hessian = draw(40, 96), correlated_hessian(96)
    rule = GridRule(wbits, groupsize, sym=False, static=static)
    solution = solve(weight, hessian, rule, actorder=actorder)
    nearest = nearest_solution(weight, fit_static_grid(weight, rule), groupsize)
    solved, rounded = (output_error(weight, s, hessian).sum() for s in (solution, nearest))
    assert solved < rounded


def test_rows_are_solved_independently():
    weight, hessian = draw(40, 48), correlated_hessian(48)
    rule = GridRule(3, 16, sym=True)
    together = solve(weight, hessian, rule)
    for part, rows in zip(together.split([10, 30]), weight.split([10, 30]), strict=True):
        alone = solve(rows, hessian, rule)
        assert torch.equal(part.codes, alone.codes)
        assert torch.equal(part.grid.scale, alone.grid.scale)


def test_importance_is_given_in_the_layers_own_order():
    """With one column that matters the group that holds it changes, whatever the order."""
    weight, hessian = draw(6, 48), torch.diag(torch.arange(48, 0, -1.0).flip(0))
    rule = GridRule(2, 16, sym=True, search=SEARCH)
    importance = torch.ones(48)
    importance[5] = 1e6
    plain = solve(weight, hessian, rule, actorder=True)
    weighted = solve(weight, hessian, rule, actorder=True, importance=importance)
    changed = (plain.grid.scale != weighted.grid.scale).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [int(plain.group_of_column[5])]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("actorder", [False, True])
def test_the_arguments_stay_as_they_are(rows, actorder):
    weight, hessian = draw(rows, 48), correlated_hessian(48)
    kept = weight.clone(), hessian.clone()
    solve(weight, hessian, GridRule(4, 16, sym=True), actorder=actorder)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_a_solution_takes_part_in_training():
    """The solver computes in inference mode; what it returns is used outside of it."""
    solution = solve(draw(6, 48), correlated_hessian(48), GridRule(4, 16, sym=True))
    scale = torch.ones((), requires_grad=True)
    (scale * solution.columns()).sum().backward()
    (scale * solution.codes).sum().backward()
    assert scale.grad is not None


def test_split_and_join_are_inverse():
    whole = solve(draw(10, 48), correlated_hessian(48), GridRule(4, 16, sym=False))
    joined = Solution.join(whole.split([3, 7]))
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(joined.columns(), whole.columns())
    assert torch.equal(joined.group_of_column, whole.group_of_column)


def test_replace_rows_takes_whole_rows_from_the_other_solution():
    weight = draw(10, 48)
    solution = solve(weight, correlated_hessian(48), GridRule(4, 16, sym=False))
    nearest = solution.nearest(weight.T)
    rows = torch.arange(10) % 3 == 0
    mixed = solution.replace_rows(rows, nearest).columns().T
    assert torch.equal(mixed[rows], nearest.columns().T[rows])
    assert torch.equal(mixed[~rows], solution.columns().T[~rows])
