import io
import logging

import pytest

from onecomp.progress import BlockProgress, Progress


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def finish(progress: Progress, error: float | None = 3.41e-4) -> BlockProgress:
    return progress.finished_block(error, 2.1, 4.8)


def test_one_line_says_everything_with_units():
    progress = BlockProgress(
        done=12, total=32, output_error=3.41e-4, calibrate_s=2.1, quantize_s=4.8, eta_s=378.0
    )
    assert str(progress) == (
        "block  12/32  output_error 3.41e-04  calibrate    2.1 s  quantize    4.8 s  eta   6.3 min"
    )


def test_the_number_of_workers_ends_the_line_where_it_is_known():
    with Progress(2, stream=io.StringIO(), clock=FakeClock()) as progress:
        without = str(finish(progress))
        with_workers = str(progress.finished_block(3.41e-4, 2.1, 4.8, workers=8))
    assert "workers" not in without
    assert with_workers.endswith("eta   0.0 min  workers 8")


def test_an_error_that_was_not_measured_is_a_dash_of_the_same_width():
    fields = {"done": 1, "total": 2, "calibrate_s": 0.0, "quantize_s": 1.0, "eta_s": 1.0}
    without = str(BlockProgress(output_error=None, **fields))
    assert "output_error        -  calibrate" in without
    assert len(without) == len(str(BlockProgress(output_error=1.0, **fields)))


def test_eta_extrapolates_the_measured_pace():
    clock = FakeClock()
    with Progress(10, stream=io.StringIO(), clock=clock) as progress:
        clock.now_s += 30.0
        assert finish(progress).eta_s == pytest.approx(30.0 * 9)
        clock.now_s += 10.0  # 40 s for 2 blocks
        assert finish(progress).eta_s == pytest.approx(20.0 * 8)


def test_reused_blocks_are_done_but_do_not_count_for_the_pace():
    clock = FakeClock()
    with Progress(10, reused=6, stream=io.StringIO(), clock=clock) as progress:
        clock.now_s += 30.0
        block = finish(progress)
    assert (block.done, block.total) == (7, 10)
    assert block.eta_s == pytest.approx(30.0 * 3)


def test_what_passes_before_the_work_begins_does_not_count_for_the_pace():
    clock = FakeClock()
    with Progress(32, reused=30, stream=io.StringIO(), clock=clock) as progress:
        clock.now_s += 300.0  # the shards are carried through the finished blocks
        progress.begin_work()
        clock.now_s += 60.0
        assert finish(progress).eta_s == pytest.approx(60.0)


def test_what_passes_between_two_stretches_of_work_does_not_count_for_the_pace():
    clock = FakeClock()
    with Progress(10, reused=4, stream=io.StringIO(), clock=clock) as progress:
        for pause_s, seconds in ((300.0, 30.0), (500.0, 10.0)):
            clock.now_s += pause_s
            progress.begin_work()
            clock.now_s += seconds
            block = finish(progress)
    assert block.eta_s == pytest.approx(20.0 * 4)


def test_the_last_block_leaves_nothing_to_wait_for():
    clock = FakeClock()
    with Progress(1, stream=io.StringIO(), clock=clock) as progress:
        clock.now_s += 5.0
        assert finish(progress).eta_s == 0.0


def test_without_a_terminal_each_block_is_one_log_line(caplog):
    stream, clock = io.StringIO(), FakeClock()
    with caplog.at_level(logging.INFO), Progress(3, stream=stream, clock=clock) as progress:
        lines = [str(finish(progress)) for _ in range(2)]
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("onecomp.progress", "INFO", line) for line in lines
    ]
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_log_lines(caplog, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), FakeClock()
    with caplog.at_level(logging.INFO), Progress(3, stream=stream, clock=clock) as progress:
        clock.now_s += 60.0
        finish(progress)
    assert caplog.records == []
    drawn = stream.getvalue()
    assert "1/3" in drawn
    assert "output_error 3.41e-04" in drawn
    assert "eta 2m0s" in drawn
    assert "workers" not in drawn


def test_the_bar_counts_the_workers_where_they_are_known(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(3, stream=stream, clock=FakeClock()) as progress:
        progress.finished_block(3.41e-4, 2.1, 4.8, workers=8)
    assert "workers 8" in stream.getvalue()


def test_the_bar_goes_to_standard_error_by_default(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(2, clock=FakeClock()) as progress:
        finish(progress)
    assert capsys.readouterr().out == ""
