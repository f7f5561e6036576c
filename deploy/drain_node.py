"""Take the Ray node of this machine out of service before the machine goes away.

    python deploy/drain_node.py --now          # a Kubernetes preStop hook
    python deploy/drain_node.py --cloud aws    # a service beside `ray start` on a spot machine

Draining tells the cluster that the node will be gone at a deadline: nothing new is placed on it,
and a running job hands over and releases its workers there. A node that drains and has become idle
ends itself, which this script waits for, until the deadline.

Without ``--now`` the script waits for SIGTERM, and with ``--cloud`` also for the spot notice of
that cloud. Kubernetes waits for a preStop hook for ``terminationGracePeriodSeconds``, which must be
longer than the deadline.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from http.client import HTTPException

import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RpcError

logger = logging.getLogger("drain_node")

POLL_SECONDS = 1.0
NOTICE_SECONDS = 2.0
"""How long the metadata service, which is on the same machine, may take to answer."""
REFUSED = 1


def aws_deadline(base_url: str) -> float | None:
    """Unix time at which EC2 takes the machine back; None while nothing was announced.

    Asks the instance metadata service, version 2, for ``spot/instance-action``.
    """
    token = _ask(
        f"{base_url}/latest/api/token",
        {"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        method="PUT",
    )
    notice = _ask(
        f"{base_url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
    )
    if not notice:
        return None
    at = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ")
    return at.replace(tzinfo=timezone.utc).timestamp()


def gcp_deadline(base_url: str) -> float | None:
    """Unix time at which Compute Engine takes the machine back: 30 s from the notice on."""
    notice = _ask(
        f"{base_url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
    )
    return time.time() + 30 if notice == "TRUE" else None


CLOUDS: Mapping[str, tuple[str, Callable[[str], float | None]]] = {
    "aws": ("http://169.254.169.254", aws_deadline),
    "gcp": ("http://metadata.google.internal", gcp_deadline),
}
"""Where a cloud's metadata service is, and how to ask it for a notice."""


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """What a metadata service answers; empty for 404, its way to say that there is nothing."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=NOTICE_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 404:
                logger.warning("%s answers %d", url, error.code)
            return ""
    except (OSError, HTTPException) as error:
        logger.warning("%s does not answer: %s", url, error)
        return ""


def wait_for_notice(cloud: str | None, base_url: str | None, stopped: threading.Event) -> float:
    """Unix time at which the machine goes, once that is known; infinity if SIGTERM came instead."""
    default_url, deadline_of = CLOUDS.get(cloud or "", ("", lambda _: None))
    while not stopped.wait(POLL_SECONDS):
        deadline = deadline_of(base_url or default_url)
        if deadline is not None:
            logger.warning("the cloud takes this machine back in %.0f s", deadline - time.time())
            return deadline
    return float("inf")


def find_node(gcs: GcsClient, node_id: str | None, address: str) -> str:
    """Hex id of the node to drain.

    Args:
        gcs: The cluster's control service.
        node_id: As the user gave it.
        address: Of this machine, where no id was given.

    Raises:
        LookupError: No node or several nodes of the cluster are on this machine.
    """
    alive = {
        node.hex(): info.node_manager_address
        for node, info in gcs.get_all_node_info().items()
        if info.state == GcsNodeInfo.GcsNodeState.ALIVE
    }
    found = [node for node in alive if node == node_id or (not node_id and alive[node] == address)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{node[:12]} on {place}" for node, place in alive.items()) or "none"
    raise LookupError(
        f"{len(found)} nodes of the cluster are {node_id or 'on ' + address}; one is needed. "
        f"Alive: {known}. Name one with --node-id."
    )


def drain(gcs: GcsClient, node: str, deadline: float) -> None:
    """Drain a node and wait until it has ended or the deadline has come.

    Raises:
        PermissionError: Ray refuses, with its reason.
    """
    accepted, reason = gcs.drain_node(
        node, DRAIN_NODE_REASON_PREEMPTION, "the machine goes away", int(deadline * 1000)
    )
    if not accepted:
        raise PermissionError(reason)
    logger.warning("node %s drains, deadline in %.0f s", node[:12], deadline - time.time())
    while time.time() < deadline:
        if not is_alive(gcs, node):
            logger.warning("node %s has ended", node[:12])
            return
        time.sleep(POLL_SECONDS)
    logger.warning("node %s still works at its deadline; what runs on it is lost", node[:12])


def is_alive(gcs: GcsClient, node: str) -> bool:
    """Whether the cluster counts the node among its own."""
    infos = {found.hex(): info for found, info in gcs.get_all_node_info().items()}
    return node in infos and infos[node].state == GcsNodeInfo.GcsNodeState.ALIVE


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="host:port of the cluster; default: RAY_ADDRESS, which KubeRay sets",
    )
    parser.add_argument("--node-id", help="default: the one node on this machine")
    parser.add_argument("--now", action="store_true", help="drain at once")
    parser.add_argument("--cloud", choices=sorted(CLOUDS), help="whose spot notice to wait for")
    parser.add_argument("--metadata-url", help="default: where the cloud has it")
    parser.add_argument(
        "--deadline-s", type=float, default=100, help="seconds from SIGTERM or --now (default 100)"
    )
    options = parser.parse_args(arguments)
    if not options.address:
        parser.error("no cluster: give --address host:port, or set RAY_ADDRESS.")
    return options


def main(arguments: Sequence[str]) -> int:
    """Wait for the end of the machine, drain its node; 1 if that was refused or impossible."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s  %(message)s"
    )
    options = parsed(arguments)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        gcs = GcsClient(address=options.address)
        node = find_node(gcs, options.node_id, ray.util.get_node_ip_address())
        logger.info("watching node %s of %s", node[:12], options.address)
        deadline = float("inf")
        if not options.now:
            deadline = wait_for_notice(options.cloud, options.metadata_url, stopped)
        drain(gcs, node, min(deadline, time.time() + options.deadline_s))
    except (LookupError, PermissionError, RpcError, OSError) as error:
        sys.stderr.write(f"error: {options.address}: {error}\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
