"""The journal: lines appended to a file, or batches of them as objects."""

import json
import os
import pickle

import pytest

from onecomp.events import BatchLog, LineLog, open_event_log, read_events
from onecomp.storage import AnyPath, children, open_path, replacing


@pytest.fixture(params=["local", "memory", "s3"])
def run_dir(request, tmp_path) -> AnyPath:
    if request.param == "s3":
        return request.getfixturevalue("s3") / "run"
    if request.param == "memory":
        return open_path(f"memory://{os.urandom(4).hex()}/run")
    return tmp_path


def kinds(run_dir: AnyPath) -> list[str]:
    events, num_unreadable = read_events(run_dir / "events.jsonl")
    assert num_unreadable == 0
    return [event["event"] for event in events]


def lines(*names: str) -> bytes:
    return b"".join(json.dumps({"event": name}).encode() + b"\n" for name in names)


def batches(run_dir: AnyPath) -> list[str]:
    return [path.name for path in children(run_dir / "events")]


def test_a_journal_that_does_not_exist_is_empty(run_dir):
    assert read_events(run_dir / "events.jsonl") == ([], 0)


def test_events_are_read_in_the_order_of_their_coming(run_dir):
    log = open_event_log(run_dir)
    for number in range(12):
        log.append("block", {"block": number, "error": 0.5})
    events, _ = read_events(run_dir / "events.jsonl")
    assert [event["block"] for event in events] == [*range(12)]
    assert events[0].keys() == {"event", "time", "block", "error"}


def test_an_event_keeps_the_time_that_it_has(run_dir):
    open_event_log(run_dir).append("block", {"time": 17.5})
    [event] = read_events(run_dir / "events.jsonl")[0]
    assert event["time"] == 17.5


def test_local_events_are_written_at_once(tmp_path):
    log = open_event_log(tmp_path)
    assert isinstance(log, LineLog)
    for number, kind in enumerate(["group", "units", "block"], start=1):
        log.append(kind, {})
        assert len(kinds(tmp_path)) == number


def test_an_object_holds_the_events_of_a_block(s3):
    log = open_event_log(s3 / "run")
    log.append("started", {})
    for kind in ["group", "units", "group", "block", "group"]:
        log.append(kind, {})
    assert batches(s3 / "run") == ["000001.jsonl", "000002.jsonl"]
    assert kinds(s3 / "run") == ["started", "group", "units", "group", "block"]
    log.flush()
    log.flush()
    assert len(batches(s3 / "run")) == 3
    assert kinds(s3 / "run")[-1] == "group"


def test_a_group_does_not_wait_for_ever(s3, monkeypatch):
    log = open_event_log(s3 / "run")
    log.append("block", {})
    monkeypatch.setattr("onecomp.events.MAX_DELAY_S", -1)
    log.append("group", {})
    assert kinds(s3 / "run") == ["block", "group"]


def test_two_writers_overwrite_nothing(s3):
    first, second = (open_event_log(s3 / "run") for _ in range(2))
    for number in range(3):
        first.append("block", {"writer": 1, "number": number})
        second.append("block", {"writer": 2, "number": number})
    events, _ = read_events(s3 / "run" / "events.jsonl")
    assert [(event["number"], event["writer"]) for event in events] == [
        (number, writer) for number in range(3) for writer in (1, 2)
    ]


def test_what_waits_is_written_by_the_process_that_heard_it(s3):
    log = open_event_log(s3 / "run")
    log.append("block", {})
    log.append("group", {})
    travelled = pickle.loads(pickle.dumps(log))
    assert isinstance(travelled, BatchLog)
    travelled.flush()
    assert kinds(s3 / "run") == ["block"]


def test_half_a_line_of_a_killed_run_is_left_out_and_counted_behind_the_end(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(lines("a") + b'{"event": "b"')
    assert kinds(tmp_path) == ["a"]
    open_event_log(tmp_path).append("c", {})
    events, num_unreadable = read_events(file)
    assert ([event["event"] for event in events], num_unreadable) == (["a", "c"], 1)
    file.write_bytes(lines("a") + b"not json\n")
    assert read_events(file)[1] == 1


@pytest.mark.parametrize("was_local", [True, False])
def test_a_run_that_was_copied_to_other_storage_keeps_its_order(was_local, run_dir):
    is_local = isinstance(open_event_log(run_dir), LineLog)
    if was_local is is_local:
        return
    old = "events.jsonl" if was_local else "events/000004.jsonl"
    (run_dir / old).parent.mkdir(parents=True, exist_ok=True)
    with replacing(run_dir / old) as temporary:
        temporary.write_bytes(lines("first", "second"))
    open_event_log(run_dir).append("third", {})
    assert kinds(run_dir) == ["first", "second", "third"]
