from concurrent.futures import Future

import pytest

from onecomp.executor import LocalExecutor
from onecomp.later import Later
from onecomp.watch import Watch


def make() -> Later:
    return Later(Watch(LocalExecutor(1), unit_timeout_s=60.0))


def done(value: object = None) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def test_what_needs_nothing_is_done_at_once():
    happened = []
    make().add([], lambda: happened.append(1))
    assert happened == [1]


def test_what_needs_several_values_waits_for_the_last():
    later, first, second, happened = make(), done(), Future(), []
    later.add([first, second, first], lambda: happened.append(1))
    later.wait()
    assert happened == []
    second.set_result(None)
    later.wait()
    assert happened == [1]


def test_a_failed_value_is_there_too():
    later, failed, happened = make(), Future(), []
    failed.set_exception(ValueError("no"))
    later.add([failed], lambda: happened.append(1))
    later.wait()
    assert happened == [1]


def test_what_is_done_may_have_more_done_later():
    later, happened = make(), []
    later.add([done()], lambda: later.add([done()], lambda: happened.append(1)))
    later.wait()
    assert happened == []
    later.wait()
    assert happened == [1]


def test_what_was_forgotten_does_not_happen():
    later, happened = make(), []
    later.add([done()], lambda: happened.append(1))
    later.forget()
    with pytest.raises(AssertionError, match="nothing is waited for"):
        later.wait()
    assert happened == []
