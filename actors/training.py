"""The library's Gang as a Ray Train job."""

import pkgutil
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

from actors.executor import may_have_gpus
from actors.source import require_same_source, source_digest
from cluster.connect import (
    LOOPBACK,
    cluster_shape,
    connect,
    disconnect,
    worker_runtime_environment,
)
from cluster.errors import ClusterError, GangFailedError
from cluster.nodes import Capacity, cluster_capacity
from cluster.train_gang import GangPlan, Member, run_gang
from onecomp.errors import ConfigError, InputError, OneCompError
from onecomp.post_process.gang import Gang, GangMember, GangRequest

LOOPBACK_DEVICE = "lo"
REPEATED_ERRORS = (
    OneCompError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""Errors of a function itself. Losses of other ranks arrive as RuntimeError or OSError."""
RUN_NAME = "ray-train"
"""Folder of the checkpoints; a run that finds some there goes on from the last."""


class RayGang(Gang):
    """One Ray Train worker for each member: with a GPU where the cluster has some, else a CPU.

    Args:
        request: Which workers are wanted.

    Raises:
        InputError: No cluster answers at the address.
        ConfigError: The cluster can never hold so many workers.
    """

    def __init__(self, request: GangRequest):
        self.request = request
        try:
            self._connected_here = connect(request.address, num_cpus=request.num_workers or 1)
        except ClusterError as error:
            raise InputError(request.address or "RAY_ADDRESS", str(error)) from error
        capacity = cluster_capacity()
        self.has_gpus = request.uses_gpus and may_have_gpus(capacity, is_elastic=False)
        self.num_workers = request.num_workers or max(1, int(capacity.num_gpus * self.has_gpus))
        self.is_one_machine = cluster_shape().num_nodes == 1
        try:
            self._require_room(capacity)
        except ConfigError:
            self.__exit__()
            raise

    def _require_room(self, capacity: Capacity) -> None:
        size = {"num_gpus": 1.0} if self.has_gpus else {"num_cpus": 1.0}
        room = capacity.room_ever(**size)
        if room is not None and room < self.num_workers:
            kind = "GPU" if self.has_gpus else "CPU"
            raise ConfigError(
                "num_workers",
                [
                    f"{self.num_workers} workers with a {kind} each are asked for, but the cluster "
                    f"never holds more than {room}. Lower num_workers, or add nodes."
                ],
            )

    def __exit__(self, *_error: object) -> None:
        if self._connected_here:
            disconnect()

    def run(self, loop: str, argument: object, directory: Path) -> Any:
        """Have all workers call a function together, as a Ray Train job."""
        plan = GangPlan(
            name=RUN_NAME,
            folder=directory,
            num_workers=self.num_workers,
            gpus_per_worker=1 if self.has_gpus else 0,
            max_failures=self.request.max_failures,
            environment=self._environment(),
            final_errors=REPEATED_ERRORS,
            logger_name="onecomp",
        )
        try:
            return run_gang(_call, (source_digest(), loop, argument), plan)
        except GangFailedError as error:
            raise OneCompError(
                f"training failed on {self.num_workers} worker(s): {error}. Checkpoints, if any, "
                f"are in {directory / plan.name}."
            ) from error

    def _environment(self) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": "1"}
        if not self.has_gpus:
            variables["DS_ACCELERATOR"] = "cpu"
            if get_node_ip_address() in LOOPBACK:
                variables["GLOO_SOCKET_IFNAME"] = LOOPBACK_DEVICE
        return worker_runtime_environment(variables)["env_vars"]


def _call(task: tuple[str, str, object], member: Member) -> Any:
    """What a member runs: the function of that name, if its node has the driver's code."""
    digest, loop, argument = task
    require_same_source(digest)
    function = pkgutil.resolve_name(loop)
    return function(
        argument, GangMember(member.rank, member.world_size, member.restored, member.save)
    )
