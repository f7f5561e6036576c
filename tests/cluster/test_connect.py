"""Addresses of clusters that this process cannot join, and clusters that it starts itself."""

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from cluster_nodes import free_port, in_own_process, nodes, started_head
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import InternalKVPutRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
from ray.exceptions import RayActorError

import cluster.address
from actors.executor import RayExecutor
from cluster.address import require_cluster, split_address
from cluster.connect import connect, disconnect, is_addressed
from cluster.errors import ClusterError

MOST_SECONDS = 15
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
VERSIONS = {"ray_version": ray.__version__, "python_version": sys.version.split()[0]}


REMEDIES = ("Check ", "Give ", "Install ", "Leave out ", "Set ", "Start ")
"""How a sentence begins that says what to do."""


def refusal(address: str) -> str:
    """The message for ``address``: one line, in time, with one remedy at its end."""
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        require_cluster(address)
    assert time.monotonic() - started < MOST_SECONDS
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    sentences = message.split(". ")
    assert [s.startswith(REMEDIES) for s in sentences] == [False] * (len(sentences) - 1) + [True]
    return message


def set_versions(address: str, **versions: str) -> None:
    with init_grpc_channel(address) as channel:
        value = json.dumps({**VERSIONS, **versions}).encode()
        request = InternalKVPutRequest(
            namespace=b"cluster", key=b"CLUSTER_METADATA", value=value, overwrite=True
        )
        InternalKVGcsServiceStub(channel).InternalKVPut(request, timeout=5)


@pytest.fixture(scope="module")
def head(ray_executor: RayExecutor) -> str:
    """Address of the cluster of all tests, in which this process is."""
    return ray.get_runtime_context().gcs_address


def test_an_address_where_nothing_listens_is_refused():
    port = free_port()
    message = refusal(f"127.0.0.1:{port}")
    assert message.startswith(f"Nothing listens at '127.0.0.1:{port}' (")
    assert "6379 by default" in message


def test_a_host_that_has_no_address_is_refused():
    assert refusal("head.invalid:6379").startswith("Nothing listens at 'head.invalid:6379' (")


@pytest.mark.parametrize(
    "address", ["nonsense", "", "host:", ":6379", "host:0", "host:99999", "a b:1"]
)
def test_what_is_no_address_is_refused(address):
    assert refusal(address).startswith(f"{address!r} is not the address of a cluster. Give the")


def test_a_job_servers_or_clients_address_is_refused_with_the_remedy():
    assert "is for Ray Client, which cannot be used" in refusal("ray://127.0.0.1:10001")
    assert "but of its job server" in refusal("http://127.0.0.1:8265")
    for address in ("ray://127.0.0.1:10001", "http://127.0.0.1:8265"):
        assert "`onecomp submit --address http://HOST:8265 -- ...`" in refusal(address)


def test_addresses_are_split():
    assert split_address("head.example:6379") == ("head.example", 6379)
    assert split_address("[::1]:6379") == ("::1", 6379)


def test_a_web_server_is_no_cluster():
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        message = refusal(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert f"What listens at '127.0.0.1:{server.server_port}' is not the head" in message


def test_a_server_that_says_nothing_is_no_cluster(monkeypatch):
    monkeypatch.setattr(cluster.address, "ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"What listens at {address!r} is not the head of a Ray cluster" in refusal(address)


@pytest.mark.ray
def test_other_versions_are_named_on_both_sides(head):
    ours = f"process Ray {ray.__version__} with Python {VERSIONS['python_version']}"
    set_versions(head, ray_version="2.44.1")
    message = refusal(head)
    assert (
        f"{head!r} runs Ray 2.44.1 with Python {VERSIONS['python_version']}, this {ours}" in message
    )
    set_versions(head, python_version="3.9.1")
    assert f"{head!r} runs Ray {ray.__version__} with Python 3.9.1, this {ours}" in refusal(head)
    set_versions(head)
    assert require_cluster(head) == (head, "127.0.0.1")


@pytest.mark.ray
def test_how_much_of_pythons_version_must_be_equal_is_rays_variable(head, monkeypatch):
    set_versions(head, python_version=VERSIONS["python_version"].rsplit(".", 1)[0] + ".99")
    refusal(head)
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    assert require_cluster(head) == (head, "127.0.0.1")
    set_versions(head)


def print_refusal(address: str) -> None:
    sys.stdout.write(refusal(address))


def print_joined(address: str) -> None:
    assert connect(address, num_cpus=1) is True
    sys.stdout.write(str(len(ray.nodes())))
    disconnect()


@pytest.mark.ray
def test_a_head_on_the_loopback_device_is_not_looked_for_on_the_network(head):
    """Its variable is set for all tests, and there is none for whom Ray is started."""
    environment = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    assert in_own_process(print_joined, head, environment=environment, seconds=60) == "1"


@pytest.mark.ray
@pytest.mark.slow
def test_a_token_for_a_cluster_without_tokens_does_no_harm(head):
    assert in_own_process(print_joined, head, environment=TOKEN) == "1"


@pytest.mark.ray
def test_a_token_that_cannot_be_read_is_missed(head, tmp_path):
    nowhere = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    message = in_own_process(print_refusal, head, environment=nowhere)
    assert message.startswith(f"The cluster at {head!r} cannot be asked: by RAY_AUTH_MODE=token")
    assert "couldn't find an authentication token). Set RAY_AUTH_TOKEN or" in message


@pytest.mark.ray
@pytest.mark.slow
def test_a_token_that_the_cluster_asks_for_is_missing_or_wrong():
    with started_head(environment=TOKEN) as address:
        message = refusal(address)
        wrong = {**TOKEN, "RAY_AUTH_TOKEN": "b" * 40}
        second = in_own_process(print_refusal, address, environment=wrong)
        assert in_own_process(print_joined, address, environment=TOKEN) == "1"
    assert f"{address!r} asks for a token, and this process sends none." in message
    assert f"{address!r} asks for a token, and refuses this process's." in second
    assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in message


@pytest.mark.ray
def test_a_process_is_in_one_cluster_only(head):
    assert is_addressed(None)
    port = head.partition(":")[2]
    for address in (None, "", "auto", "local", head, f"localhost:{port}"):
        assert connect(address, num_cpus=100) is False
    with pytest.raises(ClusterError, match=f"already in the Ray cluster at '{head}', and cannot"):
        connect("127.0.0.1:9", num_cpus=1)


def start_and_look(*_: str) -> None:
    """A cluster of one's own, in an environment that says nothing."""
    assert connect(None, num_cpus=1) is True
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: connect(None, num_cpus=1), range(4)))
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir())
    assert Path(folder, context.get_session_name()).is_dir()
    lose_an_actor()
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    addresses = {c.laddr.ip for process in family for c in listeners(process)}
    disconnect()
    assert len(family) > 4
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not folder.exists()
    assert not any("ENABLE_WINDOWS" in name for name in os.environ)


@ray.remote(num_cpus=0, max_restarts=0)
class Mortal:
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def lose_an_actor() -> None:
    with pytest.raises(RayActorError):
        ray.get(Mortal.remote().die.remote())
    time.sleep(2)  # for what Ray says of it; nobody can tell when it will


def listeners(process: psutil.Process) -> list:
    try:
        connections = process.net_connections(kind="inet")
    except psutil.NoSuchProcess:
        return []
    return [c for c in connections if c.status == psutil.CONN_LISTEN]


@pytest.mark.ray
def test_a_cluster_that_is_started_here_stays_on_this_machine_and_leaves_nothing(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    assert in_own_process(start_and_look) == ""  # although a process was lost


def test_the_variable_of_ray_is_an_address(monkeypatch):
    """Not asked in a process that is in a cluster, where everything is one."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert not is_addressed(None)
    assert not is_addressed("local")
    assert is_addressed("auto")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert is_addressed(None)
    assert not is_addressed("local")


ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""In front of a command that sees no process but its own; for this, one has to be root."""


ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")


def look_for_clusters(*_: str) -> None:
    assert "no node of a Ray cluster runs on this machine" in refusal("auto")
    with nodes(connect=False) as (first, _):
        assert require_cluster("auto").address == first.address
        with nodes(connect=False) as (second, _):
            message = refusal("auto")
            found = ", ".join(sorted([first.address, second.address]))
    assert f"nodes of 2 Ray clusters run on this machine ({found}). Give" in message


@pytest.mark.ray
@pytest.mark.slow
@ONLY_ROOT
def test_auto_is_the_only_cluster_of_this_machine():
    in_own_process(look_for_clusters, prefix=ALONE)


@pytest.mark.ray
@ONLY_ROOT
def test_a_cluster_without_a_node_on_this_machine_is_refused(head):
    message = in_own_process(print_refusal, head, prefix=ALONE)
    assert message.startswith(f"The cluster at {head!r} has no node on this machine, and the")
    assert f"`ray start --address {head}`" in message
