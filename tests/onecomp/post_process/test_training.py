"""The loop: which samples, which state is kept, and what happens to losses that are not finite."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError, OneCompError
from onecomp.post_process.engine import LocalEngine, ParameterGroup
from onecomp.post_process.training import (
    MOST_SKIPPED_STEPS,
    Checkpoints,
    Course,
    Progress,
    Samples,
    Task,
    Training,
    share,
    warmup_then_cosine,
)

NUM_SAMPLES = 12
WIDTH = 4


def engine_of(weight: nn.Parameter, lr: float = 0.05, grad_clip: float = 1.0) -> LocalEngine:
    return LocalEngine([ParameterGroup((weight,), lr)], grad_clip, {"weight": weight})


def rank_of(rank: int, world_size: int) -> LocalEngine:
    """An engine that says so of itself."""
    engine = engine_of(nn.Parameter(torch.zeros(1)))
    engine.rank, engine.world_size = rank, world_size
    return engine


@dataclass
class Problem:
    """Finds the weight of a linear map by its squared errors; losses can be broken on the way."""

    scripted: Iterator[float] | None = None
    """Held-out losses instead of the true ones."""
    spoil: Callable[[int, Tensor], Tensor] = lambda _call, loss: loss
    """From the number of the loss, from 0, and the loss to another one."""
    weight: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(WIDTH)))
    asked: list[Samples] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    """The weight at each loss."""
    judged: list[Tensor] = field(default_factory=list)
    """The weight at each evaluation."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(NUM_SAMPLES, WIDTH, generator=generator)
        self.targets = self.inputs @ torch.randn(WIDTH, generator=generator)
        self.engine = engine_of(self.weight)

    def error(self, samples: Samples) -> Tensor:
        return (self.inputs[samples] @ self.weight - self.targets[samples]).square().mean()

    def loss(self, samples: Samples) -> Tensor:
        self.asked.append(samples)
        self.seen.append(self.weight.detach().clone())
        return self.spoil(len(self.asked) - 1, self.error(samples))

    def held_out(self) -> tuple[float, int]:
        self.judged.append(self.weight.detach().clone())
        if self.scripted is not None:
            return 2 * next(self.scripted), 2
        return float(self.error(list(range(NUM_SAMPLES))).detach()), 1

    def train(self, **course: object) -> Progress:
        return self.training(**course).run()

    def training(self, checkpoints: Checkpoints | None = None, **course: object) -> Training:
        settings = {"num_samples": NUM_SAMPLES, "epochs": 3, **course}
        task = Task(loss=self.loss, held_out=self.held_out)
        return Training(self.engine, Course(**settings), task, checkpoints)


def becomes_nan(*calls: int) -> Callable[[int, Tensor], Tensor]:
    return lambda call, loss: loss * math.nan if call in calls else loss


# Samples


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (2, 2), (4, 1), (3, 2)])
def test_a_gang_sees_in_a_step_what_one_rank_sees(batch_size, ranks, accumulation):
    course = {"num_samples": 40, "epochs": 2, "batch_size": batch_size}
    together = Course(**course, accumulation=accumulation)
    alone = Course(**course, accumulation=accumulation * ranks)
    assert together.steps_per_epoch(ranks) == alone.steps_per_epoch(1)
    for epoch in range(2):
        for step in range(alone.steps_per_epoch(1)):
            each = [
                together.micro_batches(epoch, step, rank_of(rank, ranks)) for rank in range(ranks)
            ]
            in_turn = [each[rank][micro] for micro in range(accumulation) for rank in range(ranks)]
            assert in_turn == alone.micro_batches(epoch, step, rank_of(0, 1))


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "accumulation"), [(12, 1, 1), (13, 3, 2), (11, 2, 2)]
)
def test_an_epoch_sees_every_sample_at_most_once(num_samples, batch_size, accumulation):
    course = Course(
        num_samples=num_samples, epochs=5, batch_size=batch_size, accumulation=accumulation
    )
    left_out = set(range(num_samples))
    for epoch in range(5):
        steps = range(course.steps_per_epoch(1))
        batches = [b for step in steps for b in course.micro_batches(epoch, step, rank_of(0, 1))]
        samples = [sample for batch in batches for sample in batch]
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(set(samples)) == len(samples) == len(steps) * batch_size * accumulation
        assert set(samples) <= set(range(num_samples))
        assert num_samples - len(samples) < batch_size * accumulation
        left_out -= set(samples)
    assert not left_out  # what one epoch leaves over, another takes


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [
        tuple(Course(num_samples=12, epochs=3, seed=seed).order(epoch))
        for seed in (0, 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6
    assert orders[0] == tuple(Course(num_samples=12, epochs=9).order(0))


def test_the_loop_takes_the_courses_samples():
    problem = Problem()
    training = problem.training(epochs=2, batch_size=2, accumulation=3)
    training.run()
    course, rank = training.course, rank_of(0, 1)
    assert problem.asked == [
        batch
        for epoch in range(2)
        for step in range(2)
        for batch in course.micro_batches(epoch, step, rank)
    ]


def test_too_few_samples_for_one_step_are_refused_with_all_numbers():
    course = Course(num_samples=7, epochs=1, batch_size=2, accumulation=2)
    with pytest.raises(ConfigError) as caught:
        course.steps_per_epoch(2)
    assert str(caught.value) == (
        "training: 7 training samples are fewer than the 8 of one step (batch size 2 x "
        "accumulation 2 x 2 worker(s)). Use more samples, or smaller steps."
    )
    assert course.steps_per_epoch(1) == 1
    with pytest.raises(ConfigError, match="12 training samples are fewer than the 13"):
        Problem().training(accumulation=13)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_things_without_overlap(world_size):
    shares = [share(7, rank_of(rank, world_size)) for rank in range(world_size)]
    assert sorted(number for mine in shares for number in mine) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Steps


def test_training_learns_and_says_what_it_did(caplog):
    caplog.set_level("INFO")
    problem = Problem()
    progress = problem.train(epochs=20, logging_steps=100)
    assert progress.initial == progress.evaluations[0]
    assert progress.best == min(progress.evaluations) < 0.1 * progress.initial
    assert progress.improved
    assert (progress.num_updates, progress.skipped, progress.epoch) == (240, 0, 20)
    assert len(progress.losses) == 240
    assert [m for m in caplog.messages if m.startswith("step")] == [
        f"step {step:4}/240  loss {progress.losses[step - 1]:.5f}" for step in (100, 200)
    ]


def test_accumulated_micro_batches_are_one_large_batch():
    weights, losses = [], []
    for sizes in ((1, 4), (2, 2), (4, 1)):
        problem = Problem()
        progress = problem.train(batch_size=sizes[0], accumulation=sizes[1])
        weights.append(problem.weight.detach())
        losses.append(torch.tensor(progress.losses))
    for other in (1, 2):
        torch.testing.assert_close(weights[0], weights[other], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses[0], losses[other], rtol=1e-4, atol=1e-6)


def test_the_schedule_is_asked_for_every_step_and_scales_every_rate():
    asked = []

    def schedule(step: int, num_steps: int) -> float:
        asked.append((step, num_steps))
        return 0.5 if step == 0 else 0.0

    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [ParameterGroup((first,), 0.1), ParameterGroup((second,), 0.01)]
    engine = LocalEngine(groups, 1.0, {"first": first, "second": second})
    course = Course(num_samples=3, epochs=2, schedule=schedule)
    losses = iter([2.0, 1.0, 1.0])
    task = Task(
        loss=lambda _samples: (first - 1).square().sum() + (second - 1).square().sum(),
        held_out=lambda: (next(losses), 1),
    )
    Training(engine, course, task).run()
    assert asked == [(step, 6) for step in range(6)]
    # AdamW's first step is as long as its rate, and all others have the rate 0.
    torch.testing.assert_close(first.detach(), torch.full((2,), 0.05))
    torch.testing.assert_close(second.detach(), torch.full((2,), 0.005))


def test_gradients_are_clipped_together():
    weight = nn.Parameter(torch.zeros(2))
    engine = engine_of(weight, grad_clip=0.5)
    engine.backward((weight * torch.tensor([30.0, 40.0])).sum())
    assert engine.step(1.0)
    moment = engine.moments()["weight/exp_avg"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.3, 0.4]), rtol=1e-4, atol=0)
    assert weight.grad is None


def test_a_state_is_a_copy():
    weight = nn.Parameter(torch.arange(3.0).half())
    engine = engine_of(weight)
    state = engine.state()
    with torch.no_grad():
        weight.add_(1)
    assert state["weight"].dtype == torch.float32
    assert state["weight"].tolist() == [0, 1, 2]
    engine.restore(state)
    assert weight.tolist() == [0, 1, 2]


# Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_its_step_and_is_counted(bad, caplog):
    problem = Problem(spoil=lambda call, loss: loss * 0 + bad if call == 5 else loss)
    progress = problem.train(epochs=1)
    assert torch.equal(problem.seen[5], problem.seen[6])
    assert not torch.equal(problem.seen[4], problem.seen[5])
    assert not torch.equal(problem.seen[6], problem.seen[7])
    assert (progress.skipped, progress.skipped_in_a_row, progress.num_updates) == (1, 0, 11)
    assert math.isnan(progress.losses[5])
    assert len(progress.losses) == 12
    assert f"step skipped: its loss is {bad}" in caplog.text
    assert progress.improved
    assert not progress.gave_up


def test_a_gradient_that_is_not_finite_skips_its_step_too(caplog):
    problem = Problem()

    def spoil(call: int, loss: Tensor) -> Tensor:
        nothing = (problem.weight - problem.weight.detach()).sum()
        return loss + nothing.square().sqrt() if call == 5 else loss  # slope 0 / 0 at 0

    problem.spoil = spoil
    progress = problem.train(epochs=1)
    assert torch.equal(problem.seen[5], problem.seen[6])
    assert not torch.equal(problem.seen[6], problem.seen[7])
    assert (progress.skipped, progress.num_updates) == (1, 11)
    assert "step skipped: a gradient is not finite" in caplog.text
    assert problem.weight.isfinite().all()


def test_a_skipped_step_leaves_no_trace_in_the_next_one():
    problem = Problem(spoil=becomes_nan(1))  # the second of the first step's micro-batches
    problem.train(epochs=1, accumulation=2)
    clean = Problem()
    for step in range(1, 6):
        for samples in Course(num_samples=NUM_SAMPLES, epochs=1, accumulation=2).micro_batches(
            0, step, rank_of(0, 1)
        ):
            clean.engine.backward(clean.error(samples) / 2)
        assert clean.engine.step(1.0)
    assert torch.equal(problem.weight, clean.weight)


def test_training_gives_up_after_many_skipped_steps_and_ends_with_the_best_state(caplog):
    broken = range(NUM_SAMPLES + 1, 1000)
    problem = Problem(spoil=becomes_nan(*broken))
    progress = problem.train(epochs=9)
    assert progress.gave_up == (
        "the loss was not finite in 10 steps in a row; rolled back to the best state before. "
        "Use a lower learning rate, or float32."
    )
    assert progress.gave_up in caplog.text
    assert progress.skipped == MOST_SKIPPED_STEPS == 10
    assert len(problem.asked) == NUM_SAMPLES + 1 + MOST_SKIPPED_STEPS
    assert progress.improved
    assert progress.best_epoch == 1
    assert torch.equal(problem.weight, problem.judged[1])
    assert not torch.equal(problem.seen[-1], problem.judged[1])


def test_fewer_skipped_steps_are_no_reason_to_give_up():
    most = MOST_SKIPPED_STEPS - 1
    problem = Problem(spoil=becomes_nan(*range(most), *range(most + 1, 2 * most + 1)))
    progress = problem.train(epochs=3)
    assert not progress.gave_up
    assert (progress.skipped, progress.epoch) == (2 * most, 3)


# Evaluations


def test_the_best_state_is_kept_when_later_ones_are_worse():
    problem = Problem(scripted=iter([5.0, 4.0, 3.0, 6.0, 3.0]))
    progress = problem.train(epochs=4)
    assert (progress.initial, progress.best, progress.best_epoch) == (5.0, 3.0, 2)
    assert progress.evaluations == [5.0, 4.0, 3.0, 6.0, 3.0]
    assert torch.equal(problem.weight, problem.judged[2])
    assert not torch.equal(problem.judged[2], problem.judged[4])


def test_nothing_changes_where_nothing_is_better():
    problem = Problem(scripted=iter([5.0, 5.0, 6.0, math.nan]))
    progress = problem.train()
    assert not progress.improved
    assert (progress.best, progress.best_epoch, progress.epoch) == (5.0, 0, 3)
    assert torch.equal(problem.weight, torch.zeros(WIDTH))
    assert not torch.equal(problem.judged[-1], problem.weight)


def test_training_ends_early_after_evaluations_without_gain():
    losses = [5.0, 6.0, 4.0, 4.5, 4.5, 1.0]
    progress = Problem(scripted=iter(losses)).train(epochs=5, patience=2)
    assert progress.stopped_early
    assert (progress.epoch, progress.best, progress.without_gain) == (4, 4.0, 2)
    assert not progress.gave_up
    progress = Problem(scripted=iter(losses)).train(epochs=5, patience=0)
    assert not progress.stopped_early
    assert (progress.epoch, progress.best) == (5, 1.0)


@pytest.mark.parametrize(("interval", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_evaluations_come_every_so_many_epochs_and_after_the_last(interval, epochs):
    problem = Problem()
    problem.train(epochs=5, eval_interval=interval)
    every = Problem()
    every.train(epochs=5)
    assert len(problem.judged) == 1 + len(epochs)
    for mine, epoch in zip(problem.judged[1:], epochs, strict=True):
        assert torch.equal(mine, every.judged[epoch])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_at_first_is_an_error(loss):
    problem = Problem(scripted=iter([loss]))
    with pytest.raises(OneCompError, match=f"held-out loss is {loss} before the first step"):
        problem.train()
    assert problem.asked == []


# Schedule


def test_the_rate_rises_linearly_and_falls_along_a_cosine_to_the_floor():
    factor = warmup_then_cosine(0.25, 0.1)
    found = [factor(step, 40) for step in range(40)]
    assert found[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert found[10] == 1.0
    assert found[25] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 0.1 < found[-1] < 0.11
    assert factor(40, 40) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup_ratio", "min_lr_ratio"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_no_step_has_a_rate_of_zero_or_above_the_peak(warmup_ratio, min_lr_ratio):
    factor = warmup_then_cosine(warmup_ratio, min_lr_ratio)
    for num_steps in (1, 2, 7):
        assert all(0 < factor(step, num_steps) <= 1 for step in range(num_steps))
    if not warmup_ratio:
        assert factor(0, 7) == 1.0
    if min_lr_ratio:
        assert factor(6, 7) == 1.0


# Going on


@dataclass
class OneStop(Checkpoints):
    """Keeps what training needs to go on, once."""

    engine: LocalEngine
    after: int
    """Updates."""
    epoch_ended: bool
    kept: tuple | None = None

    def due(self, progress: Progress, *, epoch_ended: bool) -> bool:
        return (progress.num_updates, epoch_ended) == (self.after, self.epoch_ended)

    def save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        assert self.kept is None
        text = json.dumps(asdict(progress))
        best = {name: tensor.clone() for name, tensor in best.items()}
        self.kept = (text, best, self.engine.state(), self.engine.moments())


@pytest.mark.parametrize(
    ("after", "epoch_ended"), [(1, False), (6, False), (6, True), (8, False), (18, True)]
)
def test_training_goes_on_to_the_same_bits(after, epoch_ended):
    course = {
        "accumulation": 2,
        "schedule": warmup_then_cosine(0.2, 0.01),
        "seed": 3,
        "patience": 2,
    }
    through = Problem()
    stop = OneStop(through.engine, after, epoch_ended)
    expected = through.training(stop, **course).run()

    text, best, state, moments = stop.kept
    later = Problem()
    later.engine.restore(state)
    later.engine.restore_moments(moments)
    training = later.training(**course)
    training.resume(Progress(**json.loads(text)), best)
    assert training.run() == expected
    assert torch.equal(later.weight, through.weight)
    assert later.asked == through.asked[2 * after :]
    ours, theirs = later.engine.moments(), through.engine.moments()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_moments_are_empty_before_the_first_step_and_copies_after():
    problem = Problem()
    assert problem.engine.moments() == {}
    problem.train(epochs=1)
    kept = problem.engine.moments()
    assert set(kept) == {"weight/step", "weight/exp_avg", "weight/exp_avg_sq"}
    values = kept["weight/exp_avg"].clone()
    problem.train(epochs=1)
    assert torch.equal(kept["weight/exp_avg"], values)


def test_two_trainings_have_the_same_bits():
    weights = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            problem = Problem()
            problem.train()
            weights.append(problem.weight.detach())
    assert torch.equal(*weights)
