"""The timeline of a run: what is drawn, and what is left as it is."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from journals import START, Driver, write_run

from onecomp.history import Attempt, split_attempts
from onecomp.report import write_report
from onecomp.report.gantt import COLOURS, timeline_figure
from onecomp.report.timeline import PHASE_NAMES, PHASES, clock_shifts, make_timeline, occupancy

FORWARD = PHASE_NAMES.index("forward")
QUANTIZE = PHASE_NAMES.index("quantize")


def report(worker: int, time: float, *units: tuple[str, float, float]) -> dict:
    """Units of ``(method, start, seconds)``, counted from the start, reported at ``time``."""
    rows = [{"method": m, "start": START + begin, "seconds": s} for m, begin, s in units]
    return {"event": "units", "time": START + time, "worker": worker, "units": rows}


def attempt(*events: dict, workers: int = 1, seconds: float = 10.0) -> Attempt:
    started = {"event": "started", "time": START, "workers": workers}
    return Attempt([started, *events, {"event": "finished", "time": START + seconds}])


def faulty_run(num_blocks: int = 8, num_workers: int = 4) -> list[dict]:
    """Losses, a join, a leave, clocks that differ, and a second driver."""
    first = Driver(num_blocks, list(range(num_workers)), skew={0: 3.0, 2: -4.0}).start()
    half = num_blocks // 2
    for block in range(half):
        first.quantize(block, dies=[1] if block == half // 2 else [])
    first.workers.append(num_workers)
    first.change(num_workers, "joined")
    first.quantize(half)
    first.change(3, "left")
    second = Driver(num_blocks, [0, 1], now=first.now + 50_000.0).start(half + 1)
    for block in range(half + 1, num_blocks):
        second.quantize(block)
    return first.events + second.finish().events


def test_the_parts_of_a_worker_s_time_are_added_up_by_what_it_did():
    events = [report(0, 4.0, ("observe", 0.0, 1.0), ("merge", 1.0, 0.5), ("unheard_of", 2.0, 0.25))]
    [use] = make_timeline([attempt(*events, report(0, 9.0, ("observe", 6.0, 3.0)))]).uses
    seconds = {name: s for name, s in zip(PHASE_NAMES, use.phase_s, strict=True) if s}
    assert seconds == {"forward": 4.0, "sums": 0.5, "other": 0.25}
    assert (use.present_s, use.num_units) == (10.0, 4)
    assert use.busy_ratio == pytest.approx(0.475)


def test_a_worker_waits_only_while_it_is_there():
    lost = {"event": "worker", "worker": 0, "change": "lost", "time": START + 2.0}
    timeline = make_timeline(
        [attempt(report(0, 1.0, ("observe", 0.0, 1.0)), lost, workers=2, seconds=10.0)]
    )
    assert [(use.present_s, use.busy_ratio) for use in timeline.uses] == [(2.0, 0.5), (10.0, 0.0)]
    assert timeline.busy_ratio == pytest.approx(1 / 12)


def test_a_clock_that_is_right_is_not_moved():
    events = [report(0, 5.0, ("observe", 1.0, 2.0)), report(0, 9.0, ("merge", 5.0, 4.0))]
    assert clock_shifts(attempt(*events)) == {0: 0.0}


@pytest.mark.parametrize("skew", [-7200.0, -40.0, 3.0, 7200.0])
def test_a_clock_that_is_wrong_is_moved_between_the_joining_and_the_report(skew):
    right = [("hold", 0.5, 1.0), ("observe", 3.0, 2.0), ("quantize", 6.0, 3.5)]
    reported = (2, 6, 10)
    pairs = zip(reported, right, strict=True)
    events = [report(0, time, (name, begin + skew, s)) for time, (name, begin, s) in pairs]
    timeline = make_timeline([attempt(*events)])
    for time, span, (_, begin, seconds) in zip(reported, timeline.spans, right, strict=True):
        assert span.begin >= 0.0
        assert span.end <= time + 1e-6
        assert span.end - span.begin == pytest.approx(seconds)
        assert span.begin == pytest.approx(begin, abs=1.0)
    assert timeline.largest_shift_s == pytest.approx(abs(skew), abs=1.0)


def test_what_passes_between_two_drivers_is_cut_out():
    first, second = split_attempts(faulty_run())
    timeline = make_timeline([first, second])
    seconds = [end - begin for begin, end in (first.times, second.times)]
    assert timeline.duration_s == pytest.approx(sum(seconds))
    assert timeline.resumed == [pytest.approx(seconds[0])]
    assert [block for block, _ in timeline.blocks] == list(range(8))
    assert all(0.0 <= span.begin < span.end <= timeline.duration_s for span in timeline.spans)


def test_what_follows_the_work_is_not_waiting():
    whole = attempt(report(0, 10.0, ("observe", 0.0, 10.0)))
    evaluation = {"event": "evaluation", "time": START + 500.0}
    [use] = make_timeline([Attempt([*whole.events, evaluation])]).uses
    assert use.busy_ratio == 1.0


def slow_occupancy(timeline, num_bins: int) -> np.ndarray:
    """The same from the definition, span by span and bin by bin."""
    parts = np.zeros((len(PHASES), len(timeline.workers), num_bins))
    width = timeline.duration_s / num_bins
    for span in timeline.spans:
        row = timeline.workers.index(span.worker)
        for b in range(num_bins):
            overlap = min(span.end, (b + 1) * width) - max(span.begin, b * width)
            parts[span.phase, row, b] += max(0.0, overlap) / width
    return parts


@pytest.mark.parametrize("num_bins", [1, 7, 100])
def test_cells_hold_the_part_of_their_time_that_each_phase_took(num_bins):
    timeline = make_timeline(split_attempts(faulty_run()))
    parts = occupancy(timeline, num_bins)
    np.testing.assert_allclose(parts, slow_occupancy(timeline, num_bins), atol=1e-6)
    busy_s = parts.sum(axis=(1, 2)) * timeline.duration_s / num_bins
    assert busy_s[FORWARD] == pytest.approx(sum(use.phase_s[FORWARD] for use in timeline.uses))
    assert busy_s[QUANTIZE] > 0


def test_every_phase_has_a_colour_of_its_own():
    assert len(set(COLOURS)) == len(COLOURS) == len(PHASES)


def test_the_figure_shows_every_worker_and_every_kind_of_fault():
    svg = timeline_figure(make_timeline(split_attempts(faulty_run())))
    assert svg is not None
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"lost", "left", "recovery", "forward", "sums", "quantize"} <= set(texts)
    assert {"seconds of work", "worker", "% of its time", "block finished"} <= set(texts)
    assert {str(worker) for worker in range(5)} <= set(texts)
    assert "replay" not in texts  # did not occur


def test_a_run_that_recorded_no_unit_has_no_figure():
    driver = Driver(1, [0]).start()
    assert timeline_figure(make_timeline([Attempt(driver.events)])) is None
    assert timeline_figure(make_timeline([])) is None


def test_the_figure_of_a_large_run_is_small():
    svg = timeline_figure(make_timeline(split_attempts(faulty_run(80, 64))))
    assert svg is not None
    assert len(svg) < 250_000


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = write_run(tmp_path_factory.mktemp("faulty") / "run", faulty_run())
    return write_report(run).read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    """Texts of all rows of tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows]


def test_the_page_tells_of_losses_and_recoveries(page):
    changes = [row[1:] for row in cells(page) if row[2:3] in (["lost"], ["left"])]
    assert changes == [
        ["1", "lost", "host1, process 101", "quantize of block 2", "it was killed"],
        ["3", "left", "host0, process 103", "–", "–"],  # noqa: RUF001 - as the page has it
    ]
    assert [row[1:] for row in cells(page) if row[1:3] == ["2", "1"]] == [["2", "1", "4", "3.0 s"]]
    assert "Clocks of workers differed" in page
    assert "Dashed lines" in page


def test_the_page_has_numbers_of_every_worker(page):
    hosts = [row for row in cells(page) if len(row) == 7 and row[0].isdigit()]
    assert [row[0] for row in hosts] == ["0", "1", "2", "3", "4"]
    for row in hosts:
        assert int(row[3].removesuffix(" %")) + int(row[4].removesuffix(" %")) in (99, 100, 101)


def test_bytes_are_compared_with_the_least_possible_where_it_is_known(tmp_path, page):
    assert "24.0 MiB in all." in page
    driver = Driver(2, [0]).start()
    for block in range(2):
        driver.write("block", block=block, bytes_moved=3 * 2**20, bytes_least=2 * 2**20)
    text = write_report(write_run(tmp_path / "run", driver.events)).read_text(encoding="utf-8")
    assert "6.0 MiB in all, 1.50 times the least possible." in text
    assert ">least possible</text>" in text


def test_the_time_of_a_resumed_run_is_that_of_all_its_drivers(page):
    first, second = split_attempts(faulty_run())
    seconds = sum(end - begin for begin, end in (first.times, second.times))
    minutes, rest = divmod(round(seconds), 60)
    assert f"<dd>{minutes}m{rest}s</dd>" in page
