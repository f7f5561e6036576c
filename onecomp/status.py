"""Where a run is, from what its directory holds: no cluster is asked, no model is opened."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from onecomp.errors import InputError
from onecomp.events import EVENTS_FILE, read_events
from onecomp.history import (
    Attempt,
    JsonObject,
    as_block,
    as_int,
    as_list,
    as_number,
    as_object,
    as_text,
    last_by_block,
    last_groups,
    split_attempts,
)
from onecomp.lease import find_holder
from onecomp.storage import AnyPath, children, open_path

NOT_STARTED, RUNNING, INTERRUPTED = "not started", "running", "interrupted"
FAILED, FINISHED = "failed", "finished"


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is made."""

    model: str | None
    method: str | None
    wbits: int | None
    groupsize: int | None
    error_propagation: bool
    bits_per_weight: float | None
    """Mean over the layers made so far."""
    output: str | None
    """Where the checkpoint goes; None for a run that keeps results only."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The process that holds the run directory; its lease may still be in the writing."""

    host: str | None
    pid: int | None
    started: float | None
    """Unix seconds."""
    silent_s: float
    """Seconds since its last sign of life."""
    is_gone: bool
    """Whether it ran on this machine and is not there any more."""
    is_alive: bool


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """How far the blocks are."""

    done: int
    total: int | None
    by_last_driver: int
    output_error: float | None
    """Relative squared output error, mean over blocks."""
    pace_s: float | None
    """Seconds a new block; of an earlier driver where the last one has made none yet."""
    eta_s: float | None
    """Seconds until the last block is finished; known while the run is running."""
    in_work: int | None
    """The first block that is not finished."""
    in_work_s: float | None
    """Seconds since the block before it, or the start; known while the run is running."""


@dataclass(frozen=True, kw_only=True)
class UnitDone:
    """The unit of work whose end was reported last."""

    method: str
    worker: int | None
    block: int | None
    group: int | None
    ago_s: float
    """Seconds since the driver wrote of it; a worker's own clock is not used."""


@dataclass(frozen=True, kw_only=True)
class CrewStatus:
    """Who works, and what was lost."""

    executor: str | None
    present: int
    """Workers that the last driver has, or had when it ended."""
    lost: int
    """By all drivers together, as the recoveries."""
    recoveries: int
    recovery_s: float


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where a run is; what is not known is None."""

    run: str
    state: str
    """``not started``, ``running``, ``interrupted``, ``failed`` or ``finished``."""
    error: str | None
    """What the run failed with, or which signal stopped it."""
    attempts: int
    """Drivers that worked on the run."""
    seconds: float | None
    """What the last driver took to finish the run; None for a run that is not finished."""
    driver: Driver | None
    product: Product
    blocks: BlockCount
    last_unit: UnitDone | None
    workers: CrewStatus
    fallbacks: int


def read_status(run_dir: str | Path) -> RunStatus:
    """Where a run is, alive or dead.

    Args:
        run_dir: Its directory, on any storage.

    Raises:
        InputError: No run was begun there, or its record cannot be read.
    """
    path = open_path(run_dir)
    record = _read_record(path)
    driver = find_driver(path)
    events, _ = read_events(path / EVENTS_FILE)
    stems = [child.stem for child in children(path / "blocks") if child.suffix == ".safetensors"]
    blocks = [int(stem) for stem in stems if stem.isdecimal()]
    return run_status(str(run_dir), record, events, blocks, driver, now=time.time())


def _read_record(path: AnyPath) -> JsonObject:
    file = path / "run.json"
    if not file.is_file():
        raise InputError(
            path,
            "is not a run directory (it holds no run.json). Give the --run-dir of a run, which is "
            "OUTPUT.run by default.",
        )
    try:
        return as_object(json.loads(file.read_bytes()))
    except ValueError as error:
        raise InputError(
            file, f"cannot be read ({error}). Restore it, or begin anew in another directory."
        ) from error


def find_driver(run_dir: AnyPath) -> Driver | None:
    """Who holds a run directory, or died holding it; None where nobody does."""
    holder = find_holder(run_dir)
    if holder is None:
        return None
    lease = holder.lease
    return Driver(
        host=None if lease is None else lease.host,
        pid=None if lease is None else lease.pid,
        started=None if lease is None else lease.started,
        silent_s=holder.silent_s,
        is_gone=lease is not None and lease.is_gone,
        is_alive=holder.is_alive,
    )


def run_status(
    run: str,
    record: JsonObject,
    events: Sequence[JsonObject],
    finished_blocks: Sequence[int],
    driver: Driver | None,
    *,
    now: float,
) -> RunStatus:
    """Where a run is.

    Args:
        run: Its directory, for display.
        record: Contents of ``run.json``.
        events: Its journal.
        finished_blocks: Blocks whose results are there.
        driver: Who holds its lease; None where nobody does.
        now: Unix seconds.
    """
    attempts = split_attempts(events)
    if driver is not None and _is_newer(driver, attempts[-1]):
        attempts.append(Attempt([]))
    last = attempts[-1]
    state = _state(last, driver, has_blocks=bool(finished_blocks))
    outcome = last.outcome or {}
    return RunStatus(
        run=run,
        state=state,
        error=_error(outcome) if state in (FAILED, INTERRUPTED) else None,
        attempts=len([attempt for attempt in attempts if attempt.events or state == RUNNING]),
        seconds=as_number(outcome.get("seconds")) if state == FINISHED else None,
        driver=driver,
        product=_product(record, events),
        blocks=_block_count(attempts, events, finished_blocks, now if state == RUNNING else None),
        last_unit=_last_unit(last, now),
        workers=_crew_status(attempts),
        fallbacks=sum(len(as_list(group.get("fallbacks"))) for group in last_groups(events)),
    )


def _is_newer(driver: Driver, last: Attempt) -> bool:
    """Whether a driver has begun that has written nothing yet, and there is something to do."""
    if not last.events or (last.outcome or {}).get("event") == FINISHED:
        return False
    return driver.is_alive and (driver.started or 0.0) > last.times[1]


def _state(last: Attempt, driver: Driver | None, *, has_blocks: bool) -> str:
    outcome = (last.outcome or {}).get("event")
    if outcome in (FINISHED, FAILED):
        return str(outcome)
    if driver is not None and driver.is_alive:
        return RUNNING
    return INTERRUPTED if last.started or has_blocks else NOT_STARTED


def _error(outcome: JsonObject) -> str | None:
    if outcome.get("event") == "stopped":
        return f"stopped by {outcome.get('signal')}"
    return as_text(outcome.get("error"))


def _product(record: JsonObject, events: Sequence[JsonObject]) -> Product:
    model, quantizer = as_object(record.get("model")), as_object(record.get("quantizer"))
    layers = [e for group in last_groups(events) for e in as_object(group.get("layers")).values()]
    bits = [b for layer in layers if (b := as_number(as_object(layer).get("bits"))) is not None]
    return Product(
        model=as_text(model.get("id")),
        method=as_text(quantizer.get("method")),
        wbits=as_int(quantizer.get("wbits")),
        groupsize=as_int(quantizer.get("groupsize")),
        error_propagation=record.get("qep") is not None,
        bits_per_weight=fmean(bits) if bits else None,
        output=as_text(record.get("output")),
    )


def _block_count(
    attempts: Sequence[Attempt],
    events: Sequence[JsonObject],
    finished_blocks: Sequence[int],
    now: float | None,
) -> BlockCount:
    """``now`` is None for a run that nobody works on."""
    done = set(finished_blocks)
    totals = [t for a in attempts if (t := as_int(a.started.get("blocks"))) is not None]
    total = totals[-1] if totals else None
    blocks = last_by_block(events, "block").values()
    errors = [e for block in blocks if (e := as_number(block.get("output_error"))) is not None]
    in_work = next((block for block in range(total or 0) if block not in done), None)
    in_work_s = None if in_work is None or now is None else _seconds_in_block(attempts[-1], now)
    pace_s, eta_s = _pace_s(attempts), None
    if pace_s is not None and total is not None and now is not None:
        eta_s = max(0.0, pace_s * (total - len(done)) - min(in_work_s or 0.0, pace_s))
    return BlockCount(
        done=len(done),
        total=total,
        by_last_driver=len(last_by_block(attempts[-1].events, "block")),
        output_error=fmean(errors) if errors else None,
        pace_s=pace_s,
        eta_s=eta_s,
        in_work=in_work,
        in_work_s=in_work_s,
    )


def _pace_s(attempts: Sequence[Attempt]) -> float | None:
    """Mean seconds of the blocks of the latest driver that made any; reused ones have no event."""
    for attempt in reversed(attempts):
        blocks = last_by_block(attempt.events, "block").values()
        seconds = [s for block in blocks if (s := as_number(block.get("seconds"))) is not None]
        if seconds:
            return fmean(seconds)
    return None


def _seconds_in_block(last: Attempt, now: float) -> float | None:
    times = [as_number(event.get("time")) for event in last.of_kind("started", "block")]
    known = [t for t in times if t is not None]
    return max(0.0, now - known[-1]) if known else None


def _last_unit(last: Attempt, now: float) -> UnitDone | None:
    reports = [event for event in last.of_kind("units") if as_list(event.get("units"))]
    if not reports:
        return None
    report = reports[-1]
    units = [as_object(unit) for unit in as_list(report.get("units"))]
    unit = max(units, key=lambda unit: as_number(unit.get("start")) or 0.0)
    return UnitDone(
        method=str(unit.get("method")),
        worker=as_int(report.get("worker")),
        block=as_block(unit),
        group=as_int(unit.get("group")),
        ago_s=max(0.0, now - (as_number(report.get("time")) or now)),
    )


def _crew_status(attempts: Sequence[Attempt]) -> CrewStatus:
    presences = [attempt.presences() for attempt in attempts]
    recoveries = [recovery for attempt in attempts for recovery in attempt.recoveries()]
    return CrewStatus(
        executor=as_text(attempts[-1].started.get("executor")),
        present=sum(presence.end is None for presence in presences[-1]),
        lost=sum(presence.change == "lost" for of_one in presences for presence in of_one),
        recoveries=len(recoveries),
        recovery_s=math.fsum(recovery.seconds for recovery in recoveries),
    )
