"""Units that any worker may do: the most urgent goes to the fastest worker that has none."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from onecomp.executor import Call
from onecomp.later import Later
from onecomp.watch import Watch

Urgency = tuple[float, ...]
"""The smallest is the most urgent."""


@dataclass(order=True)
class _Unit:
    urgency: Urgency
    number: int
    hand_out: Callable[[int], Call] = field(compare=False)


class Dispatch:
    """A queue of units for all workers, each of which gets one at a time.

    A second one would save a worker the driver's answer, some milliseconds, and wait there while
    others have nothing to do, behind everything that became urgent since.

    A loss is raised as soon as the driver sees it, in ``Later.wait``; what else a unit raises shows
    where its value is asked for.

    Args:
        watch: Tells how a unit ended.
        later: Tells when a unit has ended.
        speeds: Of the workers that may be given units now.
    """

    def __init__(self, watch: Watch, later: Later, speeds: Callable[[], dict[int, float]]):
        self._watch, self._later, self._speeds = watch, later, speeds
        self._units: list[_Unit] = []
        self._busy: set[int] = set()
        self._numbers = itertools.count()

    def add(self, urgency: Urgency, hand_out: Callable[[int], Call]) -> None:
        """Have a unit done.

        Args:
            urgency: The smallest comes first.
            hand_out: Calls the worker that it is given; what the call needs is there.
        """
        heapq.heappush(self._units, _Unit(urgency, next(self._numbers), hand_out))
        self._go_on()

    def forget(self) -> None:
        """Nothing of it is wanted any more."""
        self._units.clear()
        self._busy.clear()

    def _go_on(self) -> None:
        if not self._units:
            return
        speeds = self._speeds()
        free = sorted(speeds.keys() - self._busy, key=lambda worker: (-speeds[worker], worker))
        for worker in free:
            if self._units and worker not in self._busy:  # handing out may have had more added
                self._give(worker, heapq.heappop(self._units))

    def _give(self, worker: int, unit: _Unit) -> None:
        self._busy.add(worker)
        call = unit.hand_out(worker)

        def take_back() -> None:
            self._watch.require_worker(call.receipt)  # one that is lost must get nothing more
            self._busy.discard(worker)
            self._go_on()

        self._later.add([call.receipt], take_back)
