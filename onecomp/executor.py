"""Where work runs: one interface over this process and over a cluster."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakSet

import torch

from onecomp.errors import ConfigError

MOST_THREADS = 16
"""Each worker thread holds a copy of the block that is worked on."""

Ref = object
"""Stands for a value that stays where it was made; an argument that is a Ref becomes its value."""


class Executor(ABC):
    """Numbered workers, each a plain object that lives somewhere and answers calls in order."""

    num_workers: int

    @abstractmethod
    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker by ``make_worker(worker_number, *arguments)``, replacing earlier ones.

        Raises:
            OneCompError: What making one raised.
        """

    @abstractmethod
    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        """Call a method of one worker; does not wait.

        Args:
            worker: Number of the worker.
            method: Name of its method.
            *arguments: Values, or Refs to be replaced by their values where the call runs.
            num_returns: How many values the method returns (as a sequence when not 1).

        Returns:
            One Ref for each returned value.
        """

    @abstractmethod
    def fetch(self, refs: Sequence[Ref]) -> list:
        """Bring values to the driver, waiting for them; meant for receipts, not for tensors.

        Raises:
            OneCompError: What the call raised, as it was raised there.
            WorkerError: The worker was lost.
        """

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
        self.num_workers = num_workers or natural
        self._threads: list[ThreadPoolExecutor] = []
        self._workers: list[Future[object]] = []
        self._returned: WeakSet[Future] = WeakSet()

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker on a thread of its own."""
        self.stop()
        torch.set_num_threads(1)
        self._threads = [
            ThreadPoolExecutor(1, f"worker-{number}", torch.set_num_threads, (1,))
            for number in range(self.num_workers)
        ]
        self._workers = []
        for number, thread in enumerate(self._threads):  # one by one: building a model's modules
            future = thread.submit(make_worker, number, *arguments)  # changes torch for all threads
            future.result()
            self._workers.append(future)

    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        """Queue a call on the worker's thread; Refs are futures."""
        returned = [Future() for _ in range(num_returns)]
        self._returned.update(returned)
        self._threads[worker].submit(self._call, worker, method, arguments, returned)
        return [*returned]

    def _call(
        self, worker: int, method: str, arguments: Sequence[object], returned: Sequence[Future]
    ) -> None:
        try:
            values = [a.result() if isinstance(a, Future) else a for a in arguments]
            value = getattr(self._workers[worker].result(), method)(*values)
            parts = [value] if len(returned) == 1 else value
            answers = [*zip(returned, parts, strict=True)]
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


def _claim(future: Future) -> bool:
    """Take the right to set the value; False if ``stop`` has cancelled it."""
    return future.set_running_or_notify_cancel()


def default_executor(
    num_workers: int | None = None, *, address: str | None = None, gpus_per_worker: float = 1
) -> Executor:
    """The executor that fits what was asked for and what is there.

    Ray when an address is given, when the process already belongs to a Ray job or cluster, or
    when more than one worker or GPU is asked for or present; otherwise this process.

    Args:
        num_workers: 0 for this process, 1 or more for that many Ray workers, None to choose.
        address: Address of a Ray cluster.
        gpus_per_worker: GPUs of each worker where the cluster has GPUs.

    Raises:
        ConfigError: Contradicting arguments.
    """
    if num_workers is not None and num_workers < 0:
        raise ConfigError("executor", [f"num_workers={num_workers}: must be 0 or more."])
    if gpus_per_worker < 0:
        raise ConfigError("executor", [f"gpus_per_worker={gpus_per_worker:g}: must be 0 or more."])
    if num_workers == 0 and address is not None:
        raise ConfigError(
            "executor",
            [
                f"num_workers=0 means this process, but address={address!r} names a cluster. "
                "Drop one."
            ],
        )
    if num_workers == 0:
        return LocalExecutor()
    from actors.executor import RayExecutor, ray_is_wanted  # noqa: PLC0415 - the one door to Ray

    if num_workers is None and not ray_is_wanted(address):
        return LocalExecutor()
    return RayExecutor(num_workers, address=address, gpus_per_worker=gpus_per_worker)
