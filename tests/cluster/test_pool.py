"""Connecting and pools of actors, without the library."""

import time
from collections.abc import Callable

import pytest
import ray
from shared_cluster import NUM_WORKERS, SPARE_CPUS, Echo

from cluster.connect import cluster_shape, connect, is_addressed, worker_runtime_environment
from cluster.errors import ActorLostError
from cluster.pool import ActorPool
from onecomp.errors import LayerError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_executor")]


def empty_pool(num_cpus: float = 0.1) -> ActorPool:
    return ActorPool(ray.remote(max_restarts=0)(Echo), {"num_cpus": num_cpus})


def begun(count: int, make_object: Callable[..., object], *arguments: object) -> ActorPool:
    """Actors that have made their objects."""
    made = empty_pool()
    recipe = made.share((make_object, *arguments), count)
    for number in [made.add() for _ in range(count)]:
        [made.places[number]] = made.fetch([made.make(number, "hello", recipe[0], recipe[1:])])
    return made


@pytest.fixture(scope="module")
def pool(ray_executor):
    made = begun(2, divmod, 10)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def lonely(ray_executor):
    """One actor, which has not made its object."""
    made = empty_pool()
    made.add()
    yield made
    made.stop()


def test_every_actor_makes_its_own_object(pool):
    refs = [ref for n in range(2) for ref in pool.submit(n, "m", ["x"]).values]
    assert pool.fetch(refs) == [((0, 0), "m", "x"), ((0, 1), "m", "x")]


def test_several_values_come_as_several_references(pool):
    refs = pool.submit(1, "m", ["a"], 3).values
    assert pool.fetch(refs) == [(0, 1), "m", "a"]
    assert pool.fetch(pool.submit(0, "m", [refs[2]]).values) == [((0, 0), "m", "a")]


def test_bytes_that_pass_the_driver_are_counted_both_ways(pool):
    before = pool.driver_bytes
    [ref] = pool.submit(0, "m", ["x" * 1000]).values
    assert 1000 <= pool.driver_bytes - before < 1100
    pool.submit(1, "m", [ref])
    assert pool.driver_bytes - before < 1100
    pool.fetch([ref])
    assert 2000 <= pool.driver_bytes - before < 2200


def test_a_call_behind_one_that_failed_does_not_run(pool):
    before = pool.submit(0, "m", [], 9)  # the method does not return nine values
    with pytest.raises(ValueError, match="num_returns"):
        pool.fetch([before.receipt])
    after = pool.submit(1, "m", [], after=before.receipt)
    with pytest.raises(ValueError, match="num_returns"):
        pool.fetch(after.values)
    assert pool.fetch(pool.submit(1, "m", []).values) == [((0, 1), "m")]


def rest(seconds: int) -> None:
    time.sleep(seconds)


def test_ready_tells_what_has_a_value_or_an_error(pool):
    good, bad = pool.submit(0, "m", []), pool.submit(0, "m", [], 9)
    [never] = pool.submit(1, "m", [ray.remote(rest).remote(60)]).values
    refs = [*good.values, bad.receipt, never]
    assert pool.ready(refs[:2], 60.0) == set(refs[:2])
    assert pool.ready(refs, 0.1) == set(refs[:2])
    assert pool.ready([], 60.0) == set()


def test_an_actor_that_does_not_meet_the_greeting_makes_nothing(lonely):
    recipe = lonely.share((max, 0), 1)
    with pytest.raises(LayerError, match="greeting: go away"):
        lonely.fetch([lonely.make(0, "go away", recipe[0], recipe[1:])])
    assert lonely.fetch(lonely.submit(0, "m", []).values) == [(None, "m")]


def test_an_actor_that_is_gone_is_named(pool, lonely):
    [ref] = lonely.submit(0, "exit", []).values
    with pytest.raises(ActorLostError, match="actor 0 was lost during exit"):
        lonely.fetch([ref])
    with pytest.raises(ActorLostError) as caught:
        pool.fetch(pool.submit(0, "m", [ref]).values)
    assert (caught.value.actor, caught.value.call) == (-1, "m")  # of another pool


def test_numbers_do_not_recur():
    made = empty_pool(num_cpus=1000)  # of actors that wait for a place for ever
    assert [made.add(), made.add()] == [0, 1]
    made.remove(0)
    assert made.numbers == [1]
    assert made.add() == 2
    made.stop()


def test_a_connected_process_connects_to_nothing_else():
    assert is_addressed(None)
    assert connect(None, num_cpus=100) is False
    assert cluster_shape().num_nodes == 1
    assert cluster_shape().num_cpus >= NUM_WORKERS + SPARE_CPUS


def test_workers_get_their_environment():
    assert worker_runtime_environment({"A": "1"}) == {
        "env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1", "A": "1"}
    }
