"""Two nodes with a network of their own between them, which can be cut.

Each is a process tree behind ``ray start`` in a network namespace, with its own view of processes
and its own shared memory, as on two machines. The tests' own process is on neither: the driver runs
on the head, by
`in_own_process(..., prefix=both.on_head)`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import pytest
from cluster_nodes import FAST, RAY, in_own_process, wait_for_nodes, wait_until

PORT = 6379
CONFIG = json.dumps(FAST)
ONE_CPU = ("--num-cpus=1",)
SMALL_STORE = "--object-store-memory=80000000"
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
ISOLATED = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c")
OWN_SHARED_MEMORY = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"'
REAL_NETWORK = ("env", "-u", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
"""The variable that keeps all other tests on the loopback device."""
NEEDS_NAMESPACES = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))),
    reason="needs root, iproute2 and util-linux",
)


@dataclass(frozen=True)
class NamespacedNodes:
    """A running head and another node.

    Args:
        on_head: In front of a command that is to run on the head.
        on_other: In front of a command that is to run on the other node.
        other_space: Name of the other node's network namespace, for `cut_network`.
    """

    on_head: tuple[str, ...]
    on_other: tuple[str, ...]
    other_space: str
    address: str = f"{HEAD}:{PORT}"


def cut_network(other_space: str) -> None:
    """Let no packet pass between the two any more, without a word; works on the head as well."""
    _ip("-n", other_space, "link", "set", "veth0", "down")


def heal_network(other_space: str) -> None:
    """Let packets pass again."""
    _ip("-n", other_space, "link", "set", "veth0", "up")


@contextlib.contextmanager
def namespaced_nodes(
    head_options: Sequence[str] = ("--num-cpus=1",),
    other_options: Sequence[str] = ("--num-cpus=1",),
) -> Iterator[NamespacedNodes]:
    """Two nodes in two namespaces; `FAST`, so that a cut is noticed within some seconds.

    Args:
        head_options: Of ``ray start`` for the head, such as ``--num-gpus=1``.
        other_options: For the other node.
    """
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head_space, other_space = _linked_namespaces(stack)
        places = [("--temp-dir", f"{folder}/{name}") for name in ("a", "b")]
        first = ("--head", f"--port={PORT}", "--include-dashboard=false", "--system-config", CONFIG)
        on_head = _start(stack, head_space, HEAD, *places[0], *first, *head_options)
        address = NamespacedNodes.address
        in_own_process(wait_for_nodes, address, "1", prefix=on_head)
        join = ("--address", address)
        on_other = _start(stack, other_space, OTHER, *places[1], *join, *other_options)
        in_own_process(wait_for_nodes, address, "2", prefix=on_head)
        yield NamespacedNodes(on_head, on_other, other_space)


def _linked_namespaces(stack: contextlib.ExitStack) -> tuple[str, str]:
    """Two network namespaces with a cable between them."""
    first, second = (f"ray{os.getpid()}{end}" for end in "ab")
    for space in (first, second):
        _ip("netns", "add", space)
        stack.callback(_ip, "netns", "delete", space)
    cable = ("veth0", "netns", first, "type", "veth", "peer", "name", "veth0", "netns", second)
    _ip("link", "add", *cable)
    for space, address in ((first, HEAD), (second, OTHER)):
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "veth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "veth0", "up")
    return first, second


def _start(stack: contextlib.ExitStack, space: str, address: str, *options: str) -> tuple[str, ...]:
    """Start a node, and return what goes in front of a command that is to run on it."""
    ray_start = (*RAY, "start", "--block", f"--node-ip-address={address}", SMALL_STORE, *options)
    process = subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            space,
            *ISOLATED,
            OWN_SHARED_MEMORY,
            "sh",
            *REAL_NETWORK,
            *ray_start,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    outer = psutil.Process(process.pid)
    wait_until(lambda: bool(outer.children()))
    [inner] = outer.children()  # the first process of its namespace, which ends with it
    stack.callback(wait_until, lambda: not inner.is_running())
    stack.callback(process.kill)
    return ("nsenter", "--target", str(inner.pid), "--net", "--pid", "--mount", *REAL_NETWORK)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
