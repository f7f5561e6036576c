"""The figure of a timeline: what every worker did when, beside how it spent its time."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from onecomp.history import Presence
from onecomp.report.figures import INK, STYLE, WIDTH_INCHES, svg_text
from onecomp.report.timeline import PHASE_NAMES, Timeline, occupancy

COLOURS = ("#3b82c4", "#17a398", "#e08a2e", "#8d99ae", "#c9a227", "#9b5de5", "#b07d62")
"""Of the phases, in order; told apart on light and on dark pages."""
BAD = "#e5484d"
NUM_BINS = 800
"""Cells of a worker's row: one image for the whole figure, whatever the number of units."""
LINES_PER_ROW = 6
MAX_INCHES = 9.0
MAX_LABELS = 32


def timeline_figure(timeline: Timeline) -> str | None:
    """A row per worker, as SVG; None where no unit was recorded.

    A cell has the colour of the phase that takes most of it and is as dense as the worker was
    busy. Joins, losses and leaves are marked in the rows, recoveries and resumptions across them.
    """
    if not timeline.spans or timeline.duration_s <= 0:
        return None
    num_rows = len(timeline.workers)
    row_inches = min(0.24, max(0.08, (MAX_INCHES - 1.2) / num_rows))
    with mpl.rc_context({**STYLE, "svg.hashsalt": "gantt"}):
        figure = Figure(figsize=(WIDTH_INCHES, 1.2 + row_inches * num_rows), layout="constrained")
        work, use = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
        _draw_work(work, timeline)
        _draw_use(use, timeline)
        _label_rows(work, timeline.workers)
        entries = _legend(timeline)
        figure.legend(handles=entries, loc="outside upper left", ncols=8, frameon=False, fontsize=8)
        return svg_text(figure, "gantt", "What every worker did, and when")


def _draw_work(axes: Axes, timeline: Timeline) -> None:
    unit_s, unit = _time_unit(timeline.duration_s)
    rows = {worker: row for row, worker in enumerate(timeline.workers)}
    for presence in timeline.presences:
        span = (presence.begin / unit_s, ((presence.end or 0.0) - presence.begin) / unit_s)
        axes.broken_barh([span], (rows[presence.worker] - 0.5, 0.83), facecolor=INK, alpha=0.1)
    extent = (0, timeline.duration_s / unit_s, len(rows) - 0.5, -0.5)
    axes.imshow(_image(timeline), aspect="auto", interpolation="none", extent=extent)
    for recovery in timeline.recoveries:
        begin = max(0.0, recovery.end - recovery.seconds)
        axes.axvspan(begin / unit_s, recovery.end / unit_s, color=BAD, alpha=0.25, linewidth=0)
    for time in timeline.resumed:
        axes.axvline(time / unit_s, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    _mark_changes(axes, timeline, rows, unit_s)
    axes.set_xlabel(f"{unit} of work")
    axes.set_ylabel("worker")
    axes.set_xlim(0, timeline.duration_s / unit_s)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _number_blocks(axes, timeline, unit_s)


def _mark_changes(axes: Axes, timeline: Timeline, rows: dict[int, int], unit_s: float) -> None:
    style = {"linestyle": "none", "clip_on": False, "zorder": 5, "markeredgewidth": 0.5}
    joined = [(p.begin / unit_s, rows[p.worker]) for p in _late_joins(timeline)]
    axes.plot(*_columns(joined), marker=">", markersize=4.5, color=INK, **style)
    for change, marker, size, colour in (("left", "<", 4.5, INK), ("lost", "X", 6.5, BAD)):
        ended = [
            ((p.end or 0.0) / unit_s, rows[p.worker])
            for p in timeline.presences
            if p.change == change
        ]
        axes.plot(*_columns(ended), marker=marker, markersize=size, color=colour, **style)


def _late_joins(timeline: Timeline) -> list[Presence]:
    """Workers that came when others were at work already."""
    late_s = 0.01 * timeline.duration_s
    begins = [0.0, *timeline.resumed]
    return [p for p in timeline.presences if all(abs(p.begin - b) > late_s for b in begins)]


def _columns(points: Sequence[tuple[float, int]]) -> tuple[list[float], list[int]]:
    return [x for x, _ in points], [y for _, y in points]


def _number_blocks(axes: Axes, timeline: Timeline, unit_s: float) -> None:
    """Say on top where blocks were finished; of many, every so many."""
    if not timeline.blocks:
        return
    step = -(-len(timeline.blocks) // 20)
    shown = [(block, time) for block, time in timeline.blocks if block % step == 0]
    top = axes.secondary_xaxis("top")
    top.set_xticks([time / unit_s for _, time in shown], [str(block) for block, _ in shown])
    top.set_xlabel("block finished")
    top.spines[:].set_visible(False)
    for _, time in shown:
        axes.axvline(time / unit_s, color=INK, alpha=0.25, linewidth=0.5)


def _image(timeline: Timeline) -> np.ndarray:
    """Colours of the cells, uint8 ``(workers * LINES_PER_ROW, bins, 4)``."""
    parts = occupancy(timeline, NUM_BINS)
    colours = np.array([to_rgb(colour) for colour in COLOURS])
    density = np.clip(parts.sum(axis=0), 0.0, 1.0)
    cells = np.concatenate([colours[parts.argmax(axis=0)], density[..., None]], axis=-1)
    lines = cells.repeat(LINES_PER_ROW, axis=0)
    lines[LINES_PER_ROW - 1 :: LINES_PER_ROW, :, 3] = 0.0  # tells neighbours apart
    return (lines * 255).round().astype(np.uint8)


def _draw_use(axes: Axes, timeline: Timeline) -> None:
    """Stacked parts of each worker's time; what is missing to the whole is waiting."""
    rows = np.arange(len(timeline.uses))
    left = np.zeros(len(rows))
    for phase, colour in enumerate(COLOURS):
        parts = [100 * use.phase_s[phase] / (use.present_s or 1.0) for use in timeline.uses]
        axes.barh(rows, parts, left=left, height=0.8, color=colour, linewidth=0)
        left += parts
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 50, 100])
    axes.set_xlabel("% of its time")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label_rows(axes: Axes, workers: Sequence[int]) -> None:
    step = -(-len(workers) // MAX_LABELS)
    axes.set_yticks(range(0, len(workers), step), [str(worker) for worker in workers[::step]])
    axes.tick_params(axis="y", length=0)


def _legend(timeline: Timeline) -> list[Patch | Line2D]:
    """Phases that occur, and the marks."""
    used = {span.phase for span in timeline.spans}
    entries: list[Patch | Line2D] = [
        Patch(color=colour, label=PHASE_NAMES[phase])
        for phase, colour in enumerate(COLOURS)
        if phase in used
    ]
    changes = {presence.change for presence in timeline.presences}
    if _late_joins(timeline):
        entries.append(_mark(">", INK, "joined"))
    if "lost" in changes:
        entries.append(_mark("X", BAD, "lost"))
    if "left" in changes:
        entries.append(_mark("<", INK, "left"))
    if timeline.recoveries:
        entries.append(Patch(color=BAD, alpha=0.25, label="recovery"))
    return entries


def _mark(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, linestyle="none", label=label)


def _time_unit(duration_s: float) -> tuple[float, str]:
    if duration_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if duration_s < 3 * 3600 else (3600.0, "hours")
