"""Costs of calls: parts make the whole, and what is sent follows the engine's own rules."""

import pytest

from onecomp.errors import ConfigError
from onecomp.planning.costs import Unit, added, even_runs, tree_nodes
from onecomp.quantizer import RTN
from onecomp.schedule import assign_shards
from onecomp.statistics import Contribution, GroupStatistics, merge

CALLS = (
    "hold", "begin_block", "observe", "observe_group", "quantize", "prepare", "quantize_pieces",
    "join", "merge", "apply", "finish_block", "store",
)  # fmt: skip


@pytest.fixture
def costs(estimate_of, tiny_model_dir):
    return estimate_of(tiny_model_dir("llama"), samples=64, length=64, num_workers=2).costs


def unit(costs, **changes: object) -> Unit:
    kind = costs.model.kinds[0]
    return Unit(**({"block": kind, "group": kind.groups[0], "tokens": 4096} | changes))


@pytest.mark.parametrize("method", CALLS)
def test_every_call_of_a_worker_has_a_cost(costs, method):
    assert costs.seconds(method, unit(costs, num_parts=2)) > 0


def test_an_unknown_call_is_refused(costs):
    with pytest.raises(ConfigError, match="'fly' is no call of a worker: hold, begin_block"):
        costs.seconds("fly", unit(costs))


def test_a_group_costs_its_preparation_and_its_pieces(costs):
    whole = unit(costs, num_parts=3)
    rows = whole.rows
    parts = [costs.work("prepare", whole)]
    parts += [
        costs.work("quantize_pieces", unit(costs, num_rows=n)) for n in (rows // 4, rows * 3 // 4)
    ]
    found, expected = added(parts), costs.work("quantize", whole)
    assert found.keys() == expected.keys()
    for phase in ("search", "factor", "merge", "correct"):
        assert found[phase] == expected[phase]


def test_groups_observed_one_by_one_cost_as_much_as_together(costs):
    groups = costs.model.kinds[0].groups
    single = added(costs.work("observe_group", unit(costs, group=group)) for group in groups)
    assert single == costs.work("observe", unit(costs))


def test_twice_the_tokens_are_twice_the_forward_work(costs):
    once, twice = (
        costs.work("observe", unit(costs, tokens=tokens))["forward"] for tokens in (512, 1024)
    )
    assert twice == once * 2


def test_a_method_without_calibration_sums_and_factors_nothing(estimate_of, tiny_model_dir):
    costs = estimate_of(tiny_model_dir("llama"), quantizer=RTN(groupsize=32)).costs
    assert set(costs.work("quantize", unit(costs))) == {"read", "search", "solve"}


@pytest.mark.parametrize("num_shards", [1, 5, 16, 31])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_contributions_are_those_of_the_engine(num_shards, num_workers):
    runs = even_runs(num_shards, num_workers)
    assert runs == list(assign_shards(num_shards, dict.fromkeys(range(num_workers), 1.0)).values())
    for run in runs:
        leaves = [Contribution(i, i + 1, GroupStatistics(1, [])) for i in run]
        assert len(merge(leaves, num_shards)) == tree_nodes(run, 0, num_shards)
