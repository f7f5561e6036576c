"""The library's Executor over Ray actors."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from ray import ObjectRef

from actors.resources import resources_of
from actors.source import source_digest
from actors.worker import WorkerActor
from cluster.connect import (
    cluster_shape,
    connect,
    disconnect,
    is_addressed,
    worker_runtime_environment,
)
from cluster.errors import ActorLostError, ClusterError
from cluster.memory import memory_of_nodes
from cluster.metrics import Meters
from cluster.nodes import (
    Capacity,
    cluster_capacity,
    draining_nodes,
    kernel_memory_kills_on,
    log_tail,
)
from cluster.pool import ActorPool
from onecomp.errors import ConfigError, InputError, OneCompError, WorkerError
from onecomp.executor import Call, Executor, Place, Ref, WorkerCount
from onecomp.resources import Resources

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 1800
"""How long a run waits for its first workers, or for one when all are lost."""
SAY_EVERY_SECONDS = 30
MOST_FAILED_STARTS = 5


def ray_is_wanted(address: str | None) -> bool:
    """Whether Ray should run a job whose user did not say how many workers."""
    return is_addressed(address) or torch.cuda.device_count() > 1


def may_have_gpus(capacity: Capacity, *, is_elastic: bool) -> bool:
    """Whether workers are to have GPUs: there are some, or nodes with some can come.

    Args:
        capacity: What there is.
        is_elastic: Workers may come later; with an autoscaler that does not tell what it can
            start, as on Kubernetes, these are expected to have GPUs.
    """
    if capacity.num_gpus or capacity.growth is None:
        return capacity.num_gpus > 0 or is_elastic
    return any(kind.num_gpus and count for kind, count in capacity.growth.kinds)


class RayExecutor(Executor):
    """One actor per worker: a GPU each where the cluster has GPUs, else an even share of CPUs.

    It asks for the most workers, starts with the least, and takes in others as they come. A lost
    worker is asked for again.

    Args:
        count: How many workers; None for one per GPU, or per CPU where there are no GPUs.
        address: Ray cluster; None for ``RAY_ADDRESS``, or a cluster on this machine.
        gpus_per_worker: GPUs of each worker.
        start_timeout_s: How long to wait for workers where there are too few.

    Raises:
        InputError: No cluster answers at the address.
        ConfigError: More GPUs are asked for than the cluster has.
    """

    survives_losses = True

    def __init__(
        self,
        count: WorkerCount | int | None,
        *,
        address: str | None = None,
        gpus_per_worker: float = 1,
        start_timeout_s: float = START_TIMEOUT_SECONDS,
    ):
        if isinstance(count, int):
            count = WorkerCount(count, count)
        try:
            self._connected_here = connect(address, num_cpus=count.most if count else 1)
        except ClusterError as error:
            raise InputError(address or "RAY_ADDRESS", str(error)) from error
        capacity = cluster_capacity()
        is_elastic = count is not None and count.least < count.most
        self._gpus = gpus_per_worker if may_have_gpus(capacity, is_elastic=is_elastic) else 0
        self._asked = self._count = count or self._natural_count(capacity)
        self._start_timeout_s = start_timeout_s
        try:
            self._require_room(capacity)
        except ConfigError:
            self._disconnect()
            raise
        options = self._options(capacity)
        self._num_cpus = options.get("num_cpus", 0)
        self._pool = ActorPool(WorkerActor, options)
        self._meters = Meters()
        self._recipe: list[ObjectRef] = []
        """What a worker is made of, and of what arguments."""
        self._starting: dict[int, ObjectRef] = {}
        self._workers: list[int] = []
        self._failed_starts, self._last_failure = 0, ""

    @property
    def workers(self) -> list[int]:
        """Those that have been made; others may be waiting for a place."""
        return sorted(self._workers)

    def _natural_count(self, capacity: Capacity) -> WorkerCount:
        size = {"num_gpus": self._gpus} if self._gpus else {"num_cpus": 1.0}
        count = max(1, capacity.room_now(**size))
        return WorkerCount(count, count)

    def _require_room(self, capacity: Capacity) -> None:
        room = capacity.room_ever(num_gpus=self._gpus) if self._gpus else None
        if room is not None and room < self._count.least:
            raise ConfigError(
                "RayExecutor",
                [
                    f"{self._count.least} workers with {self._gpus:g} GPUs each are asked for, but "
                    f"the cluster has {capacity.num_gpus:g} GPUs and can never hold more than "
                    f"{room} such workers. Lower --num-workers or --gpus-per-worker, or add nodes."
                ],
            )

    def _options(self, capacity: Capacity) -> dict:
        options: dict = {
            "runtime_env": worker_runtime_environment({"OMP_NUM_THREADS": "1"}),
            "scheduling_strategy": "SPREAD",
        }
        if self._gpus:
            return options | {"num_gpus": self._gpus}
        is_elastic = self._count.least < self._count.most
        share = capacity.num_cpus / self._count.most
        return options | {"num_cpus": 1 if is_elastic else min(1, share)}

    # Workers come and go

    def limit(self, most: int) -> None:
        """Ask for no more than this when the next job starts, and let others go."""
        least, asked = self._asked.least, self._asked.most
        if most < asked:
            logger.info("%d workers are enough for this job", most)
        self._count = WorkerCount(min(most, least), min(most, asked))

    def resources(self) -> Resources:
        """What the nodes have free; nothing of memory if there are workers that hold some of it."""
        nodes = [] if self._pool.numbers else memory_of_nodes()
        return resources_of(nodes, self._count.least, num_cpus=self._num_cpus, num_gpus=self._gpus)

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Ask for all workers and wait for the least; processes that are there make new objects."""
        self._recipe = self._pool.share((make_worker, *arguments), self._count.most)
        self._workers.clear()
        self._starting.clear()
        for number in self._wanted():
            self._begin(number)
        deadline = time.monotonic() + self._start_timeout_s
        while len(self._workers) < self._count.least:
            self._await_more(deadline)

    def _wanted(self) -> list[int]:
        """As many actors as are asked for, those with a place first; all others are gone."""
        numbers = sorted(self._pool.numbers, key=lambda number: number not in self._pool.places)
        for number in numbers[self._count.most :]:
            self._pool.remove(number)
        missing = self._count.most - len(numbers)
        return numbers[: self._count.most] + [self._pool.add() for _ in range(missing)]

    def _begin(self, number: int) -> None:
        self._starting[number] = self._pool.make(
            number, source_digest(), self._recipe[0], self._recipe[1:]
        )

    def _await_more(self, deadline: float) -> None:
        said = time.monotonic()
        known = len(self._workers)
        while len(self._workers) == known:
            if not self._starting:
                raise OneCompError(f"workers do not start: {self._last_failure}")
            self._take_in_started(timeout_s=0.2, is_awaited=True)
            now = time.monotonic()
            if now > deadline:
                raise OneCompError(
                    f"{known} of {self._count.least} workers came within "
                    f"{self._start_timeout_s:.0f} s. Lower --num-workers, or add nodes."
                )
            if now - said > SAY_EVERY_SECONDS:
                said = now
                logger.info("waiting for workers: %d of %d are here", known, self._count.least)

    def _take_in_started(self, timeout_s: float = 0.0, *, is_awaited: bool = False) -> list[int]:
        """Workers that have been made since the last time.

        Args:
            timeout_s: How long to wait for one.
            is_awaited: The run cannot go on without them: what one raises is raised here.
        """
        refs = [*self._starting.values()]
        ready = self._pool.ready(refs[:1], timeout_s) | self._pool.ready(refs, 0.0)
        joined = []
        for number, ref in list(self._starting.items()):
            if ref in ready:
                del self._starting[number]
                joined += self._take_in(number, ref, is_awaited=is_awaited)
        return joined

    def _take_in(self, number: int, ref: ObjectRef, *, is_awaited: bool) -> list[int]:
        try:
            [self._pool.places[number]] = self._pool.fetch([ref])
        except ActorLostError as error:
            self._pool.remove(number)
            self._failed_starts, self._last_failure = self._failed_starts + 1, str(error)
            if self._failed_starts <= MOST_FAILED_STARTS:
                self._begin(self._pool.add())
            else:
                logger.warning("%d workers in a row did not start: %s", self._failed_starts, error)
            return []
        except OneCompError as error:
            if is_awaited:
                raise
            logger.warning("worker %d cannot join: %s", number, error)
            self._pool.remove(number)
            return []
        self._failed_starts = 0
        self._workers.append(number)
        return [number]

    def recruit(self, *, wait: bool = False) -> list[int]:
        """Workers that have got a place since the last time."""
        joined = self._take_in_started()
        if wait and not joined:
            known = set(self._workers)
            self._await_more(time.monotonic() + self._start_timeout_s)
            joined = [number for number in self._workers if number not in known]
        return joined

    def leaving(self) -> set[int]:
        """Workers on nodes that are being drained."""
        drained = draining_nodes()
        return {n for n in self._workers if self._pool.places[n].node_id in drained}

    def release(self, worker: int, *, replace: bool) -> None:
        """End a worker's process; ask for another one."""
        self._pool.remove(worker)
        self._workers.remove(worker)
        if replace:
            self._begin(self._pool.add())

    def dismiss(self, worker: int) -> None:
        """Kill what may be left of a worker and ask for another."""
        self.release(worker, replace=True)

    def last_words(self, worker: int) -> list[str]:
        """Last lines of its log, where its node still answers."""
        place = self._pool.places[worker]
        return log_tail(place.node_id, place.worker_id, place.pid)

    def ran_out_of_memory(self, worker: int) -> bool:
        """Whether the system of its machine has killed for memory since the worker began.

        Workers that began later have told; if none of its node has, the node is asked.
        """
        place = self._pool.places[worker]
        neighbours = [p for p in self._pool.places.values() if p.node_id == place.node_id]
        if any(neighbour.memory_kills > place.memory_kills for neighbour in neighbours):
            return True
        kills = kernel_memory_kills_on(place.node_id)
        return kills is not None and kills > place.memory_kills

    def place(self, worker: int) -> Place:
        """Node, host and process of a worker that was made once."""
        place = self._pool.places[worker]
        return Place(place.node_id, place.host, place.pid)

    def meter(self, name: str, value: float | int, **tags: str) -> None:
        """Add to a metric of Ray's monitoring."""
        self._meters.record(name, value, **tags)

    # Calls

    def call(
        self,
        worker: int,
        method: str,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        """Call a worker's method; the values stay in the object store of its node."""
        return Call(*self._pool.submit(worker, method, arguments, num_returns, after))

    def fetch(self, refs: Sequence[Ref]) -> list:
        """Bring values to the driver, with the errors of the calls that made them."""
        try:
            return self._pool.fetch(refs)
        except ActorLostError as error:
            raise WorkerError(
                error.actor, error.call, error.reason, out_of_memory=error.out_of_memory
            ) from error

    def ready(
        self, refs: Sequence[Ref], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[Ref]:
        """References whose call has ended; nothing is brought here."""
        return {*self._pool.ready(refs, timeout_s, wait_for_all=wait_for_all)}

    def is_ref(self, value: object) -> bool:
        """Whether it is one of Ray's references."""
        return isinstance(value, ObjectRef)

    def stop(self) -> None:
        """End the workers' processes, and the cluster if it was started for them."""
        self._pool.stop()
        self._starting.clear()
        self._workers.clear()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connected_here:
            disconnect()

    @property
    def driver_bytes(self) -> int:
        """Pickled size of every argument and value that was not handed over by reference."""
        return self._pool.driver_bytes

    def describe(self) -> str:
        """Number of workers and nodes."""
        least, most = self._count.least, self._count.most
        number = f"{least}" if least == most else f"{least} to {most}"
        each = f"{self._gpus:g} GPU each" if self._gpus else "CPU only"
        return f"{number} Ray workers ({each}) on {cluster_shape().num_nodes} node(s)"
