import pytest

from onecomp.models.layout import InputGroup
from onecomp.plan import assign_owners, assign_shards, quantization_cost


def group(in_features: int, *out_features: int) -> InputGroup:
    names = tuple(f"layer.{i}" for i in range(len(out_features)))
    return InputGroup(0, 0, names, in_features, out_features)


BLOCK = [group(64, 64, 32, 32), group(64, 64), group(64, 256, 256), group(256, 64)]


@pytest.mark.parametrize("num_shards", [1, 5, 32])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 40])
def test_every_shard_has_one_worker_and_loads_differ_by_one(num_shards, num_workers):
    runs = assign_shards(num_shards, num_workers)
    assert [shard for run in runs for shard in run] == list(range(num_shards))
    assert len(runs) == num_workers
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_cost_is_two_thirds_n_cubed_and_one_product_per_row():
    assert quantization_cost(group(10, 3, 4)) == pytest.approx(2 / 3 * 1000 + 7 * 100)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_no_worker_has_more_than_the_even_share_and_one_group(num_workers):
    owners = assign_owners(BLOCK, num_workers)
    costs = [quantization_cost(g) for g in BLOCK]
    load = [
        sum(c for c, o in zip(costs, owners, strict=True) if o == w) for w in range(num_workers)
    ]
    assert set(owners) <= set(range(num_workers))
    assert max(load) <= sum(costs) / num_workers + max(costs)
    assert len(set(owners)) == min(num_workers, len(BLOCK))


def test_the_most_expensive_group_goes_to_the_first_worker():
    assert assign_owners(BLOCK, 2) == [1, 1, 1, 0]
