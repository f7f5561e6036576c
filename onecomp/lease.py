"""The lease of a run directory: one driver at a time writes a run, on any storage.

A lease is the file ``lease-000003.json``. Taking one means to create, exclusively, the file with
the number behind the highest there is, after every lease that is there was found to be dead, and
then to look again: whoever creates the later file of two sees the earlier one, and goes on only
if it had judged that very file dead. So an exclusive write is all that the storage has to offer,
and of drivers that race for a directory at most one wins. A driver holds the directory as long as
its file is there and no other has a higher number.

The holder writes its file anew all the time. A lease is dead when that did not happen for its
``ttl``, by the storage's own clock: the file's time of modification against that of a file which
the reader writes for comparison. Clocks of machines are never compared. On the holder's own
machine a lease is dead at once when the process is gone.
"""

import contextlib
import json
import logging
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from onecomp.errors import InputError, OneCompError
from onecomp.processes import process_start, this_machine
from onecomp.storage import AnyPath, children, create_exclusively, make_directory, replacing

logger = logging.getLogger(__name__)

TTL_S = 60.0
"""Seconds after its last sign of life in which a driver counts as dead."""
RENEWALS = 4
"""Signs of life in that time."""
FILE_NAME = re.compile(r"lease-(\d{6,})\.json")


class LeaseLostError(OneCompError):
    """Another driver has taken over the run directory; this one may not write any more.

    Args:
        run_dir: The directory.
        holder: Who has it now, in words.
    """

    def __init__(self, run_dir: str, holder: str):
        super().__init__(run_dir, holder)
        self.run_dir, self.holder = run_dir, holder

    def __str__(self) -> str:
        return (
            f"{self.run_dir}: {self.holder} while this driver gave no sign of life. What is "
            "finished is kept; when nobody works on the run any more, resume continues it."
        )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who writes to a run directory."""

    owner: str
    """Random, a new one for each lease."""
    host: str
    pid: int
    process: tuple[str, str] | None
    """Machine and start of the process, where both can be known: tells whether it is gone."""
    started: float
    """Unix seconds by the owner's clock, for display, as ``renewed``."""
    renewed: float
    ttl: float
    """Seconds without renewal after which the lease is dead."""

    @classmethod
    def of_this_process(cls, ttl_s: float) -> "Lease":
        """A new lease."""
        machine, start, now = this_machine(), process_start(os.getpid()), round(time.time(), 3)
        return cls(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=None if machine is None or start is None else (machine, start),
            started=now,
            renewed=now,
            ttl=ttl_s,
        )

    @classmethod
    def parse(cls, content: bytes) -> "Lease | None":
        """The lease that a file holds; None for one that is still being written."""
        try:
            fields = json.loads(content)
            process = fields["process"]
            return cls(**{**fields, "process": None if process is None else tuple(process)})
        except (ValueError, TypeError, KeyError):
            return None

    def encoded(self) -> bytes:
        """Contents of its file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode() + b"\n"

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this machine and is not there any more."""
        if self.process is None or self.process[0] != this_machine():
            return False
        return process_start(self.pid) != self.process[1]


@dataclass(frozen=True)
class Holder:
    """A lease and what is seen of its owner."""

    path: AnyPath
    """File of the lease."""
    lease: Lease | None
    """None while it is being written."""
    silent_s: float
    """Seconds since its last sign of life, by the storage's clock."""

    @property
    def ttl_s(self) -> float:
        """Seconds of silence after which it counts as dead."""
        return TTL_S if self.lease is None else self.lease.ttl

    @property
    def is_alive(self) -> bool:
        """Whether the directory is its own."""
        is_gone = self.lease is not None and self.lease.is_gone
        return not is_gone and self.silent_s <= self.ttl_s

    def __str__(self) -> str:
        who = ""
        if self.lease is not None:
            who = f"host {self.lease.host}, process {self.lease.pid}, "
        return f"another driver ({who}last sign of life {self.silent_s:.0f} s ago)"


def find_holders(run_dir: AnyPath) -> dict[int, Holder]:
    """All leases of a directory by number: one, or none, but for moments and what the dead left."""
    paths = _lease_files(run_dir)
    if not paths:
        return {}
    found = {}
    for number, path in paths.items():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found[number] = Lease.parse(path.read_bytes()), _modified(path)
    now = _storage_time(run_dir)
    return {
        number: Holder(paths[number], lease, max(0.0, now - modified))
        for number, (lease, modified) in found.items()
    }


def find_holder(run_dir: AnyPath) -> Holder | None:
    """Who holds a directory, or held it last and died; None where no lease is left."""
    holders = find_holders(run_dir)
    return holders[max(holders)] if holders else None


def require_free(run_dir: AnyPath) -> None:
    """Check that no driver that lives holds the directory.

    Raises:
        InputError: One does.
    """
    _require_dead(run_dir, find_holders(run_dir))


def require_held(run_dir: AnyPath, owner: str) -> None:
    """Check that a lease is still its owner's: two reads.

    Raises:
        LeaseLostError: Another driver has taken the directory over.
    """
    paths = _lease_files(run_dir)
    lease = None
    if paths:
        with contextlib.suppress(FileNotFoundError):
            lease = Lease.parse(paths[max(paths)].read_bytes())
    if lease is None or lease.owner != owner:
        who = "somebody removed its lease"
        if lease is not None:
            who = f"another driver (host {lease.host}, process {lease.pid}) has taken it over"
        raise LeaseLostError(str(run_dir), who)


@contextlib.contextmanager
def hold(run_dir: AnyPath, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Hold a run directory for as long as the body runs, and say so all the time.

    Raises:
        InputError: Another driver that lives holds it.
    """
    path, lease = _take(run_dir, ttl_s)
    ended = threading.Event()
    renewal = threading.Thread(
        target=_keep_renewing, args=(path, lease, ended), name="renew-lease", daemon=True
    )
    renewal.start()
    try:
        yield lease
    finally:
        ended.set()
        renewal.join()
        _release(path, lease.owner)


def _take(run_dir: AnyPath, ttl_s: float) -> tuple[AnyPath, Lease]:
    dead = find_holders(run_dir)
    _require_dead(run_dir, dead)
    number, lease = max(dead, default=0) + 1, Lease.of_this_process(ttl_s)
    path = run_dir / f"lease-{number:06d}.json"
    make_directory(run_dir)
    try:
        create_exclusively(path, lease.encoded())
    except FileExistsError as error:
        raise _lost_race(run_dir) from error
    if _lease_files(run_dir).keys() - {number, *dead}:
        path.unlink(missing_ok=True)
        raise _lost_race(run_dir)
    for holder in dead.values():
        logger.info("took over from %s", holder)
        holder.path.unlink(missing_ok=True)
    return path, lease


def _require_dead(run_dir: AnyPath, holders: Mapping[int, Holder]) -> None:
    for holder in holders.values():
        if holder.is_alive:
            rest_s = max(1, math.ceil(holder.ttl_s - holder.silent_s))
            wait = f"Wait for it to end, or if it is dead, for {rest_s} s until its lease runs out."
            raise InputError(run_dir, f"is in use by {holder}. {wait}")


def _lost_race(run_dir: AnyPath) -> InputError:
    try:
        require_free(run_dir)
    except InputError as error:
        return error
    return InputError(run_dir, "was taken by another driver at the same moment. Try again.")


def _keep_renewing(path: AnyPath, lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(lease.ttl / RENEWALS):
        try:
            if not _is_of(path, lease.owner):
                return  # taken over: `require_held` says so to whoever is about to write
            with replacing(path) as temporary:
                now = round(time.time(), 3)
                temporary.write_bytes(replace(lease, renewed=now).encoded())
        except Exception:  # each store fails with a class of its own, and may come back in time
            logger.warning("the lease of the run directory was not renewed", exc_info=True)


def _release(path: AnyPath, owner: str) -> None:
    with contextlib.suppress(OSError):  # then it runs out
        if _is_of(path, owner):
            path.unlink(missing_ok=True)


def _is_of(path: AnyPath, owner: str) -> bool:
    """Whether a file holds the owner's lease: numbers come again once all leases are gone."""
    try:
        lease = Lease.parse(path.read_bytes())
    except FileNotFoundError:
        return False
    return lease is not None and lease.owner == owner


# What is seen of others


def _lease_files(run_dir: AnyPath) -> dict[int, AnyPath]:
    matches = ((FILE_NAME.fullmatch(path.name), path) for path in children(run_dir))
    return {int(match[1]): path for match, path in matches if match}


def _modified(path: AnyPath) -> float:
    if isinstance(path, Path):
        return path.stat().st_mtime
    return path.fs.modified(path.path).timestamp()


def _storage_time(run_dir: AnyPath) -> float:
    """Now, by the clock that dates files in the directory; by this machine's if it is closed."""
    probe = run_dir / f".now-{uuid.uuid4().hex}"
    try:
        create_exclusively(probe, b"")
        modified = _modified(probe)
        probe.unlink()
    except OSError:
        return time.time()
    return modified
