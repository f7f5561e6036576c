"""The journal of a run: one JSON object a line, in the order of writing.

On local storage it is ``events.jsonl``, to which lines are appended. Objects cannot be appended
to, so on an object store it is ``events/000001.jsonl`` and so on, one object a batch.
"""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from upath import UPath

from onecomp.storage import AnyPath, children, create_exclusively, read_files

EVENTS_FILE = "events.jsonl"
EVENTS = "events"
"""Directory of the batches."""
WAITS = frozenset({"group", "units"})
"""Kinds that may wait for the next event of another kind, as their block's."""
MAX_DELAY_S = 5
"""After this long the next event is written whatever its kind."""


def event_line(event: str, fields: Mapping[str, object]) -> bytes:
    """An event as a line of the journal; its time is now unless ``fields`` has one."""
    return (json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n").encode()


def read_events(path: AnyPath) -> tuple[list[dict], int]:
    """Events of a journal in order, and the number of unreadable lines.

    A run that is killed may leave half a line. At the end it is what any reader of a live run
    sees; in the middle, where a resumed run went on, it is counted.

    Args:
        path: ``RUN/events.jsonl``; the batches are looked for beside it. A run directory that was
            copied to another kind of storage and resumed there has both.
    """
    lines_file = [path] if path.is_file() else []
    batches = [b for b in children(path.with_name(EVENTS)) if b.suffix == ".jsonl"]
    files = [*batches, *lines_file] if isinstance(path, Path) else [*lines_file, *batches]
    *lines, last = _joined([part for part in read_files(files) if part]).split(b"\n")
    events = [_parse(line) for line in lines if line.strip()]
    readable = [event for event in [*events, _parse(last)] if event is not None]
    return readable, events.count(None)


def _joined(parts: list[bytes]) -> bytes:
    """Parts one after the other, each beginning a line."""
    *before, last = parts or [b""]
    return b"".join(part if part.endswith(b"\n") else part + b"\n" for part in before) + last


def _parse(line: bytes) -> dict | None:
    try:
        event = json.loads(line)
    except ValueError:  # includes undecodable bytes
        return None
    return event if isinstance(event, dict) else None


class EventLog(ABC):
    """The writing end of a journal, for one process."""

    @abstractmethod
    def append(self, event: str, fields: Mapping[str, object]) -> None:
        """Add one event; it may wait to be written together with the next ones."""

    @abstractmethod
    def flush(self) -> None:
        """Write what waits."""


def open_event_log(run_dir: AnyPath) -> EventLog:
    """The journal of a run directory, for writing."""
    if isinstance(run_dir, Path):
        return LineLog(run_dir / EVENTS_FILE)
    return BatchLog(run_dir / EVENTS)


class LineLog(EventLog):
    """Writes each event at once, behind half a line that a killed run may have left.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, fields: Mapping[str, object]) -> None:
        """Add one line."""
        line = event_line(event, fields)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def flush(self) -> None:
        """Nothing waits."""


class BatchLog(EventLog):
    """Writes one object for several events.

    Args:
        directory: Where the objects are.
    """

    def __init__(self, directory: UPath):
        self.directory = directory
        self._waiting: list[bytes] = []
        self._written_at = -float(MAX_DELAY_S)
        self._next: int | None = None

    def __reduce__(self) -> tuple[type, tuple[UPath]]:
        """Travels without what waits, which is for this process to write."""
        return BatchLog, (self.directory,)

    def append(self, event: str, fields: Mapping[str, object]) -> None:
        """Add one event; written with the next one that does not wait."""
        self._waiting.append(event_line(event, fields))
        if event not in WAITS or time.monotonic() - self._written_at > MAX_DELAY_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one object with a number of its own."""
        if not self._waiting:
            return
        batch = b"".join(self._waiting)
        if self._next is None:
            self._next = _last_number(self.directory) + 1
        while True:  # another process may write as well
            try:
                create_exclusively(self.directory / f"{self._next:06d}.jsonl", batch)
            except FileExistsError:
                self._next += 1
            else:
                break
        self._next += 1
        self._waiting.clear()
        self._written_at = time.monotonic()


def _last_number(directory: UPath) -> int:
    numbers = [int(path.stem) for path in children(directory) if path.stem.isdecimal()]
    return max(numbers, default=0)
