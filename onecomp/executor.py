"""Where work runs: one interface over this process and over a cluster."""

import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import torch

from onecomp.errors import ConfigError
from onecomp.resources import Resources, resources_here

MOST_THREADS = 16
"""Each worker thread holds a copy of the block that is worked on."""

Ref = object
"""Stands for a value that stays where it was made; an argument that is a Ref becomes its value."""


@dataclass(frozen=True)
class Receipt:
    """What a call that ended says of itself."""

    started: float
    """Unix seconds, by the clock of the worker's machine."""
    seconds: float
    is_leaving: bool = False
    """The worker's process was told to end (SIGTERM): it should hand over what it holds."""


class Call(NamedTuple):
    """A call that was handed out."""

    values: list[Ref]
    """What the method returns."""
    receipt: Ref
    """A ``Receipt``, once the call has ended."""


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    node: str
    """The cluster's name of the node; empty where there is no cluster."""
    host: str
    pid: int


@dataclass(frozen=True)
class WorkerCount:
    """How many workers a run wants: it starts with the least and uses what comes."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "WorkerCount":
        """From ``N`` or ``MIN:MAX``.

        Raises:
            ConfigError: Neither of the two.

        >>> WorkerCount.parse("2:8")
        WorkerCount(least=2, most=8)
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        count = match and cls(int(match[1]), int(match[2] or match[1]))
        if not count or count.least > count.most or (match[2] and not count.least):
            raise ConfigError(
                "executor",
                [f"num_workers={text!r}: must be N (0 for this process) or MIN:MAX, 1 or more."],
            )
        return count


class Executor(ABC):
    """Numbered workers, each a plain object that lives somewhere and answers calls in order."""

    survives_losses: bool = False
    """Whether a lost or hanging worker can be dismissed while the others go on."""

    @property
    @abstractmethod
    def workers(self) -> list[int]:
        """Numbers of the workers that were made and not let go, rising; numbers never recur."""

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return len(self.workers)

    def limit(self, most: int) -> None:  # noqa: B027 - a fixed number is limited already
        """Say, before ``start``, that the job would leave more workers than this without work."""

    def resources(self) -> Resources | None:
        """What there is, before ``start``, for the least number of workers; None if not known."""
        return None

    @abstractmethod
    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker by ``make_worker(worker_number, *arguments)``, replacing earlier ones.

        Raises:
            OneCompError: What making one raised.
        """

    @abstractmethod
    def call(
        self,
        worker: int,
        method: str,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        """Call a method of one worker; does not wait.

        Args:
            worker: Number of the worker.
            method: Name of its method.
            *arguments: Values, or Refs to be replaced by their values where the call runs.
            num_returns: How many values the method returns (as a sequence when not 1).
            after: The call runs only if the one that this belongs to has succeeded.
        """

    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        """``call``, for callers that want its values only."""
        return self.call(worker, method, *arguments, num_returns=num_returns).values

    @abstractmethod
    def fetch(self, refs: Sequence[Ref]) -> list:
        """Bring values to the driver, waiting for them; meant for receipts, not for tensors.

        Raises:
            OneCompError: What the call raised, as it was raised there.
            WorkerError: The worker was lost, or one that made an argument.
        """

    @abstractmethod
    def ready(
        self, refs: Sequence[Ref], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[Ref]:
        """Those that have a value or an error; waits for all or for one, but no longer."""

    @abstractmethod
    def is_ref(self, value: object) -> bool:
        """Whether an argument stands for a value that is to come."""

    # Workers come and go

    def recruit(self, *, wait: bool = False) -> list[int]:
        """Workers that have joined since ``start`` or the last call.

        Args:
            wait: Wait until there is one.

        Raises:
            OneCompError: None came.
        """
        del wait
        return []

    def leaving(self) -> set[int]:
        """Workers whose machine is about to be taken away."""
        return set()

    def release(self, worker: int, *, replace: bool) -> None:
        """Let go of a worker that has handed over what it held."""
        raise NotImplementedError(f"worker {worker} cannot be let go ({replace=})")

    def dismiss(self, worker: int) -> None:
        """End a worker that is lost or hangs, and ask for another."""
        raise NotImplementedError(f"worker {worker} cannot be replaced")

    def last_words(self, worker: int) -> list[str]:
        """Last lines of the log of a worker that is gone."""
        raise NotImplementedError(f"worker {worker} has no log")

    def ran_out_of_memory(self, worker: int) -> bool:
        """Whether a worker that is gone may have been killed for memory by the system."""
        raise NotImplementedError(f"worker {worker} cannot be replaced")

    def place(self, worker: int) -> Place:
        """Where a worker is, or was."""
        del worker
        return Place("", socket.gethostname(), 0)

    def meter(self, name: str, value: float | int, **tags: str) -> None:  # noqa: B027 - for clusters
        """Add to a metric of the cluster's monitoring."""

    @abstractmethod
    def stop(self) -> None:
        """Let the workers go."""

    @property
    @abstractmethod
    def driver_bytes(self) -> int:
        """Bytes that passed through the driver so far, both ways."""

    @abstractmethod
    def describe(self) -> str:
        """What the workers are, for the first lines of a run."""


class LocalExecutor(Executor):
    """Workers on threads of this process, each computing on a single processor core.

    The bits of a matrix product depend on how many threads share it, so no product is shared:
    the work is spread over cores by shards and groups, just as it is over machines.

    Args:
        num_workers: Threads; None for as many as torch would use, or one where there is a GPU.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_torch_threads = torch.get_num_threads()
        has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        natural = 1 if has_gpu else min(self._num_torch_threads, MOST_THREADS)
        self._count = num_workers or natural
        self._threads: list[ThreadPoolExecutor] = []
        self._workers: list[Future[object]] = []
        self._returned: WeakSet[Future] = WeakSet()

    @property
    def workers(self) -> list[int]:
        """All of them, from the beginning to the end."""
        return list(range(self._count))

    def resources(self) -> Resources:
        """What this process has."""
        return resources_here(num_workers=self._count)

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker on a thread of its own."""
        self.stop()
        torch.set_num_threads(1)
        self._threads = [
            ThreadPoolExecutor(1, f"worker-{number}", torch.set_num_threads, (1,))
            for number in self.workers
        ]
        self._workers = []
        for number, thread in enumerate(self._threads):  # one by one: building a model's modules
            future = thread.submit(make_worker, number, *arguments)  # changes torch for all threads
            future.result()
            self._workers.append(future)

    def call(
        self,
        worker: int,
        method: str,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        """Queue a call on the worker's thread; Refs are futures."""
        returned = [Future() for _ in range(num_returns + 1)]
        self._returned.update(returned)
        self._threads[worker].submit(self._run, worker, method, arguments, after, returned)
        return Call([*returned[:-1]], returned[-1])

    def _run(
        self,
        worker: int,
        method: str,
        arguments: Sequence[object],
        after: Ref | None,
        returned: Sequence[Future],
    ) -> None:
        try:
            values = [a.result() if isinstance(a, Future) else a for a in (after, *arguments)]
            call = getattr(self._workers[worker].result(), method)
            answers = [*zip(returned, timed(call, values[1:], len(returned)), strict=True)]
        except BaseException as error:  # noqa: BLE001 - handed to whoever fetches the value
            for future in returned:
                if _claim(future):
                    future.set_exception(error)
            return
        for future, part in answers:
            if _claim(future):
                future.set_result(part)

    def fetch(self, refs: Sequence[Ref]) -> list:
        """Wait for the values."""
        return [ref.result() for ref in refs]

    def ready(
        self, refs: Sequence[Ref], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[Ref]:
        """Futures that are done."""
        until = ALL_COMPLETED if wait_for_all else FIRST_COMPLETED
        return {*wait_for_futures(refs, timeout_s, until).done}

    def is_ref(self, value: object) -> bool:
        """Whether it is a future."""
        return isinstance(value, Future)

    def stop(self) -> None:
        """End the threads; calls that have not begun are dropped.

        Values that are still to come are cancelled: whoever waits for one, another worker
        included, gets a CancelledError.
        """
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for future in list(self._returned):
            future.cancel()
        for thread in self._threads:
            thread.shutdown(wait=True)
        self._threads.clear()
        self._workers.clear()
        self._returned.clear()
        torch.set_num_threads(self._num_torch_threads)

    @property
    def driver_bytes(self) -> int:
        """None: the driver and its workers share one memory."""
        return 0

    def describe(self) -> str:
        """Number of threads."""
        return f"this process, {self.num_workers} thread(s)"


def timed(
    call: Callable[..., object],
    arguments: Sequence[object],
    count: int,
    *,
    is_leaving: bool = False,
) -> list[object]:
    """What a call returns, as ``count - 1`` values, and a Receipt behind them."""
    started, clock = time.time(), time.monotonic()
    value = call(*arguments)
    receipt = Receipt(started, time.monotonic() - clock, is_leaving)
    return [value, receipt] if count == 2 else [*value, receipt]


def _claim(future: Future) -> bool:
    """Take the right to set the value; False if ``stop`` has cancelled it."""
    return future.set_running_or_notify_cancel()


def default_executor(
    num_workers: int | WorkerCount | None = None,
    *,
    address: str | None = None,
    gpus_per_worker: float = 1,
) -> Executor:
    """The executor that fits what was asked for and what is there.

    Ray when an address is given, when the process already belongs to a Ray job or cluster, or
    when more than one worker or GPU is asked for or present; otherwise this process.

    Args:
        num_workers: 0 for this process, 1 or more for that many Ray workers, a ``WorkerCount``
            for as many as there happen to be between two limits, None to choose.
        address: Address of a Ray cluster.
        gpus_per_worker: GPUs of each worker where the cluster has GPUs.

    Raises:
        ConfigError: Contradicting arguments.
    """
    if isinstance(num_workers, WorkerCount):
        count, least = num_workers, num_workers.least
    else:
        count, least = num_workers and WorkerCount(num_workers, num_workers), num_workers
    if least is not None and least < 0:
        raise ConfigError("executor", [f"num_workers={least}: must be 0 or more."])
    if gpus_per_worker < 0:
        raise ConfigError("executor", [f"gpus_per_worker={gpus_per_worker:g}: must be 0 or more."])
    if least == 0 and address is not None:
        raise ConfigError(
            "executor",
            [
                f"num_workers=0 means this process, but address={address!r} names a cluster. "
                "Drop one."
            ],
        )
    if least == 0:
        return LocalExecutor()
    from actors.executor import RayExecutor, ray_is_wanted  # noqa: PLC0415 - the one door to Ray

    if count is None and not ray_is_wanted(address):
        return LocalExecutor()
    return RayExecutor(count or None, address=address, gpus_per_worker=gpus_per_worker)
