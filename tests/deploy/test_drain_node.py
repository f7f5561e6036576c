"""Taking a node out of service: notices of a fake metadata service, a real cluster of nodes."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import psutil
import pytest
from ray_head import ROOT, end, own_environment

SCRIPT = ROOT / "deploy" / "drain_node.py"
SECONDS = 240
CLUSTER = """
import json, sys, ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for number in range(2):
    cluster.add_node(num_cpus=1, resources={f"place{number}": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, max_restarts=0)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

workers = [Worker.options(resources={f"place{number}": 1}).remote() for number in range(2)]
nodes = ray.get([worker.node.remote() for worker in workers])
print(json.dumps({"address": cluster.address, "nodes": nodes}), flush=True)
for line in sys.stdin:
    if line.startswith("end"):
        ray.kill(workers[int(line.split()[1])])
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    draining = ray._private.state.state.get_draining_nodes()
    print(json.dumps({"alive": alive, "draining": draining}), flush=True)
"""
"""A head and two nodes with a worker each; answers every line with the state of the nodes."""


@pytest.fixture(scope="module")
def drain_node() -> ModuleType:
    specification = importlib.util.spec_from_file_location("drain_node", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Metadata(BaseHTTPRequestHandler):
    """The part of EC2's and Compute Engine's metadata services that tells of spot machines."""

    notice: ClassVar[dict[str, str]] = {}

    def do_PUT(self) -> None:
        is_right = self.headers["X-aws-ec2-metadata-token-ttl-seconds"] is not None
        self.answer("a token" if is_right and self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            has_token = self.headers["X-aws-ec2-metadata-token"] == "a token"
            self.answer(self.notice.get("aws") if has_token else None)
        elif self.headers["Metadata-Flavor"] == "Google":
            is_right = self.path == "/computeMetadata/v1/instance/preempted"
            self.answer(self.notice.get("gcp", "FALSE") if is_right else None)
        else:
            self.answer(None)

    def answer(self, text: str | None) -> None:
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write((text or "<html>not found</html>").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    """URL of the fake service, which has nothing to tell at first."""
    Metadata.notice.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def aws_notice(in_seconds: float) -> str:
    at = time.gmtime(time.time() + in_seconds)
    return json.dumps({"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", at)})


def test_ec2_tells_of_the_end_of_a_spot_machine(drain_node, metadata):
    assert drain_node.aws_deadline(metadata) is None
    Metadata.notice["aws"] = json.dumps({"action": "stop", "time": "2033-05-18T03:33:20Z"})
    assert drain_node.aws_deadline(metadata) == 2_000_000_000


def test_compute_engine_tells_of_the_end_of_a_spot_machine(drain_node, metadata):
    assert drain_node.gcp_deadline(metadata) is None
    Metadata.notice["gcp"] = "TRUE"
    before = time.time()
    assert before <= drain_node.gcp_deadline(metadata) - 30 <= time.time()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_metadata_service_that_does_not_answer_tells_nothing(drain_node, cloud):
    _, deadline_of = drain_node.CLOUDS[cloud]
    assert deadline_of("http://127.0.0.1:9") is None


def test_without_a_cluster_there_is_nothing_to_drain():
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--now"],
        env=own_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "no cluster: give --address host:port, or set RAY_ADDRESS." in ran.stderr


class Nodes:
    """The cluster of ``CLUSTER`` in a process of its own."""

    def __init__(self, process: psutil.Popen):
        self._process = process
        said = json.loads(process.stdout.readline())
        self.address, self.nodes = said["address"], said["nodes"]

    def state(self, command: str = "state") -> dict:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait_until(self, is_true: Callable[[dict], bool]) -> dict:
        give_up_at = time.monotonic() + SECONDS
        while not is_true(state := self.state()):
            assert time.monotonic() < give_up_at, state
            time.sleep(0.2)
        return state


@contextmanager
def drainer(nodes: Nodes, *options: str) -> Iterator[psutil.Popen]:
    command = [sys.executable, str(SCRIPT), "--address", nodes.address, *options]
    process = psutil.Popen(command, env=own_environment(), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        end(process)
        process.stderr.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (folder / "ray").mkdir()  # Ray expects it to be there
    process = psutil.Popen(
        [sys.executable, "-c", CLUSTER],
        env=own_environment(RAY_TMPDIR=str(folder)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process.stdin, process.stdout:
        try:
            yield Nodes(process)
        finally:
            end(process)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_drains_at_the_spot_notice_and_ends_when_it_is_idle(nodes, metadata):
    node = nodes.nodes[0]
    options = ("--node-id", node, "--cloud", "aws", "--metadata-url", metadata)
    with drainer(nodes, *options) as process:
        line = process.stderr.readline()
        assert f"watching node {node[:12]}" in line
        assert node not in nodes.state()["draining"]
        Metadata.notice["aws"] = aws_notice(in_seconds=90)
        state = nodes.wait_until(lambda state: node in state["draining"])
        assert node in state["alive"]  # its worker is still there, and may hand over
        assert 0 < state["draining"][node] / 1000 - time.time() < 91
        nodes.state("end 0")
        nodes.wait_until(lambda state: node not in state["alive"])
        assert process.wait(SECONDS) == 0
        assert "has ended" in process.stderr.read()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_drains_on_sigterm_until_its_deadline(nodes):
    node = nodes.nodes[1]
    with drainer(nodes, "--node-id", node, "--deadline-s", "3") as process:
        process.stderr.readline()
        process.terminate()
        assert process.wait(SECONDS) == 0
        assert "still works at its deadline" in process.stderr.read()
    state = nodes.state()
    assert node in state["draining"]
    assert node in state["alive"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_not_there_is_not_drained(nodes):
    with drainer(nodes, "--now", "--node-id", "ab" * 28) as process:
        assert process.wait(SECONDS) == 1
        error = process.stderr.read()
    assert error.startswith(f"error: {nodes.address}: 0 nodes of the cluster are abab")
    assert nodes.nodes[1][:12] in error
