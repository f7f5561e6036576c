"""A run's journal as a history: which drivers worked on it, with which workers, and what was lost.

Readers of a run need neither torch nor a cluster for it. Whatever is missing or unknown is passed
over, so that journals of older and newer runs can be read as well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

JsonObject = Mapping[str, object]

ENDS = ("finished", "failed", "stopped")
"""Events with which a driver says that it is done."""


@dataclass(frozen=True, kw_only=True)
class Presence:
    """A worker from its joining to its end; times are the driver's, in Unix seconds."""

    worker: int
    begin: float
    end: float | None = None
    """None for one that was there when the driver wrote its last line."""
    change: str | None = None
    """What ended it: ``lost``, or ``left`` in good order."""
    node: str | None = None
    host: str | None = None
    pid: int | None = None
    doing: str | None = None
    """What it was at when it was lost."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Shards of lost workers carried through the finished blocks again, by those that are left."""

    end: float
    seconds: float
    block: int | None
    lost: tuple[int, ...]
    """Numbers of the workers."""
    replayed_shards: int


@dataclass(frozen=True)
class Attempt:
    """What one driver wrote, in order."""

    events: Sequence[JsonObject]

    @property
    def started(self) -> JsonObject:
        """The driver's first line; empty in runs that have none."""
        return next(self.of_kind("started"), {})

    @property
    def outcome(self) -> JsonObject | None:
        """How the driver says that it ended; None while it works, or if it was killed."""
        return next((e for e in reversed(self.events) if e.get("event") in ENDS), None)

    @property
    def times(self) -> tuple[float, float]:
        """When the first and the last line were written; zeros if no line has a time."""
        known = [t for event in self.events if (t := as_number(event.get("time"))) is not None]
        return (min(known), max(known)) if known else (0.0, 0.0)

    def of_kind(self, *kinds: str) -> Iterator[JsonObject]:
        """Events of some kinds, in order."""
        return (event for event in self.events if event.get("event") in kinds)

    def presences(self) -> list[Presence]:
        """Every worker of this attempt, in the order of joining.

        Until the first says that it joined, as many as the driver started with are assumed. A
        number that joins again is another worker.
        """
        begin, _ = self.times
        has_joined = any(event.get("change") == "joined" for event in self.of_kind("worker"))
        num_assumed = 0 if has_joined else as_int(self.started.get("workers")) or 0
        there = {number: Presence(worker=number, begin=begin) for number in range(num_assumed)}
        gone: list[Presence] = []
        for event in self.of_kind("worker", "units"):
            number = as_int(event.get("worker"))
            if number is None:
                continue
            before = there.get(number)
            if event.get("event") == "units":
                if before is None and all(presence.worker != number for presence in gone):
                    there[number] = Presence(worker=number, begin=begin)
            elif event.get("change") == "joined":
                there[number] = _joined(number, event)
            elif event.get("change") in ("lost", "left"):
                gone.append(_ended(before or Presence(worker=number, begin=begin), event))
                there.pop(number, None)
        return sorted([*gone, *there.values()], key=lambda presence: presence.begin)

    def recoveries(self) -> list[Recovery]:
        """What lost workers cost, in order."""
        return [
            Recovery(
                end=as_number(event.get("time")) or 0.0,
                seconds=as_number(event.get("seconds")) or 0.0,
                block=as_block(event),
                lost=tuple(n for n in map(as_int, as_list(event.get("lost"))) if n is not None),
                replayed_shards=as_int(event.get("replayed_shards")) or 0,
            )
            for event in self.of_kind("recovery")
        ]


def split_attempts(events: Iterable[JsonObject]) -> list[Attempt]:
    """The attempts of a run; each ``started`` begins one.

    Returns:
        One at least. Lines in front of the first ``started`` are an attempt of their own.
    """
    parts: list[list[JsonObject]] = [[]]
    for event in events:
        if event.get("event") == "started" and parts[-1]:
            parts.append([])
        parts[-1].append(event)
    return [Attempt(part) for part in parts]


def last_by_block(events: Iterable[JsonObject], kind: str) -> dict[int, JsonObject]:
    """The last event of a kind for each block."""
    return {
        block: event
        for event in events
        if event.get("event") == kind and (block := as_block(event)) is not None
    }


def last_groups(events: Iterable[JsonObject]) -> list[JsonObject]:
    """The last event of each input group, told apart by block and layers."""
    last = {
        (as_block(event), tuple(as_object(event.get("layers")))): event
        for event in events
        if event.get("event") == "group"
    }
    return list(last.values())


def as_number(value: object) -> float | None:
    """A JSON number as float; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def as_int(value: object) -> int | None:
    """A whole JSON number; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_text(value: object) -> str | None:
    """A JSON string that is not empty; None for anything else."""
    return value if isinstance(value, str) and value else None


def as_list(value: object) -> list:
    """A JSON array; empty for anything else."""
    return value if isinstance(value, list) else []


def as_object(value: object) -> JsonObject:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def as_block(event: JsonObject) -> int | None:
    """The event's block; None where it names none."""
    number = as_number(event.get("block"))
    return None if number is None else int(number)


def _joined(number: int, event: JsonObject) -> Presence:
    return Presence(
        worker=number,
        begin=as_number(event.get("time")) or 0.0,
        node=as_text(event.get("node")),
        host=as_text(event.get("host")),
        pid=as_int(event.get("pid")),
    )


def _ended(presence: Presence, event: JsonObject) -> Presence:
    return replace(
        presence,
        end=as_number(event.get("time")) or 0.0,
        change=as_text(event.get("change")),
        node=presence.node or as_text(event.get("node")),
        host=presence.host or as_text(event.get("host")),
        pid=presence.pid or as_int(event.get("pid")),
        doing=as_text(event.get("doing")),
        reason=as_text(event.get("reason")),
    )
