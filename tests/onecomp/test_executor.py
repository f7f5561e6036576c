import re
import threading
import time
from concurrent.futures import CancelledError

import pytest

from onecomp.errors import ConfigError, LayerError
from onecomp.executor import LocalExecutor, default_executor


class Counter:
    def __init__(self, number: int, start: int):
        self.number, self.value = number, start

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def pair(self) -> tuple[int, int]:
        return self.number, self.value

    def run(self, begun: threading.Event, release: threading.Event) -> int:
        begun.set()
        release.wait()
        return self.value

    def fail(self) -> None:
        raise LayerError("layer", "reason")


def started(num_workers: int = 1) -> LocalExecutor:
    executor = LocalExecutor(num_workers)
    executor.start(Counter, 10)
    return executor


def test_calls_run_in_order_on_the_worker_that_was_made():
    executor = started()
    [first], [second] = executor.submit(0, "add", 1), executor.submit(0, "add", 2)
    assert executor.fetch([second, first]) == [13, 11]


def test_a_ref_given_as_an_argument_becomes_its_value():
    executor = started()
    [ref] = executor.submit(0, "add", 1)
    assert executor.fetch(executor.submit(0, "add", ref)) == [22]


def test_a_sequence_is_one_value_or_several_refs():
    executor = started()
    assert executor.fetch(executor.submit(0, "pair")) == [(0, 10)]
    assert executor.fetch(executor.submit(0, "pair", num_returns=2)) == [0, 10]


def test_errors_arrive_as_they_were_raised_and_nothing_passes_a_driver():
    executor = started()
    with pytest.raises(LayerError, match=r"^layer: reason$"):
        executor.fetch(executor.submit(0, "fail"))
    assert executor.driver_bytes == 0
    assert executor.num_workers == 1
    assert executor.describe() == "this process, 1 thread(s)"
    executor.stop()


def test_values_that_are_not_as_many_as_promised_are_an_error_of_all_of_them():
    executor = started()
    for ref in executor.submit(0, "pair", num_returns=3):
        assert isinstance(ref.exception(timeout=60), ValueError)
    executor.stop()


def test_stop_ends_a_worker_that_waits_for_a_call_that_never_begins():
    executor, begun, release = started(2), threading.Event(), threading.Event()
    [running] = executor.submit(0, "run", begun, release)
    [queued] = executor.submit(0, "add", 1)
    [waiting] = executor.submit(1, "add", queued)
    stopping = threading.Thread(target=executor.stop, daemon=True)
    try:
        assert begun.wait(timeout=60)
        stopping.start()
        time.sleep(0.1)  # for as long as the call runs, stop waits
        assert stopping.is_alive()
        release.set()
        stopping.join(timeout=20)
        assert not stopping.is_alive()
        for ref in (running, queued, waiting):
            with pytest.raises(CancelledError):
                executor.fetch([ref])
    finally:
        release.set()
        if not queued.done():  # else this process would not end either
            queued.set_result(0)


def test_an_executor_that_was_stopped_can_be_started_again():
    executor = started()
    executor.stop()
    executor.start(Counter, 20)
    assert executor.fetch(executor.submit(0, "add", 1)) == [21]
    executor.stop()


def test_zero_workers_means_this_process():
    assert isinstance(default_executor(0), LocalExecutor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": -1}, "executor: num_workers=-1: must be 0 or more."),
        (
            {"num_workers": 0, "address": "ray://head:10001"},
            "executor: num_workers=0 means this process, but address='ray://head:10001' names a "
            "cluster. Drop one.",
        ),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        default_executor(**arguments)
