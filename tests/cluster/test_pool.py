"""Connecting and pools of actors, without the library."""

import pytest
import ray
from shared_cluster import NUM_WORKERS, SPARE_CPUS, Echo

from cluster.connect import cluster_shape, connect, is_addressed, worker_runtime_environment
from cluster.errors import ActorLostError
from cluster.pool import ActorPool

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_executor")]


@pytest.fixture(scope="module")
def pool(ray_executor):
    made = ActorPool(ray.remote(max_restarts=0)(Echo), 2, {"num_cpus": 0.1})
    yield made
    made.stop()


def test_every_actor_makes_its_own_object(pool):
    pool.fetch(pool.make(divmod, [10]))
    values = pool.fetch([ref for n in range(2) for ref in pool.submit(n, "m", ["x"], 1)])
    assert values == [((0, 0), "m", "x"), ((0, 1), "m", "x")]


def test_several_values_come_as_several_references(pool):
    pool.fetch(pool.make(max, [0]))
    refs = pool.submit(1, "m", ["a"], 3)
    assert pool.fetch(refs) == [1, "m", "a"]
    assert pool.fetch(pool.submit(0, "m", [refs[2]], 1)) == [(0, "m", "a")]


def test_bytes_that_pass_the_driver_are_counted_both_ways(pool):
    pool.fetch(pool.make(max, [0]))
    before = pool.driver_bytes
    [ref] = pool.submit(0, "m", ["x" * 1000], 1)
    assert 1000 <= pool.driver_bytes - before < 1100
    pool.submit(1, "m", [ref], 1)
    assert pool.driver_bytes - before < 1100
    pool.fetch([ref])
    assert 2000 <= pool.driver_bytes - before < 2200


def test_an_actor_that_is_gone_is_named(pool):
    lonely = ActorPool(ray.remote(max_restarts=0)(Echo), 1, {"num_cpus": 0.1})
    lonely.fetch(lonely.make(max, [0]))
    [ref] = lonely.submit(0, "exit", [], 1)
    with pytest.raises(ActorLostError, match="actor 0 was lost during exit"):
        lonely.fetch([ref])
    with pytest.raises(ActorLostError) as caught:
        pool.fetch(pool.submit(0, "m", [ref], 1))
    assert (caught.value.actor, caught.value.call) == (-1, "m")  # of another pool
    lonely.stop()


def test_a_connected_process_connects_to_nothing_else():
    assert is_addressed(None)
    assert connect(None, num_cpus=100) is False
    assert cluster_shape().num_nodes == 1
    assert cluster_shape().num_cpus >= NUM_WORKERS + SPARE_CPUS


def test_workers_get_their_environment():
    assert worker_runtime_environment({"A": "1"}) == {
        "env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1", "A": "1"}
    }
