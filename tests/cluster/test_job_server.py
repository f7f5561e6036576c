"""Jobs on a real head: status, log, environment, lost connections, stops; and refusals."""

import contextlib
import os
import socket
import sys
import threading

import pytest
from ray.job_submission import JobDetails, JobStatus

from cluster import jobs
from cluster.errors import ClusterError
from cluster.jobs import JobServer, job_end, require_small

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's own call


@pytest.fixture(scope="module")
def server(ray_head) -> JobServer:
    return JobServer(ray_head.url)


def start(server: JobServer, name: str, *command: str, **environment: str) -> str:
    server.submit(name, command, working_dir=None, environment=environment)
    return name


def program(server: JobServer, name: str, source: str) -> str:
    return start(server, name, sys.executable, "-c", source)


@pytest.mark.ray
def test_a_head_listens_on_this_machine_only(ray_head):
    assert {address.removeprefix("::ffff:") for address in ray_head.listening()} == {"127.0.0.1"}


@pytest.mark.ray
def test_lines_words_variables_and_the_status_arrive_as_they_are(server):
    lines: list[str] = []
    words = ["a b", "$HOME", "'"]
    source = (
        "import os, sys\nfor n in range(30): print(n, 'é')\n"
        "print(sys.argv[1:], os.environ['KEY'], end='')\nsys.exit(3)"
    )
    job = start(server, "lines", sys.executable, "-c", source, *words, KEY="a value")
    end = server.follow(job, lines.append)
    assert (end.exit_status, end.message) == (3, "")
    assert lines[-31:] == [*(f"{n} é" for n in range(30)), f"{words} a value"]
    with pytest.raises(ClusterError, match="refuses the job"):
        start(server, job, "true")  # a job id is used once


@pytest.mark.ray
@pytest.mark.slow
def test_the_status_of_a_job_is_its_programs(server):
    ends = {"true": 0, "exit 3": 3, "kill -9 $$": 137}
    for number, source in enumerate(ends):
        start(server, f"status{number}", "sh", "-c", source)
    found = [server.follow(f"status{number}", lambda _: None) for number in range(len(ends))]
    assert [end.exit_status for end in found] == list(ends.values())
    assert {end.message for end in found} == {""}


class BreakableWire:
    """A TCP proxy on the loopback device whose connections can be cut."""

    def __init__(self, target: str):
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break every connection; new ones can be made."""
        for end in self._ends:
            shut(end)

    def __enter__(self) -> "BreakableWire":
        return self

    def __exit__(self, *_: object) -> None:
        shut(self._listener)
        self._listener.close()
        self.cut()
        for end in self._ends:
            end.close()


def shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.mark.ray
def test_no_line_is_lost_or_doubled_when_the_connection_breaks(ray_head, tmp_path):
    go_on, lines = tmp_path / "go_on", []
    wait = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.1)"
    source = f"import os, time\nprint('zero')\nprint('first')\n{wait}\nprint('second')"

    def write_line(line: str) -> None:
        lines.append(line)
        if line == "first":
            wire.cut()
            go_on.touch()

    with BreakableWire(ray_head.url) as wire:
        server = JobServer(wire.url)
        end = server.follow(program(server, "wire", source), write_line)
    assert end.exit_status == 0
    printed = [line for line in lines if line in {"zero", "first", "second"}]
    assert printed == ["zero", "first", "second"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_server_that_is_gone_is_given_up_in_time(ray_head, monkeypatch):
    monkeypatch.setattr(jobs, "RECONNECT_SECONDS", 1)
    with BreakableWire(ray_head.url) as wire:
        server = JobServer(wire.url)
        job = program(server, "gone", "import time\nprint('first')\ntime.sleep(600)")

        def write_line(line: str) -> None:
            if line == "first":
                wire.__exit__()

        with pytest.raises(ClusterError, match="does not answer any more"):
            server.follow(job, write_line)
    JobServer(ray_head.url).stop(job)


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_job_can_end_in_its_own_way(server, tmp_path):
    cleaned = tmp_path / "cleaned"
    source = (
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        f"    time.sleep(4); pathlib.Path({str(cleaned)!r}).touch(); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    job = program(server, "stopped", source)

    def write_line(line: str) -> None:
        if line == "ready":
            threading.Thread(target=server.stop, args=(job,)).start()

    assert server.follow(job, write_line).exit_status == 143
    assert cleaned.exists()  # Ray alone would have killed it after 3 seconds


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "message", "expected"),
    [
        (JobStatus.PENDING, None, "waits", None),
        (JobStatus.RUNNING, None, None, None),
        (JobStatus.SUCCEEDED, 0, "fine", (0, "")),
        (JobStatus.FAILED, 2, "said", (2, "")),
        (JobStatus.FAILED, -9, "said", (137, "")),
        (JobStatus.FAILED, None, " no such package\n", (1, "no such package")),
        (JobStatus.STOPPED, None, None, (143, "")),
        (JobStatus.STOPPED, -15, "said", (143, "")),
    ],
)
def test_how_a_job_ended(status, driver_exit_code, message, expected):
    info = JobDetails(
        type="SUBMISSION",
        entrypoint="true",
        status=status,
        message=message,
        driver_exit_code=driver_exit_code,
    )
    assert job_end(info) == expected


def test_what_is_too_large_is_found_by_its_size(tmp_path):
    small, big = tmp_path / "small.py", tmp_path / "models" / "big.bin"
    big.parent.mkdir()
    small.write_text("x")
    big.touch()
    os.truncate(big, 150 * 2**20)
    with pytest.raises(ClusterError) as refusal:
        require_small(tmp_path)
    assert "has 150 MiB, a job server takes 100 MiB" in str(refusal.value)
    assert "The largest files: models/big.bin (150 MiB). List in .rayignore" in str(refusal.value)
    (tmp_path / ".rayignore").write_text("*.bin\n")
    require_small(tmp_path)
    with pytest.raises(ClusterError, match="is no directory"):
        require_small(tmp_path / "gone")


@pytest.mark.parametrize("greeting", [b"", b"\0\1\2\3 no HTTP\r\n\r\n"])
def test_what_does_not_speak_http_is_refused(greeting, monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(greeting)
            connection.recv(1)
            threading.Event().wait(2)  # and then says nothing
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ClusterError, match=r"[nN]o job server of Ray"):
            JobServer(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8265", "is no URL of a dashboard"),
        ("ray://127.0.0.1:10001", "is no URL of a dashboard"),
        ("http://127.0.0.1:9", "No job server of Ray answers at http://127.0.0.1:9 "),
        ("http://no.such.host.invalid:8265", "No job server of Ray answers"),
    ],
)
def test_an_address_without_job_server_is_refused(address, words, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(ClusterError, match=words):
        JobServer(address)


def test_ray_is_asked_at_the_address_that_was_given(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with jobs._address_variable("http://given:1"):
        assert os.environ[jobs.ADDRESS_VARIABLE] == "http://given:1"
    assert jobs.ADDRESS_VARIABLE not in os.environ
