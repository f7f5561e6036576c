"""Where work runs: one interface over this process and over a cluster."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from onecomp.errors import ConfigError

Ref = object
"""Stands for a value that stays where it was made; an argument that is a Ref becomes its value."""


class Executor(ABC):
    """Numbered workers, each a plain object that lives somewhere and answers calls in order."""

    num_workers: int

    @abstractmethod
    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker by ``make_worker(worker_number, *arguments)``."""

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
    """One worker in this process; calls run at once."""

    num_workers = 1

    def __init__(self) -> None:
        self._worker: object = None

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make the worker."""
        self._worker = make_worker(0, *arguments)

    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        """Call the method now; its values are their own Refs."""
        value = getattr(self._worker, method)(*arguments)
        return [value] if num_returns == 1 else list(value)

    def fetch(self, refs: Sequence[Ref]) -> list:
        """The values."""
        return list(refs)

    def stop(self) -> None:
        """Drop the worker."""
        self._worker = None

    @property
    def driver_bytes(self) -> int:
        """Always 0: nothing is sent."""
        return 0

    def describe(self) -> str:
        """``this process``."""
        return "this process"


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
