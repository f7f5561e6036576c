"""Real clusters of several nodes on this machine, and what can happen to them.

One process can be in one cluster only, and the tests' own process is in the one of
`shared_cluster`. So a test with a cluster of its own writes its driver as a function of its module
and runs it with `in_own_process`; inside, `nodes` is the cluster.
"""

import contextlib
import inspect
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

ROOT = Path(__file__).parents[1]
FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}
"""A node that dies is noticed in two seconds instead of fourteen; set by the head for all."""
CALL_FUNCTION = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="driver")[sys.argv[2]](*sys.argv[3:])
"""
START_SECONDS = 60
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
LEAN = ["--include-dashboard=false", "--num-cpus=1", "--object-store-memory=80000000"]


def in_own_process(
    function: Callable[..., None],
    *arguments: str,
    seconds: float = 300,
    environment: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> str:
    """Call a function of a test module in a fresh Python process; its assertions count.

    Args:
        function: Takes strings; imports of its module are made anew.
        seconds: After these the process is killed and the test fails.
        environment: On top of this process's variables.
        prefix: Command line in front of Python's, such as `NamespacedNodes.on_head`.

    Returns:
        What it printed on standard output.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CALL_FUNCTION, inspect.getfile(function), function.__name__]
    ran = subprocess.run(
        [*prefix, *command, *arguments],
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **(environment or {})},
        cwd=ROOT / "tests",  # the first place where imports are looked for
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert ran.returncode == 0, f"{function.__name__} ended with {ran.returncode}:\n{ran.stderr}"
    return ran.stdout


@contextlib.contextmanager
def nodes(
    *shapes: Mapping[str, object], head_cpus: int = 1, connect: bool = True
) -> Iterator[tuple[Cluster, list[Node]]]:
    """A head and one more node for each of ``shapes``, started by this process; `FAST`.

    Args:
        shapes: Arguments of `Cluster.add_node`: ``num_cpus``, ``num_gpus``, ``resources``,
            ``labels``, ``env_vars``.
        head_cpus: 0 keeps actors with CPUs off the head.
        connect: Whether to join it as a driver.

    Yields:
        The cluster and the nodes of ``shapes``.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    head = {"num_cpus": head_cpus, "include_dashboard": False, "_system_config": FAST}
    outer = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder  # Ray notes there which cluster is the machine's last one,
    Path(folder, "ray").mkdir()  # in a directory that has to exist
    ray_cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": folder})
    try:
        added = [ray_cluster.add_node(temp_dir=folder, **shape) for shape in shapes]
        ray_cluster.wait_for_nodes()
        if connect:
            ray.init(address=ray_cluster.address, log_to_driver=False, logging_level="ERROR")
        yield ray_cluster, added
    finally:
        ray.shutdown()
        ray_cluster.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        if outer is not None:
            os.environ["RAY_TMPDIR"] = outer
        shutil.rmtree(folder, ignore_errors=True)


def two_nodes(**shape: object) -> contextlib.AbstractContextManager[tuple[Cluster, list[Node]]]:
    """A head without CPUs and two nodes of one shape, one CPU each by default."""
    return nodes(*[{"num_cpus": 1, **shape}] * 2, head_cpus=0)


def kill_node(ray_cluster: Cluster, node: Node) -> None:
    """Kill every process of a node at once, as a crash or a spot reclaim does; wait for nothing."""
    ray_cluster.remove_node(node, allow_graceful=False)


def drain_node(address: str, node_id: str, seconds: int) -> None:
    """Give a node the notice of a preemption ``seconds`` from now."""
    arguments = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(seconds)]
    ray_command("drain-node", "--address", address, "--node-id", node_id, *arguments, *deadline)


def ray_command(*arguments: str) -> None:
    """Run the command line of Ray, to its end."""
    subprocess.run([*RAY, *arguments], check=True, capture_output=True, timeout=START_SECONDS)


@contextlib.contextmanager
def started_head(
    *options: str, port: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A head as ``ray start --head`` makes it, in processes of its own.

    Args:
        options: On top of a port, a folder for temporary files and one CPU.
        port: Where it listens; by default any that is free.
        environment: On top of this process's variables.

    Yields:
        Its address.
    """
    folder, port = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), port or free_port()
    command = [*RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}"]
    with (
        subprocess.Popen(
            [*command, *LEAN, *options],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_end_tree, process)
        address = f"127.0.0.1:{port}"
        token = (environment or {}).get("RAY_AUTH_TOKEN", "")
        wait_until(lambda: num_nodes(address, token) == 1, START_SECONDS)
        yield address


def _end_tree(process: subprocess.Popen) -> None:
    """End a process and everything that it started, of which nothing is left afterwards."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:], timeout=10)
    process.wait()


def num_nodes(address: str, token: str = "") -> int:
    """How many nodes of the cluster at ``address`` are alive; 0 if it does not answer."""
    header = [("authorization", f"Bearer {token}")]
    with init_grpc_channel(address) as channel:
        ask = NodeInfoGcsServiceStub(channel).GetAllNodeInfo
        try:
            listed = ask(GetAllNodeInfoRequest(), timeout=1, metadata=header).node_info_list
        except grpc.RpcError:
            return 0
    return sum(node.state == GcsNodeInfo.ALIVE for node in listed)


def wait_for_nodes(address: str, count: str) -> None:
    """Until so many are alive; takes strings, for `in_own_process`."""
    wait_until(lambda: num_nodes(address) == int(count), START_SECONDS)


def free_port() -> int:
    """A port of the loopback device that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Ask again and again; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (
            f"not within {seconds} s: {inspect.getsource(condition)}"
        )
        time.sleep(0.1)
