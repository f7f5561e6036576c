"""The library's Executor over Ray actors."""

import logging
from collections.abc import Callable, Sequence

import torch

from actors.worker import WorkerActor
from cluster.connect import (
    ClusterShape,
    cluster_shape,
    connect,
    disconnect,
    is_addressed,
    worker_runtime_environment,
)
from cluster.errors import ActorLostError, ClusterError
from cluster.pool import ActorPool
from onecomp.errors import ConfigError, InputError, WorkerError
from onecomp.executor import Executor, Ref

logger = logging.getLogger(__name__)


def ray_is_wanted(address: str | None) -> bool:
    """Whether Ray should run a job whose user did not say how many workers."""
    return is_addressed(address) or torch.cuda.device_count() > 1


class RayExecutor(Executor):
    """One actor per worker: a GPU each where the cluster has GPUs, else an even share of CPUs.

    Args:
        num_workers: None for one per GPU, or per CPU where there are no GPUs.
        address: Ray cluster; None for ``RAY_ADDRESS``, or a cluster on this machine.
        gpus_per_worker: GPUs of each worker.

    Raises:
        InputError: No cluster answers at the address.
        ConfigError: More GPUs are asked for than the cluster has.
    """

    def __init__(
        self, num_workers: int | None, *, address: str | None = None, gpus_per_worker: float = 1
    ):
        try:
            self._connected_here = connect(address, num_cpus=num_workers or 1)
        except ClusterError as error:
            raise InputError(address or "RAY_ADDRESS", f"{error} Check --address.") from error
        self._shape = cluster_shape()
        self._gpus = gpus_per_worker if self._shape.num_gpus else 0
        self.num_workers = num_workers or self._natural_count()
        self._check_gpus()
        self._pool = ActorPool(WorkerActor, self.num_workers, self._options(self._shape))

    def _natural_count(self) -> int:
        if self._gpus:
            return max(1, int(self._shape.num_gpus / self._gpus))
        return max(1, self._shape.num_cpus)

    def _check_gpus(self) -> None:
        wanted = self.num_workers * self._gpus
        if wanted > self._shape.num_gpus:
            raise ConfigError(
                "RayExecutor",
                [
                    f"{self.num_workers} workers with {self._gpus:g} GPUs each need {wanted:g}, "
                    f"but the cluster has {self._shape.num_gpus}. Lower --num-workers or "
                    "--gpus-per-worker, or add nodes."
                ],
            )

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        """Make every worker in its process, which stays the same when this is called again."""
        self.fetch(self._pool.make(make_worker, arguments))

    def _options(self, shape: ClusterShape) -> dict:
        environment = worker_runtime_environment({"OMP_NUM_THREADS": "1"})
        if self._gpus:
            return {"num_gpus": self._gpus, "runtime_env": environment}
        return {"num_cpus": min(1, shape.num_cpus / self.num_workers), "runtime_env": environment}

    def submit(
        self, worker: int, method: str, *arguments: object, num_returns: int = 1
    ) -> list[Ref]:
        """Call a worker's method; the values stay in the object store of its node."""
        return [*self._pool.submit(worker, method, arguments, num_returns)]

    def fetch(self, refs: Sequence[Ref]) -> list:
        """Bring values to the driver, with the errors of the calls that made them."""
        try:
            return self._pool.fetch(refs)
        except ActorLostError as error:
            raise WorkerError(error.actor, error.call, error.reason) from error

    def stop(self) -> None:
        """End the workers' processes, and the cluster if it was started for them."""
        self._pool.stop()
        if self._connected_here:
            disconnect()

    @property
    def driver_bytes(self) -> int:
        """Pickled size of every argument and value that was not handed over by reference."""
        return self._pool.driver_bytes

    def describe(self) -> str:
        """Number of workers and nodes."""
        each = f"{self._gpus:g} GPU each" if self._gpus else "CPU only"
        return f"{self.num_workers} Ray workers ({each}) on {self._shape.num_nodes} node(s)"
