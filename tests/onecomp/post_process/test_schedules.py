"""Learning rates by the names of Transformers' schedulers."""

import pickle

import pytest

from onecomp.post_process.schedules import Schedule

NUM_STEPS = 10


def factors(schedule: Schedule) -> list[float]:
    return [schedule(step, NUM_STEPS) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "inverse_sqrt"])
def test_it_rises_then_falls_and_no_step_is_wasted(kind):
    found = factors(Schedule(kind, 0.2))
    assert found[0] < found[1] == 1.0
    assert found[1:] == sorted(found[1:], reverse=True)
    assert min(found) > 0


def test_constant_is_constant():
    assert factors(Schedule("constant")) == [1.0] * NUM_STEPS


def test_further_arguments_are_passed_on():
    schedule = Schedule("cosine_with_min_lr", arguments={"min_lr_rate": 0.5})
    assert schedule.problems() == []
    assert min(factors(schedule)) >= 0.5


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (Schedule("cosin"), "lr_scheduler_type='cosin': must be one of linear, cosine"),
        (Schedule("greedy"), "'greedy' follows the losses"),
        (Schedule("reduce_lr_on_plateau"), "'reduce_lr_on_plateau' follows the losses"),
        (Schedule("cosine_with_min_lr"), "cannot be used with lr_scheduler_kwargs={}"),
        (Schedule("linear", arguments={"cycles": 2}), "cannot be used with lr_scheduler_kwargs"),
    ],
)
def test_what_cannot_be_followed_is_refused(schedule, told):
    [problem] = schedule.problems()
    assert told in problem


def test_it_travels():
    assert pickle.loads(pickle.dumps(Schedule("cosine", 0.1))) == Schedule("cosine", 0.1)
