import re

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

    def fail(self) -> None:
        raise LayerError("layer", "reason")


def started() -> LocalExecutor:
    executor = LocalExecutor(1)
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
