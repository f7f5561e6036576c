"""How what the nodes of a cluster have is shared by the workers of a run."""

import math

import pytest
from shared_cluster import Clerk

from actors.executor import RayExecutor
from actors.resources import LIBRARY_BYTES, Place, resources_of, shares
from cluster.memory import FreeMemory, NodeMemory
from cluster.nodes import NodeShape
from onecomp.resources import Resources

GIB = 2**30
CPU_NODE = NodeMemory("10.0.0.1", NodeShape(8, 0), 4 * GIB, FreeMemory(64 * GIB, (), 100 * GIB))
GPU_NODE = NodeMemory(
    "10.0.0.2", NodeShape(8, 2), 9 * GIB, FreeMemory(96 * GIB, (79 * GIB, 20 * GIB), 50 * GIB)
)
SILENT = NodeMemory("10.0.0.3", NodeShape(8, 2), 1 * GIB, None)


def devices(resources: Resources) -> list[float]:
    found = [w.device_memory for w in resources.workers if w.device_memory is not None]
    return [float(size) / GIB for size in found]


def hosts(resources: Resources) -> dict[str, float]:
    return {
        worker.name: (float(worker.host_memory) - LIBRARY_BYTES) / GIB
        for worker in resources.workers
        if worker.host_memory is not None
    }


def test_workers_are_where_the_poorest_has_most():
    places = [Place("a", 8, 60), Place("b", 8, 30), Place("c", 8, 1)]
    assert shares(places, 3) == [("a, shared by 2 workers", 30), ("b", 30)]
    assert min(size for _, size in shares(places, 6)) == 60 / 4


def test_no_place_has_more_workers_than_room():
    assert shares([Place("a", 1, 60), Place("b", 9, 30)], 4) == [
        ("a", 60),
        ("b, shared by 3 workers", 10),
    ]
    assert shares([Place("a", 1, 60)], 4) == [("a", 60)]  # the others wait for new nodes


def test_what_is_not_known_is_taken_to_be_enough():
    assert shares([Place("a", 2, math.inf), Place("b", 9, 30)], 3) == [("b", 30)]


def test_workers_with_gpus_are_on_nodes_with_gpus():
    found = resources_of([CPU_NODE, GPU_NODE], 2, num_cpus=0, num_gpus=1)
    assert hosts(found) == {"node 10.0.0.2, shared by 2 workers": 48}
    assert devices(found) == [79, 20]
    assert (found.object_store, found.spill_disk) == (9 * GIB, 50 * GIB)
    assert (found.has_gpus, found.num_workers, found.in_process) == (True, 2, False)


def test_a_single_worker_may_have_the_best_gpu():
    assert devices(resources_of([GPU_NODE], 1, num_cpus=0, num_gpus=1)) == [79]
    assert devices(resources_of([GPU_NODE], 1, num_cpus=0, num_gpus=2)) == [79]


def test_workers_share_a_gpu_only_where_they_have_to():
    assert devices(resources_of([GPU_NODE], 1, num_cpus=0, num_gpus=0.5)) == [79]
    assert devices(resources_of([GPU_NODE], 2, num_cpus=0, num_gpus=0.5)) == [39.5]
    assert devices(resources_of([GPU_NODE], 4, num_cpus=0, num_gpus=0.5)) == [39.5, 10]


def test_a_node_that_does_not_answer_refuses_nobody():
    found = resources_of([SILENT], 2, num_cpus=0, num_gpus=1)
    assert (found.workers, found.object_store) == ((), None)
    found = resources_of([SILENT, CPU_NODE], 9, num_cpus=1, num_gpus=0)
    assert hosts(found) == {"node 10.0.0.1": 64}
    assert found.object_store == 4 * GIB


def test_nodes_that_are_still_to_come_are_not_known():
    found = resources_of([CPU_NODE], 4, num_cpus=0, num_gpus=1)
    assert (found.workers, found.object_store, found.num_workers) == ((), None, 4)


@pytest.mark.ray
def test_an_executor_says_what_its_least_workers_have(ray_executor):
    ray_executor.start(Clerk)
    assert ray_executor.resources().workers == ()  # they hold some of it already
    executor = RayExecutor(2)
    try:
        found = executor.resources()
    finally:
        executor.stop()
    [worker] = found.workers
    assert worker.name == "node 127.0.0.1, shared by 2 workers"
    assert worker.host_memory is not None
    assert worker.host_memory > LIBRARY_BYTES
    assert found.object_store is not None
    assert found.spill_disk > 0
    assert (found.num_workers, found.in_process) == (2, False)
