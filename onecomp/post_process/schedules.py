"""How the learning rate goes, by the names that Transformers gives its schedulers."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

BY_RESULTS = (SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value)
"""Those that follow the losses; here the learning rate follows from the step's number alone."""


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rates for a step.

    Steps are counted from one, and one more is planned than taken, so that no step is wasted on a
    learning rate of zero.
    """

    kind: str
    """Value of ``transformers.SchedulerType``."""
    warmup_ratio: float | int = 0.0
    """Share of all steps in which it rises."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of Transformers' function, e.g. ``num_cycles``."""

    def __call__(self, step: int, num_steps: int) -> float:
        """The factor of step ``step`` (from 0) of ``num_steps``."""
        items = tuple(sorted(self.arguments.items()))
        return float(_factor(self.kind, float(self.warmup_ratio), items, num_steps)(step + 1))

    def problems(self) -> list[str]:
        """What is wrong with it, in sentences."""
        known = [kind.value for kind in SchedulerType if kind.value not in BY_RESULTS]
        if self.kind in BY_RESULTS:
            return [
                f"lr_scheduler_type={self.kind!r} follows the losses, which a gang that resumes "
                f"cannot repeat. Use one of {', '.join(known)}."
            ]
        if self.kind not in known:
            return [f"lr_scheduler_type={self.kind!r}: must be one of {', '.join(known)}."]
        try:
            self(0, 10)
        except (TypeError, ValueError) as error:
            return [
                f"lr_scheduler_type={self.kind!r} cannot be used with lr_scheduler_kwargs="
                f"{dict(self.arguments)} ({error})."
            ]
        return []


@functools.lru_cache(maxsize=8)
def _factor(
    kind: str, warmup_ratio: float, arguments: tuple[tuple[str, Any], ...], num_steps: int
) -> Any:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=math.ceil(warmup_ratio * num_steps),
        num_training_steps=num_steps + 1,
        scheduler_specific_kwargs=dict(arguments),
    )
    assert isinstance(scheduler, LambdaLR), kind
    return scheduler.lr_lambdas[0]
