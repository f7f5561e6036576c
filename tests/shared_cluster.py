"""One Ray cluster and one set of worker processes for all tests: each start takes many seconds."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
import ray
import torch

from actors.executor import RayExecutor
from cluster.connect import connect, disconnect
from onecomp.errors import LayerError
from onecomp.executor import Executor, Ref

NUM_WORKERS = 3
SPARE_CPUS = 2


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RayExecutor]:
    """Three workers whose processes live as long as the session; ``start`` gives them new objects."""
    connect(None, num_cpus=NUM_WORKERS + SPARE_CPUS)
    executor = RayExecutor(NUM_WORKERS)
    yield executor
    executor.stop()
    disconnect()


class FirstWorkers(Executor):
    """The first workers of another executor, as an executor of its own."""

    def __init__(self, executor: Executor, num_workers: int):
        self.executor, self.num_workers = executor, num_workers

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        self.executor.start(make_worker, *arguments)

    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        assert worker < self.num_workers
        return self.executor.submit(worker, method, *arguments, num_returns=num_returns)

    def fetch(self, refs: Sequence[Ref]) -> list:
        return self.executor.fetch(refs)

    def stop(self) -> None:
        pass

    @property
    def driver_bytes(self) -> int:
        return self.executor.driver_bytes

    def describe(self) -> str:
        return f"{self.num_workers} of {self.executor.describe()}"


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

    def checksum(self, tensor: torch.Tensor) -> float:
        return tensor.double().sum().item()

    def address(self, tensor: torch.Tensor) -> tuple[int, bool]:
        """Where the tensor lies, and whether this process may write there."""
        return tensor.data_ptr(), bool(tensor.numpy().flags.writeable)

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
