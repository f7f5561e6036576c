import pytest

from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.schedule import (
    MOST_BLOCKS_IN_FLIGHT,
    GroupCost,
    Move,
    are_added_on_the_way,
    are_worth_observing_ahead,
    assign_shards,
    balance,
    blocks_in_flight,
    few_rows,
    forward_cost,
    is_worth_splitting,
    longest_first,
    plan_groups,
    share_out,
    split_largest,
    useful_workers,
)


def group(in_features: int, *out_features: int) -> InputGroup:
    names = tuple(f"layer.{i}" for i in range(len(out_features)))
    return InputGroup(0, 0, names, in_features, out_features)


BLOCK = [group(64, 64, 32, 32), group(64, 64), group(64, 256, 256), group(256, 64)]
LLAMA_70B = [
    group(8192, 8192, 1024, 1024),
    group(8192, 8192),
    group(8192, 28672, 28672),
    group(28672, 8192),
]


def alike(num_workers: int) -> dict[int, float]:
    return dict.fromkeys(range(num_workers), 1.0)


# Shards


@pytest.mark.parametrize("num_shards", [1, 5, 64])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 40])
def test_every_shard_has_one_worker_and_loads_differ_by_one(num_shards, num_workers):
    runs = list(assign_shards(num_shards, alike(num_workers)).values())
    assert [shard for run in runs for shard in run] == list(range(num_shards))
    assert len(runs) == num_workers
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_worker_twice_as_fast_holds_twice_as_many_shards():
    runs = assign_shards(12, {3: 1.0, 5: 2.0, 8: 1.0})
    assert {worker: len(run) for worker, run in runs.items()} == {3: 3, 5: 6, 8: 3}


def test_shards_of_a_lost_worker_go_to_who_is_done_with_them_first():
    taken = share_out([4, 5, 6, 7], {0: 4, 2: 4}, {0: 1.0, 2: 3.0})
    assert [taken[shard] for shard in (4, 5, 6, 7)] == [2, 2, 2, 2]
    assert set(share_out([0, 1, 2, 3], {0: 0, 1: 0}, alike(2)).values()) == {0, 1}


def test_shards_of_a_worker_that_leaves_are_all_moved():
    moves = balance({0: [0, 1], 1: [2, 3], 2: [4, 5]}, alike(3), leaving=[1])
    assert {move.shard for move in moves} == {2, 3}
    assert {move.source for move in moves} == {1}
    assert {move.target for move in moves} == {0, 2}


def test_a_new_worker_gets_its_share_with_as_few_moves_as_possible():
    held = {0: [0, 1, 2, 3, 4, 5], 1: [6, 7, 8, 9, 10, 11], 2: []}
    moves = balance(held, alike(3))
    assert len(moves) == 4
    assert {move.target for move in moves} == {2}


def test_nothing_moves_for_a_small_gain():
    held = {0: list(range(10)), 1: list(range(10, 20))}
    assert balance(held, {0: 1.0, 1: 1.1}) == []
    assert balance({0: [0], 1: []}, alike(2)) == []
    assert balance(held, {0: 1.0, 1: 3.0})


def test_a_shard_moves_once_from_where_it_is_to_where_it_ends():
    moves = balance({0: [0, 1, 2, 3], 1: [], 2: []}, alike(3), leaving=[0])
    assert sorted(move.shard for move in moves) == [0, 1, 2, 3]
    assert all(move == Move(move.shard, 0, move.target) for move in moves)


def test_nobody_can_take_over_from_the_last_worker():
    assert balance({0: [0, 1]}, alike(1), leaving=[0]) == []


# Groups


def whole(cost: float) -> GroupCost:
    return GroupCost(0.0, (cost,))


def test_a_group_takes_its_preparation_and_all_its_pieces_and_at_least_one_of_them():
    cost = GroupCost(3.0, (2.0, 4.0))
    assert cost.total == 9.0
    assert cost.longest == 7.0


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_no_worker_has_more_than_the_even_share_and_one_unit(num_workers):
    costs = [7.0, 1.0, 4.0, 4.0, 2.0, 9.0]
    chosen = longest_first(costs, alike(num_workers))
    load = [
        sum(c for c, w in zip(costs, chosen, strict=True) if w == worker)
        for worker in range(num_workers)
    ]
    assert max(load) <= sum(costs) / num_workers + max(costs)
    assert len(set(chosen)) == min(num_workers, len(costs))


def test_what_a_worker_has_to_do_already_counts():
    assert longest_first([5.0, 1.0], alike(2), {0: 10.0}) == [1, 1]


def test_a_group_that_is_not_split_is_its_owners_alone():
    plans = plan_groups([whole(cost) for cost in (2.0, 1.0, 3.0, 5.0)], alike(2))
    assert all(not plan.is_split for plan in plans)
    assert [plan.owner for plan in plans] == [1, 0, 1, 0]


def test_pieces_of_a_split_group_go_to_everyone_alike():
    [plan] = plan_groups([GroupCost(5.0, (1.0,) * 6)], alike(3))
    assert plan.is_split
    assert sorted(number for numbers in plan.pieces.values() for number in numbers) == list(
        range(6)
    )
    assert [len(numbers) for numbers in plan.pieces.values()] == [2, 2, 2]


def test_a_group_is_split_where_solving_takes_longer_than_sending():
    down_proj, gate_and_up = LLAMA_70B[3], LLAMA_70B[2]
    assert is_worth_splitting(gate_and_up, "cuda", corrected=True)
    assert is_worth_splitting(down_proj, "cuda", corrected=False)
    assert not is_worth_splitting(group(2048, 2048), "cuda", corrected=False)
    assert is_worth_splitting(down_proj, "cpu", corrected=False)
    assert not is_worth_splitting(group(64, 64), "cpu", corrected=False)


def test_only_groups_that_take_more_than_an_even_share_are_split():
    large, small = GroupCost(1.0, (4.0, 4.0)), GroupCost(1.0, (1.0, 1.0))
    assert split_largest([large, small], 2) == [large, GroupCost(1.0, (2.0,))]
    assert split_largest([small], 2) == [small]
    assert split_largest([small], 1) == [GroupCost(1.0, (2.0,))]
    assert split_largest([large] * 9, 4) == [GroupCost(1.0, (8.0,))] * 9


# Blocks and stages


def test_as_many_blocks_are_in_flight_as_keep_everyone_busy_during_the_longest_chain():
    block = [GroupCost(4.0, (4.0,) * 4), whole(4.0)]
    counts = [blocks_in_flight(block, workers) for workers in (1, 2, 8, 10_000)]
    assert counts[0] == 2
    assert counts == sorted(counts)
    assert counts[2] == 1 + 4  # 8 workers get through 24 in 3; the chain of 8, waiting, takes 12
    assert counts[3] == MOST_BLOCKS_IN_FLIGHT
    assert blocks_in_flight([], 4) == 2


def test_stages_are_observed_ahead_where_that_saves_more_than_a_pass():
    experts = [[whole(1.0)], [whole(1.0)] * 64]
    assert are_worth_observing_ahead(experts, pass_cost=10.0, num_workers=8)
    assert not are_worth_observing_ahead(experts, pass_cost=1000.0, num_workers=8)
    assert not are_worth_observing_ahead(experts, pass_cost=10.0, num_workers=1)
    assert not are_worth_observing_ahead([[whole(1.0)], [whole(9.0)]], 0.0, num_workers=8)


def test_forward_passes_cost_less_beside_solvers_on_gpus():
    assert forward_cost(100.0, "cuda") < forward_cost(100.0, "cpu") == 100.0


# Sums


def test_rows_are_sent_only_where_groups_are_many():
    assert few_rows(LLAMA_70B[3], 4, 8) == 0.0
    assert few_rows(group(7168, 2048, 2048), 512, 64) == 7168.0


def test_large_sums_of_many_workers_are_added_on_the_way():
    assert are_added_on_the_way(LLAMA_70B[3], 4, 64)
    assert not are_added_on_the_way(LLAMA_70B[3], 4, 2)
    assert not are_added_on_the_way(BLOCK[3], 4, 64)
    assert not are_added_on_the_way(group(7168, 2048, 2048), 512, 64)


def test_no_more_workers_are_useful_than_there_are_shards_or_groups():
    blocks = [BlockLayout(0, "layers.0", tuple(BLOCK)), BlockLayout(1, "layers.1", ())]
    assert useful_workers(16, blocks) == 16
    assert useful_workers(0, blocks) == 4
    assert useful_workers(0, blocks[1:]) == 1
