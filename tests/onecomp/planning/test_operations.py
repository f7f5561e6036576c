"""Operations and bytes: compared with what the engine's own functions compute and write."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from onecomp.linalg import HessianFactor, gram_strips
from onecomp.models.layout import InputGroup
from onecomp.planning import operations as ops
from onecomp.planning.methods import method_shape, num_candidates
from onecomp.planning.operations import Work
from onecomp.qep.correction import corrected_weight
from onecomp.quantizer import GPTQ, RTN
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.grid import GridSearch, _Best, fit_grid
from onecomp.statistics import FewRows, GroupStatistics

SIZE, ROWS, TOKENS = 320, 192, 256
GROUP = InputGroup(0, 0, ("a", "b"), SIZE, (128, 64))
GPTQ_METHOD = GPTQ(groupsize=32, mse=True, actorder=True, static_groups=True, sym=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IN_PLACE = {
    torch.ops.aten.addmm_: lambda _, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.addmv_: lambda _, a, b, *args, **kwargs: 2 * a[0] * a[1],
}
"""Operations of products that the counter does not know."""


def counted(compute) -> float:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        compute()
    return counter.get_total_flops()


def test_sums_cost_what_their_products_cost():
    rows = random(TOKENS, SIZE)
    gram = ops.sums(GROUP, TOKENS, corrected=False).float32_operations
    assert counted(lambda: gram_strips(rows)) == pytest.approx(gram)
    both = ops.sums(GROUP, TOKENS, corrected=True).float32_operations
    assert counted(lambda: GroupStatistics.of(rows, rows + 1)) == pytest.approx(both)


@pytest.mark.parametrize("corrected", [False, True])
def test_contributions_have_the_size_that_is_said(corrected):
    rows = random(TOKENS, SIZE)
    original = rows if corrected else None
    sums = ops.sums_bytes(GROUP, corrected=corrected)
    assert GroupStatistics.of(rows, original).num_bytes == pytest.approx(sums)
    sent = ops.rows_bytes(GROUP, TOKENS, 4, corrected=corrected)
    assert FewRows(rows, original).num_bytes == sent


def factor() -> HessianFactor:
    rows = random(TOKENS, SIZE)
    return HessianFactor.of(rows.T @ rows + torch.eye(SIZE), percdamp=0.01)


def test_the_correction_costs_three_products():
    weight, delta, made = random(ROWS, SIZE), random(SIZE, SIZE), factor()
    expected = ops.correct(GROUP, ROWS).float32_operations
    assert counted(lambda: corrected_weight(weight, delta, made, 0.5)) == expected


def test_the_solver_costs_about_what_is_said():
    rows = random(2 * SIZE, SIZE)
    factors = HessianFactors(rows.T @ rows)
    weights = {"a": random(ROWS, SIZE)}
    plain = GPTQ(groupsize=32, static_groups=True)
    expected = ops.solve(GROUP, ROWS, method_shape(plain), 4096).float32_operations
    assert counted(lambda: plain.quantize_weights(weights, factors)) == pytest.approx(
        expected, rel=0.2
    )


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("search", [GridSearch(), GridSearch(100, 2.4, stride=4)])
def test_candidates_are_those_that_the_search_tries(search, sym, monkeypatch):
    tried = []
    original = _Best.try_candidates

    def counting(best, numbers):
        tried.append(len(numbers))
        original(best, numbers)

    monkeypatch.setattr(_Best, "try_candidates", counting)
    fit_grid(random(1, 32, 4), wbits=4, sym=sym, search=search)
    assert sum(tried) == num_candidates(search, sym=sym)


def test_a_method_without_a_search_tries_nothing():
    assert method_shape(GPTQ(groupsize=32)).num_candidates == 0
    work = ops.search(GROUP, ROWS, method_shape(RTN(groupsize=32)))
    assert work.evaluations == 0


def test_rows_of_a_group_add_up():
    method = method_shape(GPTQ_METHOD)
    for phase in (
        lambda rows: ops.search(GROUP, rows, method),
        lambda rows: ops.correct(GROUP, rows),
    ):
        assert phase(ROWS) == phase(ROWS / 3) + phase(2 * ROWS / 3)


def test_work_is_a_vector():
    work = Work(model_operations=1, read_bytes=2)
    assert work + work == work * 2
    assert Work.sum([work, work, Work()]) == work * 2
