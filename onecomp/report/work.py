"""The part of a report that says who worked: a timeline, what was moved, what was lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onecomp.history import JsonObject, Presence, Recovery, as_number
from onecomp.log import format_duration
from onecomp.report.figures import bytes_bars
from onecomp.report.gantt import timeline_figure
from onecomp.report.journal import Journal
from onecomp.report.text import DASH, bytes_text
from onecomp.report.timeline import Timeline, make_timeline

SHIFT_WORTH_SAYING_S = 0.5


@dataclass(frozen=True, kw_only=True)
class WorkSection:
    """What the page shows of the work; figures are SVG."""

    timeline: str | None
    notes: list[str]
    """Sentences on how to read the timeline."""
    workers: list[tuple[str, ...]]
    """Number, hosts, time present, busy, waiting, units, bytes received."""
    bytes_bars: str | None
    bytes_note: str
    changes: list[tuple[str, ...]]
    """Workers that were lost or left: when, number, what, where, at what, why."""
    recoveries: list[tuple[str, ...]]
    """When, block, workers lost, shards carried again, seconds."""
    tiles: list[tuple[str, str, str]]


def work_section(journal: Journal) -> WorkSection:
    """Everything that the journal says of the work."""
    timeline = make_timeline(journal.attempts)
    moved, least = (_by_block(journal.blocks, key) for key in ("bytes_moved", "bytes_least"))
    return WorkSection(
        timeline=timeline_figure(timeline),
        notes=_notes(timeline),
        workers=_worker_rows(timeline),
        bytes_bars=bytes_bars(moved, least),
        bytes_note=_bytes_note(moved, least),
        changes=[_change_row(p) for p in timeline.presences if p.change],
        recoveries=[_recovery_row(r) for r in timeline.recoveries],
        tiles=_tiles(timeline),
    )


def _by_block(blocks: Mapping[int, JsonObject], key: str) -> dict[int, float]:
    values = {block: as_number(event.get(key)) for block, event in sorted(blocks.items())}
    return {block: value for block, value in values.items() if value is not None}


def _notes(timeline: Timeline) -> list[str]:
    notes = ["A cell is as dense as the worker was busy; the bars on the right add it up."]
    if timeline.resumed:
        notes.append("Dashed lines: the run was resumed; the time in between is left out.")
    if timeline.largest_shift_s > SHIFT_WORTH_SAYING_S:
        notes.append(
            "Clocks of workers differed from the driver's: units were shifted by up to "
            f"{timeline.largest_shift_s:.1f} s for drawing."
        )
    return notes


def _worker_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    return [
        (
            str(use.worker),
            ", ".join(use.hosts) or DASH,
            format_duration(use.present_s),
            f"{100 * use.busy_ratio:.0f} %",
            f"{100 - 100 * use.busy_ratio:.0f} %",
            str(use.num_units),
            DASH if use.received_bytes is None else bytes_text(use.received_bytes),
        )
        for use in timeline.uses
    ]


def _bytes_note(moved: Mapping[int, float], least: Mapping[int, float]) -> str:
    total = f"{bytes_text(sum(moved.values()))} in all"
    both = moved.keys() & least.keys()
    least_bytes = sum(least[block] for block in both)
    if not least_bytes:
        return f"{total}."
    ratio = sum(moved[block] for block in both) / least_bytes
    return f"{total}, {ratio:.2f} times the least possible."


def _change_row(presence: Presence) -> tuple[str, ...]:
    place = [presence.host or presence.node, presence.pid and f"process {presence.pid}"]
    return (
        format_duration(presence.end or 0.0),
        str(presence.worker),
        presence.change or DASH,
        ", ".join(text for text in place if text) or DASH,
        presence.doing or DASH,
        presence.reason or DASH,
    )


def _recovery_row(recovery: Recovery) -> tuple[str, ...]:
    return (
        format_duration(recovery.end),
        DASH if recovery.block is None else str(recovery.block),
        ", ".join(map(str, recovery.lost)) or DASH,
        str(recovery.replayed_shards),
        f"{recovery.seconds:,.1f} s",
    )


def _tiles(timeline: Timeline) -> list[tuple[str, str, str]]:
    """Nothing for runs that did not record their workers."""
    if not timeline.presences:
        return []
    lost = sum(presence.change == "lost" for presence in timeline.presences)
    last_begin = timeline.resumed[-1] if timeline.resumed else 0.0
    last = [p for p in timeline.presences if p.begin >= last_begin]
    most = _most_at_once(last)
    tiles = [("workers", str(most), f"{lost} lost" if lost else "")]
    if timeline.busy_ratio is not None:
        tiles.append(("busy", f"{100 * timeline.busy_ratio:.0f} %", "of the workers' time"))
    return tiles


def _most_at_once(presences: Sequence[Presence]) -> int:
    return max(
        (sum(q.begin <= p.begin < (q.end or q.begin) for q in presences) for p in presences),
        default=0,
    )
