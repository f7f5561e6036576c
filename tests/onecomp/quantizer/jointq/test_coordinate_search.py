import pytest
import torch
from jointq_problems import correlated_hessian, exact_objective, in_bounds, problem
from torch import Tensor

from onecomp.quantizer.jointq.coordinate_search import (
    centre_codes,
    solve_scales,
    store_scales,
    sweep_codes,
)
from onecomp.quantizer.jointq.problem import Problem, State, nearest_state


def one_by_one(of: Problem, state: State) -> Tensor:
    """Codes after a sweep, each with all candidates tried, in float64."""
    gram, columns = of.gram.double(), of.columns.double()
    steps, scale = state.steps.double(), of.per_column(state.scale).double()
    lowest = -of.per_column(state.zero_point).double()
    for column in range(len(steps)):
        candidates = []
        for code in range(of.maxq + 1):
            tried = steps.clone()
            tried[column] = lowest[column] + code
            error = tried * scale - columns
            candidates.append(((gram @ error) * error).sum(dim=0))
        steps[column] = lowest[column] + torch.stack(candidates).argmin(dim=0)
    return steps


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [48, 80])
def test_a_sweep_gives_each_code_in_turn_its_best_value(symmetric, size):
    of = problem(12, size, symmetric=symmetric)
    state = nearest_state(of)
    expected = one_by_one(of, state)
    sweep_codes(of, state)
    assert torch.equal(state.steps.double(), expected)
    torch.testing.assert_close(state.error, state.steps * of.per_column(state.scale) - of.columns)
    torch.testing.assert_close(state.gradient, of.gram @ state.error, rtol=1e-3, atol=1e-3)


def test_scales_are_those_of_least_squares():
    of = problem()
    state = nearest_state(of)
    for row in range(5):
        parts = torch.block_diag(*state.steps[:, row].view(3, 16)).double()
        system = parts @ of.gram.double() @ parts.T
        target = parts @ of.gram.double() @ of.columns[:, row].double()
        expected = torch.linalg.solve(system, target).float()
        changed = state.rows(torch.arange(24))
        solve_scales(of, changed)
        torch.testing.assert_close(changed.scale[:, row], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wbits", [1, 2, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_tokens", [None, 5])
def test_no_step_raises_the_objective_of_any_row(wbits, symmetric, num_tokens):
    of = problem(
        wbits=wbits, symmetric=symmetric, hessian=correlated_hessian(48, num_tokens=num_tokens)
    )
    state = nearest_state(of)
    energy = ((of.gram @ of.columns) * of.columns).sum(dim=0)
    before = first = exact_objective(of, state)
    for step in (sweep_codes, solve_scales, centre_codes) * 3:
        step(of, state)
        after = exact_objective(of, state)
        assert (after <= before + 1e-6 * energy).all(), step.__name__
        assert in_bounds(of, state)
        before = after
    assert after.sum() < 0.9 * first.sum()


def test_a_group_of_zeros_keeps_its_scale():
    of = problem()
    state = nearest_state(of)
    state.steps[:16, 3] = 0
    state = of.state(state.steps, state.scale, state.zero_point)
    before = state.scale.clone()
    solve_scales(of, state)
    assert state.scale[0, 3] == before[0, 3]
    assert not torch.equal(state.scale[1:], before[1:])
    assert state.scale.isfinite().all()


def test_centring_lets_codes_go_further():
    of = problem(1, 16, wbits=2)
    steps = torch.tensor([0.0, 1.0] * 8)[:, None]
    state = of.state(steps, torch.ones(1, 1), torch.zeros(1, 1))
    centre_codes(of, state)
    assert state.zero_point.item() == 1
    assert torch.equal(state.steps, steps)


def test_stored_scales_are_those_of_float16():
    of = problem()
    state = nearest_state(of)
    solve_scales(of, state)
    assert not torch.equal(state.scale.half().float(), state.scale)
    state.scale[0, :2] = torch.tensor([-1e-9, 1e9])
    store_scales(of, state)
    assert torch.equal(state.scale.half().float(), state.scale)
    assert state.scale[0, :2].tolist() == [-(2.0**-24), 65504.0]
