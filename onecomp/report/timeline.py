"""Who worked on what, and when: units of work on one axis, over all drivers of a run.

The axis shows the time in which a driver was at work; what passed between two drivers is cut out.
Units carry the clock of the worker's machine, everything else the driver's. A worker's units are
shifted together by the least that puts them between its joining and the lines that report them;
durations are never changed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from onecomp.history import (
    Attempt,
    Presence,
    Recovery,
    as_block,
    as_int,
    as_list,
    as_number,
    as_object,
)

PHASES = {
    "forward": (
        "hold",
        "begin_block",
        "observe",
        "observe_group",
        "observe_ahead",
        "observe_group_ahead",
        "apply",
        "finish_block",
    ),
    "sums": ("merge",),
    "quantize": ("quantize", "prepare", "quantize_pieces", "join"),
    "files": ("store", "export", "export_outer"),
    "handing over": ("give", "take"),
    "replay": ("rewind", "replay_block"),
    "other": (),
}
"""What workers do, and the methods that are it; a method that is not named is of the last kind."""
PHASE_NAMES = tuple(PHASES)
PHASE_OF = {method: i for i, methods in enumerate(PHASES.values()) for method in methods}
OTHER = len(PHASES) - 1


class Span(NamedTuple):
    """A unit of work; times in seconds on the axis."""

    worker: int
    phase: int
    """Index in ``PHASE_NAMES``."""
    begin: float
    end: float


class _Unit(NamedTuple):
    """A unit as its worker's clock has it."""

    worker: int
    phase: int
    start: float
    seconds: float
    num_bytes: float | None
    reported: float
    """When the driver wrote of it, by its own clock."""


@dataclass(frozen=True, kw_only=True)
class WorkerUse:
    """How a worker spent the time for which it was there, all workers of its number together."""

    worker: int
    hosts: tuple[str, ...]
    present_s: float
    phase_s: tuple[float, ...]
    """Busy seconds by phase."""
    num_units: int
    received_bytes: int | None
    """None where no unit says what it received."""

    @property
    def busy_ratio(self) -> float:
        """Part of its time in which it had a unit in work."""
        return min(1.0, math.fsum(self.phase_s) / self.present_s) if self.present_s else 0.0


@dataclass(kw_only=True)
class Timeline:
    """A run's work; times in seconds on the axis."""

    duration_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    presences: list[Presence] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    """Where a later driver begins."""
    blocks: list[tuple[int, float]] = field(default_factory=list)
    """Blocks and when they were finished."""
    uses: list[WorkerUse] = field(default_factory=list)
    """By rising number of the worker; empty for runs that recorded no unit."""
    largest_shift_s: float = 0.0
    """How far the clock of a worker was moved at most."""

    @property
    def workers(self) -> list[int]:
        """Numbers of all workers, rising."""
        return sorted({presence.worker for presence in self.presences})

    @property
    def busy_ratio(self) -> float | None:
        """Part of all workers' time in which they had a unit in work."""
        present_s = math.fsum(use.present_s for use in self.uses)
        busy_s = math.fsum(use.busy_ratio * use.present_s for use in self.uses)
        return busy_s / present_s if present_s else None


def make_timeline(attempts: Sequence[Attempt]) -> Timeline:
    """The work of all drivers, one after the other."""
    timeline = Timeline()
    units: list[_Unit] = []
    for attempt in attempts:
        at_work = Attempt([e for e in attempt.events if e.get("event") != "evaluation"])
        if at_work.events:
            units += _add(timeline, at_work)
    if units:
        timeline.uses = _uses(timeline, units)
    return timeline


def clock_shifts(attempt: Attempt) -> dict[int, float]:
    """Seconds to add to the times of each worker's units."""
    return _clock_shifts(attempt.presences(), _units(attempt))


def _clock_shifts(presences: Iterable[Presence], units: Iterable[_Unit]) -> dict[int, float]:
    begins: dict[int, float] = {}
    for presence in presences:
        begins.setdefault(presence.worker, presence.begin)
    least = dict.fromkeys(begins, -math.inf)
    most = dict.fromkeys(begins, math.inf)
    for unit in units:
        least[unit.worker] = max(least[unit.worker], begins[unit.worker] - unit.start)
        most[unit.worker] = min(most[unit.worker], unit.reported - unit.start - unit.seconds)
    return {n: min(max(0.0, least[n]), most[n]) for n in begins}


def occupancy(timeline: Timeline, num_bins: int) -> np.ndarray:
    """For each phase, worker and bin of the axis, the part of the bin that the phase takes.

    Returns:
        float64 ``(phases, workers, num_bins)``.
    """
    rows = {worker: row for row, worker in enumerate(timeline.workers)}
    shape = (len(PHASES), len(rows), num_bins + 2)
    phase = np.array([span.phase for span in timeline.spans], dtype=np.intp)
    row = np.array([rows[span.worker] for span in timeline.spans], dtype=np.intp)
    per_second = num_bins / timeline.duration_s if timeline.duration_s else 0.0

    def covered(times: Iterable[float]) -> np.ndarray:
        """At each bin's edge, the sum over spans of what lies between their time and the edge."""
        position = np.clip(np.array(list(times)) * per_second, 0, num_bins)
        count, total = np.zeros(shape), np.zeros(shape)
        place = (phase, row, np.ceil(position).astype(np.intp))
        np.add.at(count, place, 1.0)
        np.add.at(total, place, position)
        return np.arange(num_bins + 2) * count.cumsum(axis=2) - total.cumsum(axis=2)

    begins, ends = (span.begin for span in timeline.spans), (span.end for span in timeline.spans)
    return np.diff(covered(begins) - covered(ends), axis=2)[:, :, :num_bins]


def _add(timeline: Timeline, attempt: Attempt) -> list[_Unit]:
    """Put an attempt behind what is there already; its units."""
    begin, end = attempt.times
    offset = timeline.duration_s - begin
    if timeline.duration_s:
        timeline.resumed.append(timeline.duration_s)
    timeline.duration_s += end - begin
    timeline.presences += [
        replace(p, begin=p.begin + offset, end=(end if p.end is None else p.end) + offset)
        for p in attempt.presences()
    ]
    timeline.recoveries += [replace(r, end=r.end + offset) for r in attempt.recoveries()]
    for event in attempt.of_kind("block"):
        block, time = as_block(event), as_number(event.get("time"))
        if block is not None and time is not None:
            timeline.blocks.append((block, time + offset))
    units = _units(attempt)
    shifts = _clock_shifts(attempt.presences(), units)
    for unit in units:
        start = unit.start + shifts[unit.worker] + offset
        timeline.spans.append(Span(unit.worker, unit.phase, start, start + unit.seconds))
    moved = max(map(abs, shifts.values()), default=0.0)
    timeline.largest_shift_s = max(timeline.largest_shift_s, moved)
    return units


def _units(attempt: Attempt) -> list[_Unit]:
    """Everything that has both a start and a duration."""
    units = []
    for event in attempt.of_kind("units"):
        worker, reported = as_int(event.get("worker")), as_number(event.get("time"))
        if worker is None or reported is None:
            continue
        for unit in map(as_object, as_list(event.get("units"))):
            start, seconds = as_number(unit.get("start")), as_number(unit.get("seconds"))
            if start is not None and seconds is not None:
                phase = PHASE_OF.get(str(unit.get("method")), OTHER)
                num_bytes = as_number(unit.get("bytes"))
                units.append(_Unit(worker, phase, start, seconds, num_bytes, reported))
    return units


def _uses(timeline: Timeline, units: Sequence[_Unit]) -> list[WorkerUse]:
    units_of: dict[int, list[_Unit]] = {worker: [] for worker in timeline.workers}
    for unit in units:
        units_of[unit.worker].append(unit)
    return [
        _use(worker, [p for p in timeline.presences if p.worker == worker], of_worker)
        for worker, of_worker in units_of.items()
    ]


def _use(worker: int, presences: Sequence[Presence], units: Sequence[_Unit]) -> WorkerUse:
    phase_s = [0.0] * len(PHASES)
    for unit in units:
        phase_s[unit.phase] += unit.seconds
    received = [unit.num_bytes for unit in units if unit.num_bytes is not None]
    return WorkerUse(
        worker=worker,
        hosts=tuple(dict.fromkeys(p.host for p in presences if p.host)),
        present_s=math.fsum((p.end or p.begin) - p.begin for p in presences),
        phase_s=tuple(phase_s),
        num_units=len(units),
        received_bytes=round(math.fsum(received)) if received else None,
    )
