"""One Ray cluster and one set of worker processes for all tests: each start takes many seconds."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import ray
import torch

from actors.executor import RayExecutor
from cluster.connect import connect, disconnect
from cluster.pool import ActorPlace
from onecomp.errors import LayerError
from onecomp.executor import Call, Executor, Ref, timed
from onecomp.jobs import quantize_group
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ
from onecomp.statistics import GroupStatistics

NUM_WORKERS = 3
SPARE_CPUS = 2


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RayExecutor]:
    """Three workers in processes that live as long as the session; ``start`` makes new objects."""
    connect(None, num_cpus=NUM_WORKERS + SPARE_CPUS)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # not on the workers' path
    executor = RayExecutor(NUM_WORKERS)
    yield executor
    executor.stop()
    disconnect()


class FirstWorkers(Executor):
    """The first workers of another executor, as an executor of its own."""

    survives_losses = True

    def __init__(self, executor: Executor, num_workers: int):
        self.executor, self.count = executor, num_workers

    @property
    def workers(self) -> list[int]:
        return self.executor.workers[: self.count]

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        self.executor.start(make_worker, *arguments)

    def call(
        self,
        worker: int,
        method: str,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        assert worker in self.workers
        return self.executor.call(worker, method, *arguments, num_returns=num_returns, after=after)

    def fetch(self, refs: Sequence[Ref]) -> list:
        return self.executor.fetch(refs)

    def ready(
        self, refs: Sequence[Ref], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[Ref]:
        return self.executor.ready(refs, timeout_s, wait_for_all=wait_for_all)

    def is_ref(self, value: object) -> bool:
        return self.executor.is_ref(value)

    def stop(self) -> None:
        pass

    @property
    def driver_bytes(self) -> int:
        return self.executor.driver_bytes

    def describe(self) -> str:
        return f"{self.count} of {self.executor.describe()}"


class Clerk:
    """A worker with something of everything that the executors have to carry."""

    def __init__(self, number: int, first: int = 0):
        if first < 0:
            raise LayerError("first", f"{first} is negative")
        self.number, self.log, self.kept = number, [first], torch.empty(0)

    def note(self, value: int) -> list[int]:
        self.log.append(value)
        return list(self.log)

    def process_id(self) -> int:
        return os.getpid()

    def ones(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    def halves(self, count: int) -> tuple[torch.Tensor, int]:
        return torch.full((count,), 0.5), count

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def equal(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        return torch.equal(first, second)

    def checksum(self, tensor: torch.Tensor) -> float:
        return tensor.double().sum().item()

    def backing_file(self, tensor: torch.Tensor) -> str:
        """The file of shared memory in which the tensor lies; empty for memory of its own."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            columns = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in columns[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return columns[5] if len(columns) == 6 else ""
        return ""

    def statistics(self, rows: torch.Tensor, original_rows: torch.Tensor) -> GroupStatistics:
        return GroupStatistics.of(rows, original_rows)

    def quantize(self, weight: torch.Tensor, statistics: GroupStatistics) -> torch.Tensor:
        """Codes of a layer after error propagation, everything computed from what was given."""
        method = GPTQ(wbits=4, groupsize=128, mse=True, actorder=True, calc_quant_error=True)
        results, _ = quantize_group(method, {"layer": weight}, statistics, QEPConfig())
        return results["layer"].qweight

    def checksums(self, statistics: GroupStatistics) -> list[float]:
        tensors = [*statistics.gram, statistics.cross]
        return [tensor.double().sum().item() for tensor in tensors]

    def fail(self, name: str) -> None:
        raise LayerError(name, "its weight holds 3 NaN")

    def misuse(self) -> None:
        raise KeyError("no such thing")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def num_threads(self) -> int:
        return torch.get_num_threads()

    def node_address(self) -> str:
        return ray.util.get_node_ip_address()


class Echo:
    """The least that a pool asks of its actors."""

    def __init__(self, number: int):
        self.number, self.held = number, None

    def meet(self, greeting: str) -> ActorPlace:
        if greeting != "hello":
            raise LayerError("greeting", greeting)
        context = ray.get_runtime_context()
        return ActorPlace(context.get_node_id(), "host", os.getpid(), context.get_worker_id(), 0)

    def make(
        self, place: ActorPlace, make_object: Callable[..., object], *arguments: object
    ) -> ActorPlace:
        self.held = make_object(self.number, *arguments)
        return place

    def call(self, method: str, num_returns: int, after: object, *arguments: object) -> list:
        if method == "exit":
            ray.actor.exit_actor()
        del after
        return timed(lambda: (self.held, method, *arguments), (), num_returns + 1)
