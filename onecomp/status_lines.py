"""The answer of ``onecomp status`` as lines for a person."""

import shlex

from onecomp.log import format_duration
from onecomp.status import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    NOT_STARTED,
    RUNNING,
    BlockCount,
    Driver,
    RunStatus,
)

DASH = "-"
LABEL_WIDTH = 11


def status_lines(status: RunStatus) -> str:
    """Where a run is, one thing a line; lines that would say nothing are left out."""
    rows = {
        "run": status.run,
        "state": _state(status),
        "go on": None if status.state in (RUNNING, FINISHED) else _remedy(status),
        "model": status.product.model,
        "method": _method(status),
        "checkpoint": _checkpoint(status),
        "blocks": _blocks(status),
        "in work": _in_work(status) if status.state == RUNNING else None,
        "error": _error(status.blocks),
        "pace": _pace(status.blocks),
        "workers": _workers(status),
        "fallbacks": str(status.fallbacks),
    }
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows.items() if text)


def _state(status: RunStatus) -> str:
    if status.state == RUNNING and status.driver is not None:
        sign = f"last sign of life {format_duration(status.driver.silent_s)} ago"
        return f"{RUNNING}: {_process(status.driver)}, {sign}"
    if status.state == FINISHED:
        by = f" by attempt {status.attempts}" if status.attempts > 1 else ""
        return FINISHED + by + (f" in {format_duration(status.seconds)}" if status.seconds else "")
    if status.state == NOT_STARTED:
        return f"{NOT_STARTED}: {_absence(status.driver)}"
    reason = status.error or (_absence(status.driver) if status.state == INTERRUPTED else None)
    text = f"{status.state}: {reason or 'for a reason that was not written down'}"
    return text.replace("\n", "\n" + " " * LABEL_WIDTH)


def _process(driver: Driver) -> str:
    return "a driver" if driver.pid is None else f"process {driver.pid} on {driver.host}"


def _absence(driver: Driver | None) -> str:
    if driver is None:
        return "no driver works on it"
    if driver.is_gone:
        return f"{_process(driver)} is gone"
    return f"no sign of life for {format_duration(driver.silent_s)} from {_process(driver)}"


def _remedy(status: RunStatus) -> str:
    remedy = f"onecomp resume {shlex.quote(status.run)}"
    return f"{remedy}, once the cause is removed" if status.state == FAILED else remedy


def _method(status: RunStatus) -> str:
    product = status.product
    parts = [product.method or DASH]
    if product.wbits is not None:
        parts.append(f"{product.wbits} bits")
    if product.groupsize is not None:
        parts.append("rows" if product.groupsize == -1 else f"groups of {product.groupsize}")
    if product.error_propagation:
        parts.append("error propagation")
    if product.bits_per_weight not in (None, product.wbits):
        parts.append(f"{product.bits_per_weight:.2f} bits per weight")
    return ", ".join(parts)


def _checkpoint(status: RunStatus) -> str:
    if status.product.output is None:
        return "none is asked for"
    return status.product.output + ("" if status.state == FINISHED else " (to come)")


def _blocks(status: RunStatus) -> str:
    blocks = status.blocks
    text = f"{blocks.done} done" if blocks.total is None else f"{blocks.done} of {blocks.total}"
    if status.attempts > 1 and status.state != FINISHED:
        text += f", {blocks.by_last_driver} of them by attempt {status.attempts}"
    return text


def _in_work(status: RunStatus) -> str:
    blocks, unit = status.blocks, status.last_unit
    text = "start" if blocks.total is None else "the checkpoint"
    if blocks.in_work is not None:
        text = f"block {blocks.in_work}"
        text += "" if blocks.in_work_s is None else f" for {format_duration(blocks.in_work_s)}"
    if unit is None:
        return text
    places = [("block", unit.block), ("group", unit.group), ("worker", unit.worker)]
    where = ", ".join(f"{name} {number}" for name, number in places if number is not None)
    ago = format_duration(unit.ago_s)
    return f"{text}; last unit done: {unit.method}{f' ({where})' if where else ''} {ago} ago"


def _error(blocks: BlockCount) -> str | None:
    return None if blocks.output_error is None else f"{blocks.output_error:.2e}, mean of blocks"


def _pace(blocks: BlockCount) -> str | None:
    if blocks.pace_s is None:
        return None
    pace = f"{blocks.pace_s:.1f} s a block"
    return pace if blocks.eta_s is None else f"{pace}, {format_duration(blocks.eta_s)} to go"


def _workers(status: RunStatus) -> str | None:
    crew = status.workers
    parts = [str(crew.present)] if status.state == RUNNING else []
    if crew.lost:
        parts.append(f"{crew.lost} lost")
    if crew.recoveries:
        noun = "recovery" if crew.recoveries == 1 else "recoveries"
        parts.append(f"{crew.recoveries} {noun} in {format_duration(crew.recovery_s)}")
    if status.state == RUNNING and crew.executor:
        parts.append(crew.executor)
    return ", ".join(parts)
