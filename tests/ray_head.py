"""A Ray head as a user starts it, `ray start --head`, with its dashboard, on ports of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
START_SECONDS = 180
"""Ten on an idle machine."""


@dataclass(frozen=True)
class Head:
    """A running head.

    Args:
        url: Of its dashboard and job server.
        address: Where workers connect.
        process: ``ray start --block``; the parent of everything else.
    """

    url: str
    address: str
    process: psutil.Popen

    def listening(self) -> set[str]:
        """Addresses on which any of its processes listens."""
        return {
            connection.laddr.ip
            for process in [self.process, *self.process.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """One head for all tests of Ray jobs."""
    with running_head() as head:
        yield head


def own_environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which ``python`` and ``ray`` are the ones of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {n: v for n, v in os.environ.items() if n not in {"RAY_ADDRESS", "RAY_JOB_CONFIG"}}
    return {**kept, "PATH": path, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", **variables}


@contextmanager
def running_head(**environment: str) -> Iterator[Head]:
    """Start a head with two CPUs; it and its children are ended by their ids."""
    port, dashboard, agent, metrics, client = free_ports(5)
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need short paths
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}", f"--temp-dir={directory}"]
    command += ["--object-store-memory=200000000", f"--ray-client-server-port={client}"]
    with (directory / "head.log").open("w") as log:
        process = psutil.Popen(
            command, env=own_environment(**environment), stdout=log, stderr=subprocess.STDOUT
        )
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", process)
    try:
        wait_for_answer(head, directory / "head.log")
        yield head
    finally:
        end(process)
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def wait_for_answer(head: Head, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and head.process.poll() is None:
        try:
            urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=30).close()
        except urllib.error.HTTPError as error:  # of a head that wants a token
            error.close()
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"the head did not start:\n{log.read_text()}")


def end(process: psutil.Popen) -> None:
    """End a process and its children, none of which outlives this call."""
    family = [process, *process.children(recursive=True)] if process.poll() is None else []
    for member in family:
        with_signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=3)
    for member in alive:
        with_signal(member, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=30)


def with_signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def onecomp(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """The command line in a process of its own, its lines as text."""
    return subprocess.Popen(
        [sys.executable, "-m", "onecomp", *map(str, words)],
        cwd=ROOT,
        env=environment or own_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
