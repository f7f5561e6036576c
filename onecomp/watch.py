"""Calls on their way: what they took, and which worker does not get on."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from onecomp.errors import WorkerError
from onecomp.executor import Call, Executor, Receipt, Ref

POLL_SECONDS = 0.5
MANY_TIMES = 20
"""A call may take this many times as long as the longest one of its method so far."""


@dataclass(frozen=True)
class Unit:
    """What a call is for."""

    method: str
    block: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        block = "" if self.block is None else f" of block {self.block}"
        group = "" if self.group is None else f", group {self.group}"
        return f"{self.method}{block}{group}"


@dataclass(frozen=True)
class FinishedUnit:
    """A unit and what its worker says of it."""

    worker: int
    unit: Unit
    receipt: Receipt


@dataclass
class _Outstanding:
    unit: Unit
    receipt: Ref
    needs: list[Ref]
    turn_began: float | None = None
    """When it was the worker's first unfinished call and everything that it needs was there."""


class Watch:
    """Hands out calls and waits for them, with an eye on every worker.

    Args:
        executor: Where the calls run.
        unit_timeout_s: A call that has had its turn for longer is given up, unless calls of its
            method are known to take long.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        executor: Executor,
        unit_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.executor, self.unit_timeout_s, self._clock = executor, unit_timeout_s, clock
        self.waited_s = 0.0
        """Seconds that the driver had nothing to do."""
        self.leaving: set[int] = set()
        """Workers of which a receipt said that they were told to end."""
        self._queues: dict[int, deque[_Outstanding]] = defaultdict(deque)
        self._finished: list[FinishedUnit] = []
        self._longest_s: dict[str, float] = defaultdict(float)

    def call(
        self,
        worker: int,
        unit: Unit,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        """Hand out a call of the unit's method; does not wait."""
        call = self.executor.call(
            worker, unit.method, *arguments, num_returns=num_returns, after=after
        )
        needs = [value for value in (after, *arguments) if self.executor.is_ref(value)]
        self._queues[worker].append(_Outstanding(unit, call.receipt, needs))
        return call

    def fetch(self, refs: Sequence[Ref]) -> list:
        """Wait for values, as ``Executor.fetch``.

        Raises:
            WorkerError: A worker was lost, or had its turn for too long.
        """
        values: dict[Ref, object] = {}
        waiting = list(dict.fromkeys(refs))
        while waiting:
            began = self._clock()
            ready = self.executor.ready(waiting, POLL_SECONDS)
            self.waited_s += self._clock() - began
            for ref in [ref for ref in waiting if ref in ready]:
                values[ref] = self._value(ref)
            waiting = [ref for ref in waiting if ref not in ready]
            if waiting:
                self.look_around()
        return [values[ref] for ref in refs]

    def wait_for_any(self, refs: Sequence[Ref]) -> set[Ref]:
        """Those that have a value or an error; waits a little if none has.

        Raises:
            WorkerError: A worker has had its turn for too long.
        """
        began = self._clock()
        ready = self.executor.ready(refs, POLL_SECONDS, wait_for_all=False)
        self.waited_s += self._clock() - began
        if not ready:
            self.look_around()
        return ready

    def _value(self, ref: Ref) -> object:
        try:
            [value] = self.executor.fetch([ref])
        except WorkerError as error:
            raise self._described(error) from error
        return value

    def require_worker(self, receipt: Ref) -> None:
        """Check that a call that has ended was not lost with its worker.

        What else it raised is for whoever asks for its values, in the order of the model's layers:
        a layer's bad weights are the cause of the bad inputs of those behind it.

        Raises:
            WorkerError: It was.
        """
        try:
            self.fetch([receipt])
        except WorkerError:
            raise
        except Exception:  # noqa: BLE001 - whatever the call raised
            return

    def settle(self, workers: Iterable[int]) -> None:
        """Wait until some workers have done everything that was handed to them."""
        for worker in workers:
            self.fetch([waiting.receipt for waiting in self._queues[worker]])

    def finished(self) -> list[FinishedUnit]:
        """Units that have ended since the last time."""
        self.look_around()
        finished, self._finished = self._finished, []
        return finished

    def drop(self, worker: int) -> None:
        """The worker is gone, with everything that it was given."""
        self._queues.pop(worker, None)
        self.leaving.discard(worker)

    def look_around(self) -> None:
        """Note what has ended.

        Raises:
            WorkerError: A worker has had its turn for too long.
        """
        receipts = [waiting.receipt for queue in self._queues.values() for waiting in queue]
        ended = self.executor.ready(receipts, 0.0)
        for worker, queue in self._queues.items():
            self._note_finished(worker, queue, ended)
            if queue and self.executor.survives_losses:
                self._require_progress(worker, queue[0])

    def _note_finished(
        self, worker: int, queue: deque[_Outstanding], ended: Collection[Ref]
    ) -> None:
        while queue and queue[0].receipt in ended:
            waiting = queue.popleft()
            receipt = self._receipt(waiting)
            if receipt is not None:
                self._finished.append(FinishedUnit(worker, waiting.unit, receipt))
                if receipt.is_leaving:
                    self.leaving.add(worker)
                method = waiting.unit.method
                self._longest_s[method] = max(self._longest_s[method], receipt.seconds)

    def _receipt(self, waiting: _Outstanding) -> Receipt | None:
        """None for a call that failed: whoever needs its values learns why."""
        try:
            [receipt] = self.executor.fetch([waiting.receipt])
        except Exception:  # noqa: BLE001 - whatever the call raised
            return None
        return receipt

    def _require_progress(self, worker: int, first: _Outstanding) -> None:
        now = self._clock()
        if first.turn_began is None:
            if len(self.executor.ready(first.needs, 0.0)) == len(set(first.needs)):
                first.turn_began = now
            return
        limit_s = max(self.unit_timeout_s, MANY_TIMES * self._longest_s[first.unit.method])
        if now - first.turn_began > limit_s:
            raise WorkerError(
                worker,
                str(first.unit),
                f"no answer for {limit_s:.0f} s (--unit-timeout)",
                hangs=True,
            )

    def _described(self, error: WorkerError) -> WorkerError:
        """The error with the unit that the lost worker had in work, where that is known."""
        queue = self._queues.get(error.worker, ())
        unfinished = (waiting for waiting in queue if not self._has_succeeded(waiting))
        in_work = next(unfinished, None)
        if in_work is None:
            return error
        return WorkerError(
            error.worker, str(in_work.unit), error.reason, error.out_of_memory, error.hangs
        )

    def _has_succeeded(self, waiting: _Outstanding) -> bool:
        is_over = self.executor.ready([waiting.receipt], 0.0)
        return bool(is_over) and self._receipt(waiting) is not None
