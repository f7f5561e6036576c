"""Connecting to a Ray cluster, or starting one on this machine for as long as it is needed."""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._private import ray_constants, worker
from ray.exceptions import RayError

from cluster.address import Joinable, require_cluster, split_address
from cluster.errors import ClusterError

TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
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

LOOPBACK = ("127.0.0.1", "::1")

_lock = threading.Lock()
_temporary_folders: list[str] = []
"""Of the cluster that was started here, if any: its sockets, logs and spilled objects."""


@dataclass(frozen=True)
class ClusterShape:
    """What the nodes that are alive have in all."""

    num_nodes: int
    num_cpus: int
    num_gpus: int


def is_addressed(address: str | None) -> bool:
    """Whether a cluster is named: by argument, environment, or because this process is in one."""
    return _named(address) is not None or ray.is_initialized()


def connect(address: str | None, *, num_cpus: int) -> bool:
    """Connect to the cluster at ``address``; without one, start a cluster on this machine.

    A process is in one cluster at most: a second call does nothing, from whichever thread. One that
    is started here ends with the thread that started it, if not before.

    Args:
        address: ``host:port`` of the head, ``auto`` for the one cluster with a node on this
            machine, ``local`` for a new one; None uses ``RAY_ADDRESS``.
        num_cpus: Least number of CPUs of a cluster that is started here.

    Returns:
        Whether this call connected, so that the caller has to disconnect.

    Raises:
        ClusterError: No cluster that this process can join answers at the address, found out within
            seconds; or the process already is in another one.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # whoever asks for a value learns why it failed
    warnings.filterwarnings("ignore", message=ZERO_COPY_WARNING)
    logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)  # it says that there is a token
    with _lock:
        if ray.is_initialized():
            _require_same_cluster(address)
            return False
        address = _named(address)
        if address is None:
            _start_here(num_cpus)
        else:
            _join(require_cluster(address))
        worker._worker_logs_enabled = False  # on standard output: we report losses
    return True


def _named(address: str | None) -> str | None:
    """The address that counts: Ray too lets its variable decide what ``auto`` means."""
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    return None if address in ("", "local") else address


def _require_same_cluster(address: str | None) -> None:
    if address in (None, "", "auto", "local"):
        return
    joined = ray.get_runtime_context().gcs_address
    wanted, current = split_address(address), split_address(joined)
    if wanted[1] != current[1] or _is_here(wanted[0]) != _is_here(current[0]):
        raise ClusterError(
            f"This process is already in the Ray cluster at {joined!r}, and cannot join the one at "
            f"{address!r} as well. Leave out the address, or start another process."
        )


def _is_here(host: str) -> bool:
    """Whether ``host`` is this machine: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError:
        return False
    return True


def _join(found: Joinable) -> None:
    with _node_on_loopback(found.node_host in LOOPBACK):
        try:
            ray.init(address=found.address, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            ray.shutdown()
            raise ClusterError(
                f"The Ray cluster at {found.address!r} cannot be joined "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Check that its node on "
                "this machine is alive, and in the same container as this process."
            ) from error


def _start_here(num_cpus: int) -> None:
    folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    _temporary_folders.append(folder)
    with _local_environment():
        variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
        with _node_on_loopback(os.environ[variable].lower() not in ("1", "true")):
            ray.init(
                address="local",
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _temp_dir=folder,
            )


@contextlib.contextmanager
def _local_environment() -> Iterator[None]:
    """Give Ray's processes `LOCAL_ENVIRONMENT`, where the user has not set the variable."""
    added = {n: value for n, value in LOCAL_ENVIRONMENT.items() if n not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _node_on_loopback(is_on_loopback: bool) -> Iterator[None]:
    """Let Ray take the loopback device for this machine's address, or the network for it.

    Ray reads the variable for it when it is imported, which is too early: so what it made of it is
    set here. Else a head that is started here would listen on every device of the machine, and one
    that listens on the loopback device only would be looked for on the network, for minutes.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = not is_on_loopback
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def disconnect() -> None:
    """Leave the cluster; one started here ends, and its files go."""
    ray.shutdown()
    worker._worker_logs_enabled = True
    while _temporary_folders:
        shutil.rmtree(_temporary_folders.pop(), ignore_errors=True)


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
