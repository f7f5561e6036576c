"""Connecting to a Ray cluster, or starting one on this machine for as long as it is needed."""

import logging
import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from cluster.errors import ClusterError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
WORKER_ENVIRONMENT = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
"""Read-only tensors are shared through the object store instead of copied, twenty times faster."""
ZERO_COPY_WARNING = "Zero-copy tensor serialization is enabled"
"""Ray says so once a process; nothing here writes into a tensor that it was given."""
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # node address 127.0.0.1: every port binds loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # at the default of 15 anything else on the machine starves them
}
"""For clusters that this process starts: nothing listens beyond this machine."""


@dataclass(frozen=True)
class ClusterShape:
    """What the nodes that are alive have in all."""

    num_nodes: int
    num_cpus: int
    num_gpus: int


def is_addressed(address: str | None) -> bool:
    """Whether a cluster is named: by argument, environment, or because this process is in one."""
    return address is not None or "RAY_ADDRESS" in os.environ or ray.is_initialized()


def connect(address: str | None, *, num_cpus: int) -> bool:
    """Connect to the cluster at ``address``; without one, start a cluster on this machine.

    Args:
        address: ``host:port``, ``ray://host:port`` or ``auto``; None uses ``RAY_ADDRESS``.
        num_cpus: Least number of CPUs of a cluster that is started here.

    Returns:
        Whether this call connected, so that the caller has to disconnect.

    Raises:
        ClusterError: Nothing answers at the address.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    warnings.filterwarnings("ignore", message=ZERO_COPY_WARNING)
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _start_here(num_cpus)
        return True
    _require_listener(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"No Ray cluster of this version answers at {address!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
    return True


def _require_listener(address: str) -> None:
    """Check that something listens where the cluster should: Ray itself would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?(\[.+\]|[^:/]+):(\d+)", address)
    if place is None:
        return
    try:
        socket.create_connection((place[1].strip("[]"), int(place[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"Nothing listens at {address!r} ({error}).") from error


def _start_here(num_cpus: int) -> None:
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def disconnect() -> None:
    """Leave the cluster; one started here ends."""
    ray.shutdown()


def cluster_shape() -> ClusterShape:
    """Nodes, CPUs and GPUs of the connected cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterShape(
        len(nodes),
        int(sum(resources.get("CPU", 0) for resources in nodes)),
        int(sum(resources.get("GPU", 0) for resources in nodes)),
    )


def worker_runtime_environment(extra: Mapping[str, str] | None = None) -> dict:
    """``runtime_env`` of actors on a cluster whose nodes were started by others."""
    return {"env_vars": {**WORKER_ENVIRONMENT, **(extra or {})}}
