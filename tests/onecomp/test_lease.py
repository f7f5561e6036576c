"""One driver at a time writes a run: tested with processes that hold, die, freeze and race."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from onecomp.errors import InputError
from onecomp.lease import (
    TTL_S,
    Lease,
    LeaseLostError,
    find_holder,
    find_holders,
    hold,
    require_free,
    require_held,
)
from onecomp.storage import AnyPath, children, open_path

SECONDS = 60
HOLD = """
import sys
from onecomp.lease import hold
from onecomp.storage import open_path
with hold(open_path(sys.argv[1]), float(sys.argv[2])) as lease:
    print(lease.owner, flush=True)
    input()
"""
RACE = """
import sys, time
from onecomp.errors import InputError
from onecomp.lease import hold
from onecomp.storage import open_path
print("ready", flush=True)
input()
try:
    with hold(open_path(sys.argv[1])):
        print("won", flush=True)
        input()
except InputError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def run_dir(request, tmp_path) -> AnyPath:
    if request.param == "s3":
        return request.getfixturevalue("s3") / "run"
    return tmp_path / "run"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """``start(program, *arguments)``: a process that is ended with the test."""
    processes = []

    def start_one(program: str, *arguments: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def names(run_dir: AnyPath) -> list[str]:
    return [path.name for path in children(run_dir)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pretend(run_dir: AnyPath, **fields: object) -> None:
    """Make the lease that is there somebody else's."""
    [path] = [path for path in children(run_dir) if path.name.startswith("lease-")]
    lease = Lease.parse(path.read_bytes())
    path.write_bytes(replace(lease, **fields).encoded())


def test_a_directory_is_held_as_long_as_the_body_runs(run_dir):
    assert find_holder(run_dir) is None
    require_free(run_dir)
    with hold(run_dir) as lease:
        assert names(run_dir) == ["lease-000001.json"]
        require_held(run_dir, lease.owner)
        holder = find_holder(run_dir)
        assert holder.lease == lease
        assert holder.is_alive
        assert (lease.pid, lease.ttl) == (os.getpid(), TTL_S)
    assert names(run_dir) == []
    with pytest.raises(LeaseLostError, match="somebody removed its lease"):
        require_held(run_dir, lease.owner)


@pytest.mark.parametrize("error", [InputError("x", "y"), KeyboardInterrupt(), SystemExit(1)])
def test_it_is_free_however_the_body_ends(tmp_path, error):
    with pytest.raises(type(error)), hold(tmp_path):
        raise error
    assert names(tmp_path) == []


def test_a_second_driver_is_refused_and_touches_nothing(run_dir, start):
    first = start(HOLD, run_dir, 60)
    owner = first.stdout.readline().strip()
    before = names(run_dir)
    message = rf"is in use by another driver \(host .+, process {first.pid}, last sign of life "
    remedy = r"\d s ago\)\. Wait for it to end, or if it is dead, for (60|59|58) s until its lease"
    with pytest.raises(InputError, match=message + remedy) as caught, hold(run_dir):
        pass
    assert str(caught.value).startswith(f"{run_dir}: is in use")
    with pytest.raises(InputError, match="is in use by another driver"):
        require_free(run_dir)
    assert names(run_dir) == before
    require_held(run_dir, owner)
    first.communicate("\n")
    assert first.returncode == 0
    require_free(run_dir)


def test_a_killed_driver_of_this_machine_is_replaced_at_once(run_dir, start):
    first = start(HOLD, run_dir, 1000)
    first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    wait_until(lambda: not find_holder(run_dir).is_alive)  # before its parent has noticed
    require_free(run_dir)
    with hold(run_dir):
        assert names(run_dir) == ["lease-000002.json"]
    assert names(run_dir) == []


def test_another_process_of_the_same_number_is_not_the_driver(tmp_path):
    with hold(tmp_path) as lease:
        pretend(tmp_path, process=(lease.process[0], "17"))
        assert not find_holder(tmp_path).is_alive


def test_a_driver_of_another_machine_counts_as_dead_after_its_time(run_dir, start):
    """Whatever its clock says: only the storage's counts."""
    first = start(HOLD, run_dir, 4)
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    pretend(run_dir, process=("another boot", "1"), renewed=0.0)
    with pytest.raises(InputError, match="is in use by another driver"):
        require_free(run_dir)
    pretend(run_dir, renewed=4e9)
    wait_until(lambda: not find_holder(run_dir).is_alive)
    with hold(run_dir):
        assert names(run_dir) == ["lease-000002.json"]


def test_a_lease_is_renewed(run_dir):
    with hold(run_dir, ttl_s=2.0) as lease:
        wait_until(lambda: find_holder(run_dir).lease.renewed > lease.renewed)
        require_held(run_dir, lease.owner)
        assert find_holder(run_dir).lease.started == lease.started


def test_a_driver_that_was_frozen_learns_that_it_lost_the_run(run_dir, start):
    first = start(HOLD, run_dir, 2)
    owner = first.stdout.readline().strip()
    require_held(run_dir, owner)
    first.send_signal(signal.SIGSTOP)
    wait_until(lambda: not find_holder(run_dir).is_alive)
    with hold(run_dir) as lease:
        first.send_signal(signal.SIGCONT)
        who = f"another driver (host {lease.host}, process {os.getpid()}) has taken it over while"
        with pytest.raises(LeaseLostError, match=re.escape(who)) as caught:
            require_held(run_dir, owner)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        first.communicate("\n")  # its end leaves the new lease alone
        require_held(run_dir, lease.owner)
        assert names(run_dir) == ["lease-000002.json"]


def test_a_lost_lease_is_not_renewed_and_numbers_that_come_again_are_no_confusion(tmp_path):
    with hold(tmp_path, ttl_s=0.2) as first:
        pretend(tmp_path, owner="another")
        time.sleep(0.3)
        assert find_holder(tmp_path).lease.owner == "another"
        with pytest.raises(LeaseLostError):
            require_held(tmp_path, first.owner)
    assert names(tmp_path) == ["lease-000001.json"]


def test_of_drivers_that_race_one_wins(run_dir, start):
    racers = [start(RACE, run_dir) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline() for racer in racers]
    assert answers.count("won\n") == 1
    refused = [answer for answer in answers if answer != "won\n"]
    assert all(answer.startswith(f"{run_dir}: ") for answer in refused)
    assert len(find_holders(run_dir)) == 1


def test_of_threads_that_race_for_a_dead_drivers_run_at_most_one_wins(tmp_path, start):
    for _ in range(3):
        first = start(HOLD, tmp_path, 1000)
        first.stdout.readline()
        first.kill()
        first.communicate()
        holding, most, lock, barrier = [0], [0], threading.Lock(), threading.Barrier(4)

        def race(held=holding, most=most, lock=lock, barrier=barrier) -> None:
            barrier.wait()
            try:
                with hold(tmp_path):
                    with lock:
                        held[0] += 1
                        most[0] = max(most[0], held[0])
                    time.sleep(0.02)
                    with lock:
                        held[0] -= 1
            except InputError:
                pass

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1
        assert names(tmp_path) == []


def test_a_lease_that_is_still_being_written_counts(tmp_path):
    (tmp_path / "lease-000004.json").write_text("")
    with pytest.raises(InputError, match=r"another driver \(last sign of life 0 s ago\)"):
        require_free(tmp_path)
    os.utime(tmp_path / "lease-000004.json", (0, 0))
    with hold(tmp_path):
        assert names(tmp_path) == ["lease-000005.json"]


def test_an_object_store_keeps_leases(s3):
    """The short of it; the tests above say the rest about S3 among the slow ones."""
    with hold(s3 / "run") as first:
        with pytest.raises(InputError, match="is in use by another driver"), hold(s3 / "run"):
            pass
        pretend(s3 / "run", process=(first.process[0], "17"))
        with hold(s3 / "run") as second:
            assert names(s3 / "run") == ["lease-000002.json"]
            with pytest.raises(LeaseLostError):
                require_held(s3 / "run", first.owner)
        assert second.owner != first.owner
    assert names(s3 / "run") == []


def test_a_lease_can_be_had_in_the_memory_of_one_process():
    place = open_path(f"memory://{os.urandom(4).hex()}/run")
    with hold(place), pytest.raises(InputError, match="is in use"), hold(place):
        pass
    assert names(place) == []
