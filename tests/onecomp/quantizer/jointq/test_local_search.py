import itertools

import pytest
import torch
from jointq_problems import correlated_hessian, draw, exact_objective, in_bounds, problem
from torch import Tensor

from onecomp.quantizer.jointq.local_search import _Search, search_group, search_groups
from onecomp.quantizer.jointq.problem import Problem, nearest_state


def explained(codes: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """What codes lower the error by, with their best scale; all in float64, recomputed."""
    energy = ((codes @ gram) * codes).sum(dim=-1)
    return (codes @ target).square() / energy.clamp(min=1e-300)


def optimum(of: Problem, zero_point: Tensor) -> Tensor:
    """Least objective of each row of a problem with a single group, by trying all codes."""
    every = torch.tensor(list(itertools.product(range(of.maxq + 1), repeat=of.groupsize)))
    gram, columns = of.gram.double(), of.columns.double()
    least = []
    for row in range(columns.shape[1]):
        weight = columns[:, row]
        codes = every.double() - zero_point[0, row].double()
        least.append(weight @ gram @ weight - explained(codes, gram @ weight, gram).max())
    return torch.stack(least)


@pytest.mark.parametrize("symmetric", [False, True])
def test_most_rows_of_a_tiny_problem_reach_the_optimum(symmetric):
    tiny = problem(100, 4, groupsize=4, wbits=2, symmetric=symmetric)
    state = nearest_state(tiny)
    start, best = exact_objective(tiny, state), optimum(tiny, state.zero_point)
    search_groups(tiny, state)
    found = exact_objective(tiny, state)
    energy = ((tiny.gram @ tiny.columns) * tiny.columns).sum(dim=0)
    assert (found >= best - 1e-6 * energy).all()
    assert (found <= best + 1e-4 * energy).float().mean() > 0.5
    assert (start <= best + 1e-4 * energy).float().mean() < 0.2
    assert in_bounds(tiny, state)


def best_step(codes: Tensor, target: Tensor, gram: Tensor, low: int, high: int) -> Tensor:
    """The most that one step of one code explains, of a single row."""
    found = [explained(codes, target, gram)]
    for column, sign in itertools.product(range(len(codes)), (-1, 1)):
        moved = codes.clone()
        moved[column] += sign
        if low <= moved[column] <= high:
            found.append(explained(moved, target, gram))
    return torch.stack(found).max()


@pytest.mark.parametrize("wbits", [2, 4, 7])
def test_each_step_is_the_best_of_all_single_steps(wbits):
    of = problem(40, 12, groupsize=12, wbits=wbits)
    state = nearest_state(of)
    gram, targets = of.gram.double(), of.gram.double() @ of.columns.double()
    search = _Search.start(
        of.gram, state.steps, state.scale[0], state.gradient, state.zero_point[0], of.maxq
    )
    num_equal = 0
    for _ in range(5):
        expected = torch.stack(
            [
                best_step(row.double(), target, gram, int(low), int(high))
                for row, target, low, high in zip(
                    search.steps, targets.T, search.lowest, search.highest, strict=True
                )
            ]
        )
        search.step()
        found = torch.stack(
            [explained(z.double(), h, gram) for z, h in zip(search.steps, targets.T, strict=True)]
        )
        num_equal += int(torch.isclose(found, expected, rtol=1e-5).sum())
    assert num_equal >= 0.98 * 5 * 40  # a step against the residual's sign is not looked at


@pytest.mark.parametrize("wbits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_tokens", [None, 5])
def test_the_search_lowers_the_objective_of_every_row(wbits, symmetric, num_tokens):
    hessian = correlated_hessian(48, num_tokens=num_tokens)
    of = problem(wbits=wbits, symmetric=symmetric, hessian=hessian)
    state = nearest_state(of)
    start, codes = exact_objective(of, state), state.steps.clone()
    search_groups(of, state)
    found = exact_objective(of, state)
    energy = ((of.gram @ of.columns) * of.columns).sum(dim=0)
    assert (found <= start + 1e-6 * energy).all()
    assert found.sum() < start.sum()
    assert not torch.equal(state.steps, codes)
    assert in_bounds(of, state)
    torch.testing.assert_close(state.gradient, of.gram @ state.error, rtol=1e-3, atol=1e-3)


def test_a_group_without_codes_finds_some():
    """Codes that are all zero explain nothing, and have no scale of their own."""
    gram, target = correlated_hessian(8), draw(8, 5)
    zeros, ones = torch.zeros(8, 5), torch.ones(5)
    steps, scale = search_group(gram, zeros, ones, -gram @ target, 4 * ones, 7)
    assert (steps.abs().sum(dim=0) > 0).all()
    error = (steps * scale - target).double()
    assert (((gram.double() @ error) * error).sum(0) < ((gram @ target) * target).sum(0)).all()


def test_rows_do_not_depend_on_each_other():
    of = problem(40)
    together = nearest_state(of)
    search_groups(of, together)
    for rows in torch.arange(40).split(20):
        part = of.rows(rows)
        alone = nearest_state(part)
        search_groups(part, alone)
        assert torch.equal(alone.steps, together.steps[:, rows])
