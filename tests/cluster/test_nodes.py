"""Capacities, nodes that leave, last words of processes, deaths for memory."""

import os
import pickle
import signal
import sys
import textwrap
import time

import memory_limit
import pytest
import ray
import torch
import yaml
from cluster_nodes import drain_node, in_own_process, kill_node, nodes, started_head
from memory_limit import (
    MONITOR,
    NEEDS_LIMITS,
    limit_process,
    limited_command,
    memory_group,
    take_memory,
)
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.nodes import (
    Capacity,
    Growth,
    NodeShape,
    autoscaler_file,
    cluster_capacity,
    draining_nodes,
    growth_of,
    kernel_memory_kills,
    kernel_memory_kills_on,
    log_tail,
    was_out_of_memory,
)

GPU_NODE, CPU_NODE, HEAD = NodeShape(8, 4), NodeShape(16, 0), NodeShape(1, 0)
FILE = """
    cluster_name: growing
    max_workers: 5
    provider: {provider}
    head_node_type: head
    available_node_types:
      head: {{resources: {{CPU: 1}}, node_config: {{}}}}
      gpu: {{resources: {{CPU: 1, GPU: 2}}, node_config: {{}}, min_workers: 0, max_workers: 3}}
      cpu: {{resources: {{CPU: 8}}, node_config: {{}}, min_workers: 0}}
"""
FAKE_PROVIDER = """{
      type: external, launch_multiple: true, use_node_id_as_ip: true,
      module: ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider,
      disable_node_updaters: true, disable_launch_config_check: true, head_node_id: HEAD}"""
COMMANDS = [
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
    *("rsync_exclude", "rsync_filter"),
]
EMPTY = {"file_mounts": {}, "file_mounts_sync_continuously": False, "auth": {}, "docker": {}}
"""What the autoscaler wants to be told, even if it is nothing."""
HEAD_ID = "f" * 51 + "00000"
GROWING = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
SECOND_VERSION = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


def configuration(provider: str = "{type: aws}") -> str:
    return textwrap.dedent(FILE.format(provider=provider))


# Pure parts.


def test_workers_find_room_node_by_node():
    capacity = Capacity((HEAD, GPU_NODE, GPU_NODE), HEAD, Growth())
    assert (capacity.num_cpus, capacity.num_gpus) == (17, 8)
    assert capacity.room_now(num_gpus=1) == 8
    assert capacity.room_now(num_gpus=3) == 2  # not 8 / 3
    assert capacity.room_now(num_gpus=8) == 0
    assert capacity.room_now(num_gpus=0.4) == 20
    assert capacity.room_now(num_cpus=1) == 17
    assert capacity.room_now(num_cpus=4, num_gpus=1) == 4


def test_without_an_autoscaler_there_will_never_be_more_room():
    capacity = Capacity((HEAD, GPU_NODE), HEAD, Growth())
    assert capacity.room_ever(num_gpus=1) == 4


def test_an_unknown_limit_stays_unknown():
    assert Capacity((HEAD, GPU_NODE), HEAD, None).room_ever(num_gpus=100) is None


def test_growth_is_limited_by_kind_and_in_all():
    growth = Growth(((GPU_NODE, 3), (CPU_NODE, 9)), max_nodes=4)
    capacity = Capacity((HEAD,), HEAD, growth)
    assert capacity.room_ever(num_gpus=1) == 12
    assert capacity.room_ever(num_gpus=4) == 3
    assert capacity.room_ever(num_gpus=5) == 0
    assert capacity.room_ever(num_cpus=1) == 1 + 4 * 16
    assert capacity.room_ever(num_cpus=8) == 4 * 2
    assert Capacity((GPU_NODE,) * 9, HEAD, growth).room_ever(num_gpus=1) == 36  # it is there


def test_limits_are_read_as_ray_reads_them():
    growth = growth_of(yaml.safe_load(configuration()))
    kinds = {(NodeShape(1, 0), 0), (NodeShape(1, 2), 3), (NodeShape(8, 0), 5)}
    assert growth is not None
    assert set(growth.kinds) == kinds
    assert growth.max_nodes == 5


def test_kinds_that_do_not_say_what_they_have_make_the_limit_unknown():
    file = yaml.safe_load(configuration())
    file["available_node_types"]["gpu"]["resources"] = {}
    assert growth_of(file) is None
    assert growth_of({"max_workers": 3}) is None
    assert growth_of({}) == Growth()


def test_the_autoscaler_of_another_cluster_does_not_count():
    assert autoscaler_file("session_of_another_cluster") is None


def test_allocations_that_the_system_refuses_are_out_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert was_out_of_memory(refused.value)
    assert was_out_of_memory(MemoryError())
    assert was_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    outer = RuntimeError("lost")
    outer.__cause__ = OutOfMemoryError("killed")
    assert was_out_of_memory(outer)


def test_other_errors_are_not_out_of_memory():
    text = "the process was killed by the OOM killer due to high memory usage, (2) ray stop"
    assert not was_out_of_memory(RuntimeError(text))  # what Ray says of any lost process
    assert not was_out_of_memory(ActorDiedError())
    assert not was_out_of_memory(KeyError("OutOfMemoryError"))


# On clusters.


@ray.remote(num_cpus=0, max_restarts=0)
class Talker:
    def where(self) -> tuple[str, str, int]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_worker_id(), os.getpid()

    def say(self, line: str) -> None:
        sys.stdout.write(f"{line} out\n")
        sys.stdout.flush()
        sys.stderr.write(f"{line} err\n")
        sys.stderr.flush()

    def take(self, num_bytes: int) -> int:
        return take_memory(num_bytes)


def on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def look_at_two_nodes(*_: str) -> None:
    with nodes({"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 3}) as (ray_cluster, [first, second]):
        capacity = cluster_capacity()
        assert sorted(capacity.nodes, key=repr) == [HEAD, NodeShape(2, 1), NodeShape(3, 0)]
        assert capacity.room_ever(num_gpus=1) == 1
        last_words_of_a_killed_actor(first.node_id)
        drain(ray_cluster, second)
        assert cluster_capacity().num_cpus == 3
        kill_node(ray_cluster, first)
        started = time.monotonic()
        assert log_tail(first.node_id, None, 1) == []
        assert kernel_memory_kills_on(first.node_id) is None
        assert time.monotonic() - started < 30


def last_words_of_a_killed_actor(node_id: str) -> None:
    talker = Talker.options(scheduling_strategy=on(node_id)).remote()
    place, worker, pid = ray.get(talker.where.remote())
    assert place == node_id
    ray.get([talker.say.remote(f"line {n}") for n in range(30)])
    assert kernel_memory_kills_on(node_id) == kernel_memory_kills()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError) as caught:
        ray.get(talker.say.remote("more"))
    assert not was_out_of_memory(caught.value)
    everything = [f"line {n} {stream}" for stream in ("out", "err") for n in range(30)]
    assert log_tail(node_id, worker, pid, 100) == everything
    assert log_tail(node_id, None, pid) == everything[-20:]
    assert log_tail(node_id, None, pid, 1) == ["line 29 err"]
    assert log_tail(node_id, None, 1) == []


def drain(ray_cluster: Cluster, node: Node) -> None:
    busy = Talker.options(scheduling_strategy=on(node.node_id), num_cpus=1).remote()
    ray.get(busy.where.remote())  # a node without work leaves at once
    assert draining_nodes() == {}
    drain_node(ray_cluster.address, node.node_id, 100)
    [(name, deadline)] = draining_nodes().items()
    assert name == node.node_id
    assert 0 < deadline - time.time() <= 100


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_of_which_one_drains_and_one_dies():
    in_own_process(look_at_two_nodes)


def limits_of_growing_cluster(address: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    capacity = cluster_capacity()
    assert capacity.nodes == (HEAD,)
    assert capacity.room_ever(num_gpus=1) == 6
    assert capacity.room_ever(num_gpus=2) == 3
    assert capacity.room_ever(num_gpus=4) == 0
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("variables", [GROWING, {**GROWING, **SECOND_VERSION}], ids=["v1", "v2"])
def test_limits_of_an_autoscaler_are_found(variables, tmp_path):
    path = tmp_path / "growing.yaml"
    file = yaml.safe_load(configuration(FAKE_PROVIDER.replace("HEAD", HEAD_ID)))
    path.write_text(yaml.safe_dump({**{key: [] for key in COMMANDS}, **EMPTY, **file}))
    with started_head(f"--autoscaling-config={path}", environment=variables) as address:
        in_own_process(limits_of_growing_cluster, address)


@pytest.mark.ray
@pytest.mark.slow
@NEEDS_LIMITS
def test_what_the_system_kills_for_memory_is_counted(ray_executor):
    ray.cloudpickle.register_pickle_by_value(memory_limit)  # not on the workers' path
    talker = Talker.remote()
    node_id, _, pid = ray.get(talker.where.remote())
    before = kernel_memory_kills_on(node_id)
    assert before is not None
    with memory_group(64 << 20) as group:
        limit_process(group, pid)
        with pytest.raises(ActorDiedError) as caught:
            ray.get(talker.take.remote(1 << 30))
    assert not was_out_of_memory(caught.value)  # Ray cannot know
    after = kernel_memory_kills_on(node_id)
    assert after is not None
    assert after > before


def take_too_much(*_: str) -> None:
    ray.init(num_cpus=1, address="local", include_dashboard=False, log_to_driver=False)
    talker = Talker.remote()
    with pytest.raises(OutOfMemoryError) as caught:
        ray.get(talker.take.remote(4 << 30))
    assert not isinstance(caught.value, RayActorError)
    assert was_out_of_memory(caught.value)
    assert was_out_of_memory(pickle.loads(pickle.dumps(caught.value)))
    with pytest.raises(OutOfMemoryError):
        ray.get(talker.say.remote("more"))
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@NEEDS_LIMITS
def test_what_ray_kills_for_memory_says_so():
    with memory_group(3 << 30) as group:
        in_own_process(take_too_much, prefix=limited_command(group), environment=MONITOR)
