"""A journal read as a history: attempts, workers, recoveries."""

import pytest
from journals import START, Driver

from onecomp.history import Attempt, last_by_block, last_groups, split_attempts


def test_every_start_begins_an_attempt():
    first, second = Driver(4, [0, 1]).start().quantize(0), Driver(4, [0]).start(1).quantize(1)
    attempts = split_attempts([*first.events, *second.events])
    assert [attempt.events for attempt in attempts] == [first.events, second.events]
    assert attempts[1].started["finished"] == 1


def test_an_older_journal_without_starts_is_one_attempt():
    events = [{"event": "group", "block": 0}, {"event": "block", "block": 0}]
    [attempt] = split_attempts(events)
    assert (attempt.started, attempt.outcome) == ({}, None)
    assert attempt.times == (0.0, 0.0)
    assert attempt.presences() == attempt.recoveries() == []
    assert [attempt.events for attempt in split_attempts([])] == [[]]


def test_an_attempt_ends_as_its_driver_says():
    driver = Driver(1, [0]).start().quantize(0)
    assert Attempt(driver.events).outcome is None
    driver.finish()
    driver.write("evaluation", what="quantized")
    outcome = Attempt(driver.events).outcome
    assert outcome is not None
    assert outcome["event"] == "finished"


def test_workers_are_those_that_joined_until_they_are_lost_or_leave():
    driver = Driver(4, [0, 1, 2]).start().quantize(0, dies=[1])
    driver.workers.append(3)
    driver.change(3, "joined")
    driver.now += 10.0
    driver.change(0, "left")
    presences = {presence.worker: presence for presence in Attempt(driver.events).presences()}
    assert {n: p.change for n, p in presences.items()} == {0: "left", 1: "lost", 2: None, 3: None}
    assert [n for n, p in presences.items() if p.end is None] == [2, 3]
    assert presences[0].end == pytest.approx(driver.now)
    assert presences[2].begin == START + 2.0
    lost = presences[1]
    assert (lost.host, lost.pid) == ("host1", 101)
    assert (lost.doing, lost.reason) == ("quantize of block 0", "it was killed")


def test_before_the_first_one_joined_the_drivers_number_of_workers_counts():
    started = {"event": "started", "time": START, "workers": 3}
    lost = {"event": "worker", "time": START + 1, "worker": 2, "change": "lost"}
    assert [p.worker for p in Attempt([started]).presences()] == [0, 1, 2]
    ends = {p.worker: p.end for p in Attempt([started, lost]).presences()}
    assert ends == {0: None, 1: None, 2: START + 1}


def test_what_is_reported_of_a_lost_worker_later_does_not_bring_it_back():
    driver = Driver(2, [0, 1]).start()
    driver.change(1, "lost", doing=None, reason=None)
    driver.write("units", worker=1, units=[{"method": "observe", "start": START, "seconds": 1.0}])
    assert [p.worker for p in Attempt(driver.events).presences() if p.end is None] == [0]


def test_recoveries_name_what_they_cost():
    driver = Driver(4, [0, 1, 2, 3]).start().quantize(0).quantize(1, dies=[1, 3])
    [recovery] = Attempt(driver.events).recoveries()
    assert (recovery.block, recovery.lost, recovery.replayed_shards) == (1, (1, 3), 8)
    assert recovery.seconds == 3.0


def test_of_repeated_units_the_last_counts():
    first = {"event": "group", "block": 0, "layers": {"a": {}}, "seconds": 1}
    other = {"event": "group", "block": 0, "layers": {"b": {}}}
    again = first | {"seconds": 2}
    assert last_groups([first, other, again]) == [again, other]
    blocks = [{"event": "block", "block": 3, "seconds": s} for s in (1, 2)]
    assert last_by_block([*blocks, {"event": "block"}], "block") == {3: blocks[1]}


@pytest.mark.parametrize("value", [None, "3", True, [], {}, float("nan")])
def test_values_of_the_wrong_kind_are_passed_over(value):
    events = [
        {"event": "started", "workers": value, "time": value},
        {"event": "worker", "worker": value, "change": "joined"},
        {"event": "worker", "worker": 1, "change": value, "pid": value},
        {"event": "units", "worker": value, "units": value},
        {"event": "recovery", "lost": value, "seconds": value, "block": None},
        {"event": value},
    ]
    attempt = Attempt(events)
    assert attempt.presences() == []
    assert [recovery.lost for recovery in attempt.recoveries()] == [()]
