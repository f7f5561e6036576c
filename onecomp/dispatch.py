"""Units that any worker may do, given to whoever has least to do, the most urgent first."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from onecomp.executor import Call
from onecomp.later import Later

MOST_AT_A_TIME = 1
"""Units that a worker has been given: one that it works on, and one so that it need not wait for
the driver. All others stay here, where the most urgent of them can still come first."""

Urgency = tuple[float, ...]
"""The smallest is the most urgent."""


@dataclass(order=True)
class _Unit:
    urgency: Urgency
    number: int
    cost: float = field(compare=False)
    hand_out: Callable[[int], Call] = field(compare=False)


@dataclass
class _Given:
    """What a worker has been given and has not done."""

    count: int = 0
    cost: float = 0.0


class Dispatch:
    """A queue of units for all workers.

    Args:
        later: Tells when a unit is done.
        speeds: Of the workers that there are now.
    """

    def __init__(self, later: Later, speeds: Callable[[], dict[int, float]]):
        self._later, self._speeds = later, speeds
        self._units: list[_Unit] = []
        self._given: dict[int, _Given] = {}
        self._numbers = itertools.count()

    def add(self, urgency: Urgency, cost: float, hand_out: Callable[[int], Call]) -> None:
        """Have a unit done.

        Args:
            urgency: The smallest comes first.
            cost: Multiplications that take as long.
            hand_out: Calls the worker that it is given; what the call needs is there.
        """
        heapq.heappush(self._units, _Unit(urgency, next(self._numbers), cost, hand_out))
        self._go_on()

    def forget(self) -> None:
        """Nothing of it is wanted any more."""
        self._units.clear()
        self._given.clear()

    def _go_on(self) -> None:
        speeds = self._speeds()
        while self._units:
            given = {w: self._given.setdefault(w, _Given()) for w in speeds}
            free = [w for w in speeds if given[w].count < MOST_AT_A_TIME]
            if not free:
                return
            unit = heapq.heappop(self._units)
            worker = min(free, key=lambda w: ((given[w].cost + unit.cost) / speeds[w], w))
            self._give(worker, unit)

    def _give(self, worker: int, unit: _Unit) -> None:
        given = self._given[worker]
        given.count, given.cost = given.count + 1, given.cost + unit.cost
        call = unit.hand_out(worker)

        def take_back() -> None:
            given.count, given.cost = given.count - 1, given.cost - unit.cost
            self._go_on()

        self._later.add([call.receipt], take_back)
