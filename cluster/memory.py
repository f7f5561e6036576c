"""What the nodes of the connected cluster have free: host and GPU memory, object store, disk."""

from dataclasses import dataclass

import psutil
import ray
from ray._private.thirdparty import pynvml
from ray._private.utils import estimate_available_memory

from cluster.nodes import NodeShape, ask_nodes, draining_nodes, shape_of

ASK_SECONDS = 4
"""For all nodes together; one that does not answer counts as unknown."""
SPILL_LIMIT = 0.95
"""Ray spills objects until a disk is this full."""


@dataclass(frozen=True)
class FreeMemory:
    """What a node has free, in bytes."""

    host: int
    gpus: tuple[int, ...]
    """Of each GPU that its driver shows, the most first; empty where no driver of NVIDIA is."""
    spill_disk: int
    """For objects that do not fit into the object store."""


@dataclass(frozen=True)
class NodeMemory:
    """A node that is alive and not leaving."""

    address: str
    shape: NodeShape
    object_store: int
    """All of it, in bytes."""
    free: FreeMemory | None
    """None if the node does not answer."""


def memory_of_nodes() -> list[NodeMemory]:
    """Every node that is alive and not leaving, asked all at once; this one without a task."""
    here, leaving = ray.get_runtime_context().get_node_id(), draining_nodes()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    others = [n["NodeID"] for n in nodes if n["NodeID"] != here]
    answers = {here: free_memory()}
    answers |= ask_nodes(others, free_memory, timeout_s=ASK_SECONDS)
    return [
        NodeMemory(
            node["NodeManagerAddress"],
            shape_of(node["Resources"]),
            int(node["Resources"].get("object_store_memory", 0)),
            answers.get(node["NodeID"]),
        )
        for node in nodes
    ]


def free_memory() -> FreeMemory:
    """What the node has free that this process runs on; of a container, within its limit."""
    host = min(psutil.virtual_memory().available, estimate_available_memory())
    disk = psutil.disk_usage(ray.get_runtime_context().get_temp_dir())
    spill_disk = disk.free - (1 - SPILL_LIMIT) * disk.total
    return FreeMemory(max(0, host), _free_gpus(), max(0, int(spill_disk)))


def _free_gpus() -> tuple[int, ...]:
    """Asked of the driver: a task without a GPU sees none through CUDA."""
    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        free = sorted(pynvml.nvmlDeviceGetMemoryInfo(handle).free for handle in handles)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver, a part of a GPU, or one that has failed
        return ()
    return tuple(reversed(free))
