"""The two nodes in network namespaces are two machines to Ray, and their network can be cut."""

import subprocess
import sys
import time

import psutil
import pytest
import ray
from cluster_namespaces import (
    HEAD,
    NEEDS_NAMESPACES,
    OTHER,
    cut_network,
    namespaced_nodes,
)
from cluster_nodes import in_own_process, wait_until
from ray.exceptions import RayActorError

from cluster.connect import connect


@ray.remote(num_cpus=0, resources={f"node:{OTHER}": 0.1}, max_restarts=0)
class Stranger:
    def address(self) -> str:
        return ray.util.get_node_ip_address()


def lose_the_network(address: str, other_space: str) -> None:
    assert connect(address, num_cpus=1)
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {HEAD, OTHER}
    stranger = Stranger.remote()
    assert ray.get(stranger.address.remote()) == OTHER
    cut_network(other_space)
    started = time.monotonic()
    with pytest.raises(RayActorError):
        ray.get(stranger.address.remote(), timeout=60)
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    sys.stdout.write(str(time.monotonic() - started))


@pytest.mark.ray
@pytest.mark.slow
@NEEDS_NAMESPACES
def test_a_node_that_loses_its_network_is_dead_to_the_other():
    with namespaced_nodes() as both:
        first_process = int(both.on_head[both.on_head.index("--target") + 1])
        assert psutil.pid_exists(first_process)
        seconds = in_own_process(
            lose_the_network, both.address, both.other_space, prefix=both.on_head
        )
    assert float(seconds) > 0
    spaces = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    assert both.other_space not in spaces.stdout
    assert not psutil.pid_exists(first_process)
