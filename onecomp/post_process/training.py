"""The training loop of every process that trains the whole model; the step is the engine's.

Which samples a step sees follows from its number alone, never from how many ranks there are: a gang
of two with one sample each does what one rank does with two micro-batches.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from onecomp.errors import ConfigError, OneCompError
from onecomp.post_process.engine import Engine

logger = logging.getLogger(__name__)

MOST_SKIPPED_STEPS = 10
"""Steps in a row whose loss is not finite, after which training is given up."""

Samples = list[int]
"""Numbers of samples."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is trained on, how often, and how the learning rate goes."""

    num_samples: int
    epochs: int
    name: str = "training"
    """What messages call it."""
    batch_size: int = 1
    """Samples of a micro-batch, on each rank."""
    accumulation: int = 1
    """Micro-batches of a step, on each rank."""
    schedule: Callable[[int, int], float] = lambda _step, _total: 1.0
    """Factor of the learning rates for a step, from its number and the number of steps."""
    eval_interval: int = 1
    """Epochs between evaluations."""
    patience: int = 0
    """Evaluations without a new best after which training ends; 0: never."""
    seed: int = 0
    logging_steps: int = 10

    def samples_per_step(self, world_size: int) -> int:
        """Samples that one update sees, over all ranks."""
        return self.batch_size * self.accumulation * world_size

    def steps_per_epoch(self, world_size: int) -> int:
        """Updates in an epoch; samples that do not fill one are left to other epochs.

        Raises:
            ConfigError: There are fewer samples than one update needs.
        """
        needed = self.samples_per_step(world_size)
        if self.num_samples < needed:
            raise ConfigError(
                self.name,
                [
                    f"{self.num_samples} training samples are fewer than the {needed} of one step "
                    f"(batch size {self.batch_size} x accumulation {self.accumulation} x "
                    f"{world_size} worker(s)). Use more samples, or smaller steps."
                ],
            )
        return self.num_samples // needed

    def order(self, epoch: int) -> Samples:
        """All samples in the order in which an epoch takes them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def micro_batches(self, epoch: int, step: int, engine: Engine) -> list[Samples]:
        """The micro-batches of one rank in one step of an epoch."""
        size, world = self.batch_size, engine.world_size
        first = step * self.samples_per_step(world)
        starts = (
            first + (micro * world + engine.rank) * size for micro in range(self.accumulation)
        )
        order = self.order(epoch)
        return [order[start : start + size] for start in starts]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step computes."""

    loss: Callable[[Samples], Tensor]
    """Mean loss of training samples, with a gradient."""
    held_out: Callable[[], tuple[float, int]]
    """Sum of the losses of this rank's share of the held-out samples, and their number."""


@dataclass
class Progress:
    """Where training is, and what it has found; travels through checkpoints as JSON."""

    epoch: int = 0
    step: int = 0
    """Steps of the current epoch that are done."""
    num_updates: int = 0
    skipped: int = 0
    """Steps without an update, as a loss was not finite."""
    skipped_in_a_row: int = 0
    initial: float = math.nan
    """Held-out loss before the first step."""
    best: float = math.nan
    best_epoch: int = 0
    without_gain: int = 0
    """Evaluations since the best one."""
    gave_up: str = ""
    """Why training ended early for the worse."""
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)
    """Training loss of every step, mean over all ranks."""
    evaluations: list[float] = field(default_factory=list)
    """Held-out losses, the initial one first."""

    @property
    def improved(self) -> bool:
        """Whether some state is better than the first."""
        return self.best < self.initial


class Checkpoints:
    """Where training may leave what it needs to go on; this one keeps nothing."""

    def due(self, progress: Progress, *, epoch_ended: bool) -> bool:
        """Whether to save now."""
        del progress, epoch_ended
        return False

    def save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """Save the engine's state, where training is, and the best state so far."""


class Training:
    """Trains, keeps the state with the lowest held-out loss, and ends with it.

    Args:
        engine: Carries out the steps.
        course: Samples, epochs and schedule.
        task: Losses.
        checkpoints: Where to leave what is needed to go on.
    """

    def __init__(
        self, engine: Engine, course: Course, task: Task, checkpoints: Checkpoints | None = None
    ):
        self.engine, self.course, self.task = engine, course, task
        self.checkpoints = checkpoints or Checkpoints()
        self.steps_per_epoch = course.steps_per_epoch(engine.world_size)
        self.progress = Progress()
        self._best: dict[str, Tensor] = {}

    def resume(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """Go on where an earlier process was; the engine has its state already."""
        self.progress, self._best = replace(progress), best

    def run(self) -> Progress:
        """All epochs; afterwards the parameters are those of the best evaluation.

        Raises:
            OneCompError: The held-out loss is not finite before the first step.
        """
        if not self._best:
            self._start()
        while self.progress.epoch < self.course.epochs and not self._is_over():
            self._epoch()
        self.engine.restore(self._best)
        return self.progress

    def _start(self) -> None:
        loss = self._held_out()
        if not math.isfinite(loss):
            raise OneCompError(f"the held-out loss is {loss} before the first step of training")
        self.progress.initial = self.progress.best = loss
        self.progress.evaluations.append(loss)
        self._best = self.engine.state()
        logger.info("held-out loss before training: %.5f", loss)

    def _is_over(self) -> bool:
        return bool(self.progress.gave_up) or self.progress.stopped_early

    def _epoch(self) -> None:
        progress = self.progress
        while progress.step < self.steps_per_epoch:
            self._step()
            progress.step += 1
            if progress.gave_up:
                return
            self._checkpoint(epoch_ended=False)
        progress.epoch, progress.step = progress.epoch + 1, 0
        is_last = progress.epoch == self.course.epochs
        if is_last or progress.epoch % self.course.eval_interval == 0:
            self._evaluate()
        self._checkpoint(epoch_ended=True)

    def _checkpoint(self, *, epoch_ended: bool) -> None:
        if self.checkpoints.due(self.progress, epoch_ended=epoch_ended):
            self.checkpoints.save(self.progress, self._best)

    def _step(self) -> None:
        progress, course = self.progress, self.course
        batches = course.micro_batches(progress.epoch, progress.step, self.engine)
        total = 0.0
        for samples in batches:
            loss = self.task.loss(samples) / len(batches)
            [mean] = self.engine.total([loss.item() / self.engine.world_size])
            total += mean
            if not math.isfinite(mean):
                self._skip(f"its loss is {mean}")
                return
            self.engine.backward(loss)
        number = progress.epoch * self.steps_per_epoch + progress.step
        num_steps = course.epochs * self.steps_per_epoch
        if not self.engine.step(course.schedule(number, num_steps)):
            self._skip("a gradient is not finite")
            return
        progress.num_updates += 1
        progress.skipped_in_a_row = 0
        progress.losses.append(total)
        if (number + 1) % course.logging_steps == 0:
            logger.info("step %4d/%d  loss %.5f", number + 1, num_steps, total)

    def _skip(self, why: str) -> None:
        progress = self.progress
        self.engine.discard()
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        progress.losses.append(math.nan)
        logger.warning("step skipped: %s", why)
        if progress.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            progress.gave_up = (
                f"the loss was not finite in {MOST_SKIPPED_STEPS} steps in a row; rolled back to "
                "the best state before. Use a lower learning rate, or float32."
            )
            logger.warning("%s", progress.gave_up)

    def _held_out(self) -> float:
        mine, num_mine = self.task.held_out()
        total, count = self.engine.total([mine, float(num_mine)])
        return total / count

    def _evaluate(self) -> None:
        progress, loss = self.progress, self._held_out()
        progress.evaluations.append(loss)
        if loss < progress.best:
            progress.best, progress.best_epoch, progress.without_gain = loss, progress.epoch, 0
            self._best = self.engine.state()
        else:
            progress.without_gain += 1
        logger.info(
            "epoch %d/%d  held-out loss %.5f  best %.5f",
            progress.epoch, self.course.epochs, loss, progress.best,
        )  # fmt: skip
        progress.stopped_early = 0 < self.course.patience <= progress.without_gain


def warmup_then_cosine(warmup_ratio: float, min_lr_ratio: float) -> Callable[[int, int], float]:
    """Factor that rises linearly from the first step on and falls along a cosine to a floor.

    Args:
        warmup_ratio: Share of all steps in which it rises.
        min_lr_ratio: Where it ends, as a share of the peak.
    """

    def factor(step: int, num_steps: int) -> float:
        warmup = math.floor(warmup_ratio * num_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, num_steps - warmup)
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def share(count: int, engine: Engine) -> Sequence[int]:
    """Which of ``count`` things a rank works on."""
    return range(engine.rank, count, engine.world_size)
