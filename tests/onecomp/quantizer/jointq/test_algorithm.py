import pytest
import torch
from jointq_problems import (
    correlated_hessian,
    draw,
    exact_objective,
    gptq_start,
    in_bounds,
    problem,
)

from onecomp.quantizer.jointq.algorithm import Effort, jointq_quantize
from onecomp.quantizer.jointq.perturbation import Perturbation
from onecomp.quantizer.jointq.problem import (
    Kept,
    Problem,
    State,
    damped,
    nearest_state,
    regularizer,
)
from onecomp.quantizer.jointq.starts import Starts, clip_state


def as_double(state: State) -> State:
    fields = (state.steps, state.scale, state.zero_point, state.error, state.gradient)
    return State(*(tensor.double() for tensor in fields))


@pytest.mark.parametrize("wbits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float32_finds_what_float64_finds(wbits, symmetric):
    of = problem(40, 64, wbits=wbits, symmetric=symmetric, strength=0.1)
    exact = Problem(of.columns.double(), of.gram.double(), 16, wbits, symmetric)
    start = nearest_state(of)
    found = jointq_quantize(of, Kept.of(start), None, Effort(0))
    expected = jointq_quantize(exact, Kept.of(as_double(start)), None, Effort(0))
    assert (found.steps == expected.steps).float().mean() > 0.99
    one, other = exact_objective(of, found).sum(), exact_objective(of, expected).sum()
    assert abs(one - other) < 1e-3 * other


@pytest.mark.parametrize("wbits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_row_is_better_than_its_best_start(wbits, symmetric):
    of = problem(wbits=wbits, symmetric=symmetric)
    gptq = gptq_start(of)
    starts = [nearest_state(of), *(clip_state(of, propagate=p) for p in (False, True))]
    starts.append(gptq.state(of))
    objectives = torch.stack([exact_objective(of, start) for start in starts])
    start = Starts(clip=True, clip_propagating=True, gptq=gptq).best(of)
    best = objectives.min(dim=0).values
    torch.testing.assert_close(exact_objective(of, start), best, rtol=1e-4, atol=1e-4)
    found = jointq_quantize(of, start, gptq, Effort(2))
    assert (exact_objective(of, found) <= best * (1 + 1e-4) + 1e-4).all()
    assert exact_objective(of, found).sum() < 0.98 * best.sum()
    assert not torch.equal(found.steps, start.steps)
    assert torch.equal(found.scale.half().float(), found.scale)
    assert in_bounds(of, found)


def test_restarts_and_perturbations_find_more():
    of = problem(24, 96, wbits=2)
    gptq = gptq_start(of)
    start = Kept.of(gptq.state(of))
    efforts = [Effort(0), Effort(1), Effort(3), Effort(3, Perturbation(3, 4, 16))]
    sums = [exact_objective(of, jointq_quantize(of, start, gptq, e)).sum() for e in efforts]
    assert sums == sorted(sums, reverse=True)
    assert len(set(sums)) == 4
    again = jointq_quantize(of, start, gptq, efforts[-1])
    assert exact_objective(of, again).sum() == sums[-1]


def test_propagating_errors_to_later_groups_helps_the_clip_start():
    of = problem(64, 96)
    alone, propagating = (clip_state(of, propagate=p).objective().sum() for p in (False, True))
    assert propagating < alone < nearest_state(of).objective().sum()


def test_gptq_solves_again_on_given_scales():
    of = problem(64, 96)
    gptq = gptq_start(of, order=torch.argsort(of.gram.diagonal(), descending=True, stable=True))
    first = gptq.state(of)
    same = gptq.again(of, Kept.of(first))
    assert torch.equal(first.steps, same.steps)
    narrow = of.state(first.steps, first.scale * 0.75, first.zero_point)
    other = gptq.again(of, Kept.of(narrow))
    assert torch.equal(other.scale, narrow.scale)
    assert not torch.equal(other.steps, first.steps)
    assert in_bounds(of, other)


@pytest.mark.parametrize("mode", ["identity", "diagonal"])
def test_the_regularizer_has_the_units_of_the_hessian(mode):
    hessian = correlated_hessian(16)
    one, other = (regularizer(h, mode, 0.5) for h in (hessian, 64 * hessian))
    assert torch.equal(64 * one, other)
    expected = hessian.diagonal().mean() * torch.ones(16)
    if mode == "diagonal":
        expected = (hessian.diagonal() * expected).sqrt()
    torch.testing.assert_close(one, expected)


def test_a_hessian_of_zeros_makes_rounding_to_nearest():
    weight = draw(48, 24)
    of = Problem(weight, damped(torch.zeros(48, 48), torch.zeros(48)), 16, 4, symmetric=True)
    assert torch.equal(of.gram, torch.eye(48))
    state = nearest_state(of)
    found = jointq_quantize(of, Kept.of(state), None, Effort(2))
    assert (exact_objective(of, found) <= exact_objective(of, state)).all()
