"""What the nodes of a cluster have for each worker of a run, at best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.memory import FreeMemory, NodeMemory
from onecomp.resources import Resources, WorkerResources

LIBRARY_BYTES = 140 * 2**20
"""Files of libraries that a worker has in memory: shared by all processes, and counted as free."""


@dataclass(frozen=True)
class Place:
    """Somewhere that has room for some workers, who share what is free there."""

    name: str
    room: int
    num_bytes: float | int
    """Infinite where it is not known."""


def resources_of(
    nodes: Sequence[NodeMemory], num_workers: int, *, num_cpus: float | int, num_gpus: float | int
) -> Resources:
    """What so many workers have that are spread over the nodes as well as can be.

    Args:
        nodes: Those that there are; workers for which there is no room yet are left out.
        num_workers: How many workers.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each.
    """
    able = [node for node in nodes if node.shape.room(num_cpus, num_gpus)]
    hosts = [
        Place(
            f"node {node.address}",
            node.shape.room(num_cpus, num_gpus),
            math.inf if node.free is None else node.free.host,
        )
        for node in able
    ]
    gpus = [place for node in able for place in _gpus(node, num_gpus)] if num_gpus else []
    stores = [(node.object_store, node.free) for node in able]
    least = min(stores, key=_with_disk, default=(None, None))
    return Resources(
        workers=(
            *(WorkerResources(n, None, b + LIBRARY_BYTES) for n, b in shares(hosts, num_workers)),
            *(WorkerResources(n, b, None) for n, b in shares(gpus, num_workers)),
        ),
        object_store=least[0] if least[1] is not None else None,
        spill_disk=least[1].spill_disk if least[1] is not None else 0,
        num_workers=num_workers,
        has_gpus=bool(num_gpus),
    )


def _with_disk(store: tuple[int, FreeMemory | None]) -> float | int:
    size, free = store
    return math.inf if free is None else size + free.spill_disk


def _gpus(node: NodeMemory, num_gpus: float | int) -> list[Place]:
    """The GPUs of a node that have most free: Ray may have been given some of them only."""
    count = int(node.shape.num_gpus // max(1, num_gpus))
    known = node.free.gpus[:count] if node.free is not None else ()
    each = int(1 / num_gpus + 1e-9) if num_gpus < 1 else 1
    unknown = [math.inf] * (count - len(known))
    return [Place(f"a GPU of node {node.address}", each, size) for size in [*known, *unknown]]


def shares(places: Sequence[Place], num_workers: int) -> list[tuple[str, float | int]]:
    """Name and bytes for each of the workers, spread so that the poorest has most.

    Where a place has several workers, they are named once. What is not known is left out.

    >>> shares([Place("a", 4, 12), Place("b", 1, 5)], 3)
    [('a, shared by 2 workers', 6.0), ('b', 5.0)]
    """
    counts = dict.fromkeys(range(len(places)), 0)
    for _ in range(num_workers):
        free = [i for i, count in counts.items() if count < places[i].room]
        if not free:
            break
        counts[max(free, key=lambda i: places[i].num_bytes / (counts[i] + 1))] += 1
    return [
        (_named(places[i], count), places[i].num_bytes / count)
        for i, count in counts.items()
        if count and math.isfinite(places[i].num_bytes)
    ]


def _named(place: Place, num_workers: int) -> str:
    return place.name if num_workers == 1 else f"{place.name}, shared by {num_workers} workers"
