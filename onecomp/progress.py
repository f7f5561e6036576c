"""Progress of a run as its driver reports it: a bar on a terminal, else one log line per block."""

import io
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from onecomp.log import format_duration

logger = logging.getLogger(__name__)

TextStream = TextIO | io.TextIOBase


@dataclass(frozen=True, kw_only=True)
class BlockProgress:
    """One finished transformer block, as the driver reports it."""

    done: int
    """Finished blocks, reused ones included."""
    total: int
    output_error: float | None
    """Relative squared output error, mean over the block's layers; None if not measured."""
    calibrate_s: float
    quantize_s: float
    eta_s: float
    """Seconds to the end of the last block."""
    workers: int | None = None
    """Workers that the block was made by; None says nothing of them."""

    def __str__(self) -> str:
        line = (
            f"block {self.done:>3}/{self.total}  output_error {_error_text(self.output_error)}  "
            f"calibrate {self.calibrate_s:6.1f} s  quantize {self.quantize_s:6.1f} s  "
            f"eta {self.eta_s / 60:5.1f} min"
        )
        return line if self.workers is None else f"{line}  {_workers_text(self.workers)}"


class Progress:
    """Counts finished blocks and says when the rest will be done.

    Use as a context manager. On a terminal it draws a bar that vanishes at the end; elsewhere it
    logs each block at INFO. The pace is that of new blocks: its clock starts at construction, and
    anew with ``begin_work``.

    Args:
        total: Blocks of the model.
        reused: Blocks that an earlier run finished. They count as done, but not for the pace.
        stream: Where the bar goes if it is a terminal; None means standard error.
        clock: Seconds that only grow.
        silent: Report at DEBUG only.
    """

    def __init__(
        self,
        total: int,
        reused: int = 0,
        stream: TextStream | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        silent: bool = False,
    ) -> None:
        self.total, self.reused, self.done = total, reused, reused
        self._clock, self._work_s, self._since_s = clock, 0.0, clock()
        self._bar = _make_bar(sys.stderr if stream is None else stream, silent)
        self._level = logging.INFO if self._bar.disable and not silent else logging.DEBUG
        self._row = self._bar.add_task(
            "blocks", total=total, completed=reused, error=_error_text(None), eta="-", workers=""
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin_work(self) -> None:
        """New blocks are worked on from now on; what passed since the last one is not their time.

        Called when the shards have been carried through blocks that an earlier run finished.
        """
        self._since_s = self._clock()

    def finished_block(
        self,
        output_error: float | None,
        calibrate_s: float,
        quantize_s: float,
        workers: int | None = None,
    ) -> BlockProgress:
        """Report one more block and return what was reported.

        Args:
            output_error: Mean over the block's layers; None if not measured.
            calibrate_s: Seconds of forward passes and sums.
            quantize_s: Seconds of quantizing, per worker.
            workers: Workers at the end of the block; None leaves them out.
        """
        now_s = self._clock()
        self._work_s, self._since_s = self._work_s + now_s - self._since_s, now_s
        self.done += 1
        progress = BlockProgress(
            done=self.done,
            total=self.total,
            output_error=output_error,
            calibrate_s=calibrate_s,
            quantize_s=quantize_s,
            eta_s=self._eta_s(),
            workers=workers,
        )
        logger.log(self._level, "%s", progress)
        self._bar.update(
            self._row,
            completed=self.done,
            error=_error_text(output_error),
            eta=format_duration(progress.eta_s),
            workers="" if workers is None else _workers_text(workers),
        )
        return progress

    def _eta_s(self) -> float:
        return self._work_s / (self.done - self.reused) * (self.total - self.done)


def _make_bar(stream: TextStream, silent: bool) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("output_error {task.fields[error]}"),
        TextColumn("eta {task.fields[eta]}"),
        TextColumn("{task.fields[workers]}"),
        console=Console(file=cast(IO[str], stream)),
        transient=True,
        disable=silent or not stream.isatty(),
    )


def _workers_text(workers: int) -> str:
    return f"workers {workers}"


def _error_text(output_error: float | None) -> str:
    return f"{'-':>8}" if output_error is None else f"{output_error:.2e}"
