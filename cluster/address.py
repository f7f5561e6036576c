"""What answers at an address: asked before Ray is, which would try for minutes and then say less.

Ray has no public question of this kind. These are the remote calls that it makes itself, here with
a deadline: they have had this form since Ray 2.0, and carry versions, token and encryption.
"""

import itertools
import json
import os
import platform
import re
import socket
import time
from typing import NamedTuple

import grpc
import psutil
import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import find_gcs_addresses
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest, InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import (
    InternalKVGcsServiceStub,
    NodeInfoGcsServiceStub,
)
from ray.exceptions import AuthenticationError

from cluster.errors import ClusterError

CONNECT_SECONDS = 5
ANSWER_SECONDS = 5
NODE_SECONDS = 4
"""How long a node that has just been started on this machine may take to be registered."""
SUBMIT = "or run the command in the cluster: `onecomp submit --address http://HOST:8265 -- ...`"
TOKEN_VARIABLES = "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
PORTS = "the port is that of `ray start --head`, 6379 by default; 8265 is the job server's"


class Joinable(NamedTuple):
    """A cluster that this process can join.

    Args:
        address: ``host:port`` of its head.
        node_host: Address by which its node on this machine is known to the others.
    """

    address: str
    node_host: str


def require_cluster(address: str) -> Joinable:
    """Check within seconds that this process can join the Ray cluster at ``address``.

    Args:
        address: ``host:port`` of the head, or ``auto`` for the one cluster that has a node on this
            machine.

    Raises:
        ClusterError: There is none, it is another version's, it asks for a token that this process
            does not have, or it has no node on this machine.
    """
    if address == "auto":
        address = _cluster_here()
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    host, port = split_address(address)
    _require_listener(address, host, port)
    try:
        with init_grpc_channel(address) as channel:
            _require_version(address, channel)
            return Joinable(address, _node_here(address, channel))
    except AuthenticationError as error:
        raise ClusterError(_unreadable_token(address, error)) from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[host]:port``.

    Raises:
        ClusterError: It is something else, such as a client's or a job server's address.
    """
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address!r} is for Ray Client, which cannot be used: the driver has to run on a node "
            f"of the cluster. Give the head's host:port there, {SUBMIT}."
        )
    if "://" in address:
        raise ClusterError(
            f"{address!r} is not the address of a cluster but of its job server. Give the head's "
            f"host:port on a node of the cluster, {SUBMIT}."
        )
    place = re.fullmatch(r"(\[[^\[\]]+\]|[^:/\s]+):(\d+)", address)
    if place is None or not 0 < int(place[2]) < 1 << 16:
        raise ClusterError(
            f"{address!r} is not the address of a cluster. Give the head's host:port, or auto for "
            "the cluster that has a node on this machine."
        )
    return place[1].strip("[]"), int(place[2])


def _cluster_here() -> str:
    find_gcs_addresses.cache_clear()
    found = sorted(find_gcs_addresses())
    if not found:
        raise ClusterError(
            "address 'auto': no node of a Ray cluster runs on this machine. Start one with "
            f"`ray start --head` or `ray start --address HOST:PORT`, {SUBMIT}."
        )
    if len(found) > 1:
        raise ClusterError(
            f"address 'auto': nodes of {len(found)} Ray clusters run on this machine "
            f"({', '.join(found)}). Give the address of the one that is meant."
        )
    return found[0]


def _require_listener(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"Nothing listens at {address!r} ({error}). Check that the cluster is up and the "
            f"address right: {PORTS}."
        ) from error


def _require_version(address: str, channel: grpc.Channel) -> None:
    request = InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    try:
        reply = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        raise ClusterError(_refusal(address, error)) from error
    if not reply.value:
        return  # the head is still starting: Ray waits for it
    cluster = json.loads(reply.value)
    theirs = (cluster["ray_version"], cluster["python_version"])
    ours = (ray.__version__, platform.python_version())
    if _comparable(theirs) != _comparable(ours):
        raise ClusterError(
            f"The cluster at {address!r} runs Ray {theirs[0]} with Python {theirs[1]}, this "
            f"process Ray {ours[0]} with Python {ours[1]}, and they must be equal. Install the "
            f"cluster's versions here, {SUBMIT}."
        )


def _comparable(versions: tuple[str, str]) -> tuple[str, ...]:
    """What must be equal, by the same variable as in Ray: all of Python's version, or its start."""
    ray_version, python_version = versions
    level = os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch")
    return ray_version, *python_version.split(".")[: 2 if level == "minor" else 3]


def _node_here(address: str, channel: grpc.Channel) -> str:
    """Address of the cluster's node on this machine; Ray looks for one in the same way."""
    deadline = time.monotonic() + NODE_SECONDS
    while True:
        hosts = _alive_nodes(address, channel)
        lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        for part in itertools.chain.from_iterable(lines):
            node_id = part.removeprefix("--node_id=")
            if node_id in hosts:
                return hosts[node_id]
        if time.monotonic() > deadline:
            raise ClusterError(
                f"The cluster at {address!r} has no node on this machine, and the driver has to "
                f"run on one. Start it with `ray start --address {address}`, {SUBMIT}."
            )
        time.sleep(0.5)


def _alive_nodes(address: str, channel: grpc.Channel) -> dict[str, str]:
    """Addresses of nodes by their ids, in hexadecimal."""
    stub = NodeInfoGcsServiceStub(channel)
    try:
        reply = stub.GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        raise ClusterError(_refusal(address, error)) from error
    alive = [node for node in reply.node_info_list if node.state == GcsNodeInfo.ALIVE]
    return {node.node_id.hex(): node.node_manager_address for node in alive}


def _refusal(address: str, error: grpc.RpcError) -> str:
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return (
            f"The cluster at {address!r} asks for a token, and "
            f"{_own_token()}. Set RAY_AUTH_MODE=token and {TOKEN_VARIABLES} to the cluster's token."
        )
    return (
        f"What listens at {address!r} is not the head of a Ray cluster, or does not answer within "
        f"{ANSWER_SECONDS} s ({error.code().name}). Check host and port: {PORTS}."
    )


def _own_token() -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    return "refuses this process's" if mode.lower() == "token" else "this process sends none"


def _unreadable_token(address: str, error: AuthenticationError) -> str:
    return (
        f"The cluster at {address!r} cannot be asked: by RAY_AUTH_MODE=token this process has to "
        f"send a token, but it cannot be read ({str(error).split('. ')[0]}). Set "
        f"{TOKEN_VARIABLES}, or RAY_AUTH_MODE=disabled for a cluster without tokens."
    )
