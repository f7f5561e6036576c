"""The one loop: block by block, observe the layers' inputs, quantize, go on.

How a block is worked on is a ``Strategy``; here is what all of them share.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict

from onecomp.calibration.shards import CalibrationShard
from onecomp.crew import Crew, Lap
from onecomp.errors import WorkerError
from onecomp.executor import Executor
from onecomp.in_flight import BlockInFlight
from onecomp.jobs import GroupReceipt, block_events
from onecomp.losses import Patience
from onecomp.models.layout import BlockLayout, ModelLayout
from onecomp.progress import Progress
from onecomp.strategies import Strategy, choose_strategy
from onecomp.watch import FinishedUnit
from onecomp.worker import WorkerSettings

logger = logging.getLogger(__name__)


def quantize_model(
    settings: WorkerSettings,
    shards: Sequence[CalibrationShard],
    executor: Executor,
    progress: Progress,
    patience: Patience | None = None,
) -> None:
    """Quantize every block that the run directory does not hold yet.

    Args:
        settings: Model, method and run directory.
        shards: The calibration samples, cut; empty for methods that need none.
        executor: Where the work runs; started and stopped by the caller.
        progress: Told of every finished block.
        patience: When to give up on lost or hanging workers.

    Raises:
        GaveUpError: Workers were lost again and again; ``resume`` goes on from there.
    """
    crew = Crew(executor, settings, shards, patience or Patience())
    strategy = choose_strategy(settings)
    loss: WorkerError | None = None
    while True:
        try:
            if loss is not None:
                crew.recover(loss)
            _go_through(settings.layout, strategy, crew, progress)
        except WorkerError as error:
            if not executor.survives_losses:
                raise
            loss = error
        else:
            return


def _go_through(layout: ModelLayout, strategy: Strategy, crew: Crew, progress: Progress) -> None:
    """Take every block from the first unfinished one on, a few of them on their way."""
    crew.export_outside()
    on_the_way = BlocksOnTheWay(strategy, crew, progress)
    is_working = False
    for block in layout.blocks:
        if block.index in crew.finished:
            on_the_way.finish_all()
            crew.reuse(block)
            is_working = False
            continue
        if not is_working:
            crew.wait()  # until the shards are here: no replay counts in the pace of new blocks
            progress.begin_work()
            is_working = True
        if crew.must_settle():
            on_the_way.finish_all()
        crew.adjust()
        on_the_way.add(block)
    on_the_way.finish_all()
    crew.wait()


class BlocksOnTheWay:
    """Blocks that were begun, in their order.

    Args:
        strategy: How a block is worked on.
        crew: The workers.
        progress: Told of every finished block.
    """

    def __init__(self, strategy: Strategy, crew: Crew, progress: Progress):
        self._strategy, self._crew, self._progress = strategy, crew, progress
        self._blocks: deque[BlockInFlight] = deque()

    def add(self, block: BlockLayout) -> None:
        """Begin a block, and wait for the oldest if there are too many."""
        work = BlockInFlight(block)
        self._strategy.begin(work, self._crew, self._store_solved)
        self._blocks.append(work)
        self._collect_all_but(self._strategy.most_in_flight(block, self._crew))

    def finish_all(self) -> None:
        """Wait until nothing is on its way."""
        self._store_solved()
        self._collect_all_but(0)

    def _store_solved(self) -> None:
        """Have blocks written that waited for a worker with nothing else to do."""
        for work in self._blocks:
            if work.awaits_idle_worker:
                work.store(self._crew, self._crew.next_in_turn())

    def _collect_all_but(self, count: int) -> None:
        while len(self._blocks) > count:
            while not self._blocks[0].is_stored:
                self._crew.later.wait()
            collect(self._blocks.popleft(), self._crew, self._progress)


def collect(block: BlockInFlight, crew: Crew, progress: Progress) -> None:
    """Note what a block that was written has in its journal, and report it."""
    receipts: list[GroupReceipt] = crew.watch.fetch([s.receipt for s in block.solved])
    crew.watch.fetch(block.stored)
    crew.run.require_lease()
    units = crew.accept(block.block.index)
    lap = crew.lap(block.started)
    write_units(units, crew)
    *groups, whole = block_events(block.block.index, receipts)
    for event in groups:
        crew.run.append(**event)
    crew.run.append(**whole, seconds=lap.seconds, driver_seconds=lap.driver_seconds)
    crew.run.flush()
    for solved, receipt in zip(block.solved, receipts, strict=True):
        for fallback in receipt.fallbacks:
            logger.warning("%s: %s", solved.group, fallback)
    quantize_s = sum(receipt.seconds for receipt in receipts) / len(crew.members)
    progress.finished_block(
        whole["output_error"],
        max(0.0, lap.seconds - quantize_s),
        quantize_s,
        len(crew.members),
    )
    meter(receipts, units, lap, crew)


def write_units(units: Sequence[FinishedUnit], crew: Crew) -> None:
    """One event for each worker, so that a timeline can be drawn."""
    by_worker: dict[int, list[dict]] = defaultdict(list)
    for done in units:
        by_worker[done.worker].append(
            asdict(done.unit)
            | {"start": round(done.receipt.started, 3), "seconds": round(done.receipt.seconds, 4)}
        )
    for worker, rows in by_worker.items():
        crew.run.append("units", worker=worker, units=rows)


def meter(
    receipts: Sequence[GroupReceipt], units: Sequence[FinishedUnit], lap: Lap, crew: Crew
) -> None:
    """Add a block to the cluster's metrics."""
    run = crew.run.path.name
    for done in units:
        tags = {"worker": str(done.worker), "method": done.unit.method, "run": run}
        crew.executor.meter("onecomp_units_done", 1, **tags)
        crew.executor.meter("onecomp_seconds_busy", done.receipt.seconds, **tags)
    waiting = len(crew.members) * lap.seconds - sum(done.receipt.seconds for done in units)
    crew.executor.meter("onecomp_seconds_waiting", max(0.0, waiting), run=run)
    crew.executor.meter("onecomp_bytes_moved", sum(r.received_bytes for r in receipts), run=run)
    crew.executor.meter("onecomp_fallbacks", sum(len(r.fallbacks) for r in receipts), run=run)
    crew.executor.meter("onecomp_blocks_done", 1, run=run)
    crew.executor.meter("onecomp_workers", len(crew.members), run=run)
