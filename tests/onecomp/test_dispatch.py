from concurrent.futures import Future

import pytest

from onecomp.dispatch import Dispatch
from onecomp.errors import WorkerError
from onecomp.executor import Call, LocalExecutor
from onecomp.later import Later
from onecomp.watch import Watch


class Units:
    """Units by name, with the worker that each was given to."""

    def __init__(self, speeds: dict[int, float]):
        watch = Watch(LocalExecutor(1), unit_timeout_s=60.0)
        self.later = Later(watch)
        self.dispatch = Dispatch(watch, self.later, lambda: speeds)
        self.given: dict[str, int] = {}
        self.receipts: dict[str, Future] = {}

    def add(self, name: str, urgency: float) -> None:
        def hand_out(worker: int) -> Call:
            self.given[name] = worker
            self.receipts[name] = Future()
            return Call([], self.receipts[name])

        self.dispatch.add((urgency,), hand_out)

    def finish(self, name: str) -> None:
        self.receipts[name].set_result(None)
        self.later.wait()


def test_a_worker_gets_one_unit_at_a_time_and_the_most_urgent_next():
    units = Units({0: 1.0})
    for name, urgency in (("first", 5.0), ("late", 3.0), ("soon", 1.0)):
        units.add(name, urgency)
    assert list(units.given) == ["first"]
    units.finish("first")
    assert list(units.given) == ["first", "soon"]
    units.finish("soon")
    assert list(units.given) == ["first", "soon", "late"]


def test_units_go_to_workers_that_are_free_the_fastest_first():
    units = Units({0: 1.0, 1: 3.0, 2: 1.0})
    for number in range(4):
        units.add(f"unit {number}", 0.0)
    assert units.given == {"unit 0": 1, "unit 1": 0, "unit 2": 2}
    units.finish("unit 1")
    assert units.given["unit 3"] == 0


def test_a_worker_that_is_gone_gets_nothing_and_a_new_one_gets_what_waits():
    speeds = {0: 1.0}
    units = Units(speeds)
    units.add("running", 0.0)
    units.add("waiting", 0.0)
    speeds[1] = 1.0
    units.add("another", 1.0)
    assert units.given == {"running": 0, "waiting": 1}


def test_what_a_unit_raises_is_raised_and_its_worker_gets_nothing_more():
    units = Units({0: 1.0})
    units.add("running", 0.0)
    units.add("waiting", 0.0)
    units.receipts["running"].set_exception(WorkerError(0, "running", "it is gone"))
    with pytest.raises(WorkerError, match="it is gone"):
        units.later.wait()
    assert list(units.given) == ["running"]


def test_what_was_forgotten_is_given_to_nobody():
    units = Units({0: 1.0})
    units.add("running", 0.0)
    units.add("waiting", 0.0)
    units.dispatch.forget()
    units.finish("running")
    assert list(units.given) == ["running"]
