"""The one loop: block by block, observe the layers' inputs, quantize, go on.

The variants are strategies. ``FullPrecisionInputs`` calibrates every layer on what the original
model feeds it; ``ErrorPropagation`` on what the layers quantized so far produce; ``WeightsOnly``
serves methods that need no calibration.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from onecomp.calibration.shards import CalibrationShard
from onecomp.crew import Crew, Lap
from onecomp.errors import WorkerError
from onecomp.executor import Call, Executor, Ref
from onecomp.jobs import GroupReceipt, block_events
from onecomp.losses import Patience
from onecomp.models.layout import BlockLayout, InputGroup, ModelLayout
from onecomp.progress import Progress
from onecomp.schedule import (
    DIRECT_SENDERS,
    GroupPlan,
    are_added_on_the_way,
    few_rows,
    plan_groups,
)
from onecomp.watch import FinishedUnit, Unit
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


def _go_through(layout: ModelLayout, strategy: "Strategy", crew: Crew, progress: Progress) -> None:
    """Take every block from the first unfinished one on, a few of them in flight."""
    crew.export_outside()
    in_flight: deque[BlockInFlight] = deque()

    def collect_all_but(count: int) -> None:
        while len(in_flight) > count:
            collect(in_flight.popleft(), crew, progress)

    is_working = False
    for block in layout.blocks:
        if block.index in crew.finished:
            collect_all_but(0)
            crew.reuse(block)
            is_working = False
            continue
        if not is_working:
            crew.wait()  # until the shards are here: no replay counts in the pace of new blocks
            progress.begin_work()
            is_working = True
        if crew.must_settle():
            collect_all_but(0)
        crew.adjust()
        in_flight.append(finish(strategy.quantize_block(block, crew), crew))
        collect_all_but(strategy.blocks_in_flight)
    collect_all_but(0)
    crew.wait()


@dataclass
class BlockInFlight:
    """A block whose work was handed out; Refs to receipts and results, no values."""

    block: BlockLayout
    results: list[Ref] = field(default_factory=list)
    receipts: list[Ref] = field(default_factory=list)
    groups: list[InputGroup] = field(default_factory=list)
    stored: list[Ref] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def finish(block: BlockInFlight, crew: Crew) -> BlockInFlight:
    """Have the block written, by the workers in turn."""
    unit = Unit("store", block.block.index)
    parts = [*block.results, *block.receipts]
    block.stored = crew.anyone(unit, block.block.index, len(block.results), *parts).values
    return block


def collect(block: BlockInFlight, crew: Crew, progress: Progress) -> None:
    """Wait for a block, write its events and report it."""
    crew.wait()  # first: what failed here is the cause of what fails below
    receipts: list[GroupReceipt] = crew.watch.fetch(block.receipts)
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
    for group, receipt in zip(block.groups, receipts, strict=True):
        for fallback in receipt.fallbacks:
            logger.warning("%s: %s", group, fallback)
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


class Strategy(ABC):
    """In which order the groups of a block are observed and quantized."""

    blocks_in_flight: int
    """Blocks handed out before the driver waits for the oldest."""

    @abstractmethod
    def quantize_block(self, block: BlockLayout, crew: Crew) -> BlockInFlight:
        """Hand out all the work of one block."""


class FullPrecisionInputs(Strategy):
    """All groups from one forward pass of the original block; the next block need not wait."""

    blocks_in_flight = 1

    def quantize_block(self, block: BlockLayout, crew: Crew) -> BlockInFlight:
        """Observe all groups in one pass, then hand them to their owners."""
        work = BlockInFlight(block)
        crew.begin_block(block)
        contributions = observe(block.groups, crew)
        crew.finish_block(block)
        quantize(work, block.groups, contributions, crew)
        return work


class ErrorPropagation(Strategy):
    """Group after group: what lies behind a group is computed with its quantized weights.

    Quantization error propagation (Arai and Ichikawa, 2025, arXiv:2504.09629); with
    ``perccorr=0`` this is sequential quantization.
    """

    blocks_in_flight = 0

    def quantize_block(self, block: BlockLayout, crew: Crew) -> BlockInFlight:
        """Observe, quantize and apply one group after the other."""
        work = BlockInFlight(block)
        crew.begin_block(block)
        for group in block.groups:
            [results] = quantize(
                work, [group], [observe_group(group, len(block.groups), crew)], crew
            )
            unit = Unit("apply", block.index, group.index)
            crew.carry_everywhere(unit, group.index, results)
        crew.finish_block(block)
        return work


class WeightsOnly(Strategy):
    """Groups are quantized from their weights alone; no text is read."""

    blocks_in_flight = 2

    def quantize_block(self, block: BlockLayout, crew: Crew) -> BlockInFlight:
        """Hand all groups to their owners."""
        work = BlockInFlight(block)
        quantize(work, block.groups, [[] for _ in block.groups], crew)
        return work


def choose_strategy(settings: WorkerSettings) -> Strategy:
    """The strategy that the settings ask for."""
    if not settings.quantizer.flag_calibration:
        return WeightsOnly()
    return FullPrecisionInputs() if settings.qep is None else ErrorPropagation()


# Steps that strategies are made of


def observe(groups: Sequence[InputGroup], crew: Crew) -> list[list[Ref]]:
    """For each group, contributions to its sums from every worker with shards, from one pass."""
    if len(groups) <= 1:
        return [observe_group(group, len(groups), crew) for group in groups]
    indices = [group.index for group in groups]
    unit = Unit("observe", groups[0].block_index)
    senders = crew.with_shards
    few = [few_rows(group, len(groups), len(crew.members)) for group in groups]
    by_worker = [
        crew.carry(worker, unit, indices, few, num_returns=len(indices)) for worker in senders
    ]
    return [
        add_on_the_way(group, len(groups), dict(zip(senders, refs, strict=True)), crew)
        for group, refs in zip(groups, zip(*by_worker, strict=True), strict=True)
    ]


def observe_group(group: InputGroup, num_groups: int, crew: Crew) -> list[Ref]:
    """Contributions to the sums of one group."""
    unit = Unit("observe_group", group.block_index, group.index)
    few = few_rows(group, num_groups, len(crew.members))
    parts = {w: crew.carry(w, unit, group.index, few)[0] for w in crew.with_shards}
    return add_on_the_way(group, num_groups, parts, crew)


def add_on_the_way(
    group: InputGroup, num_groups: int, parts: Mapping[int, Ref], crew: Crew
) -> list[Ref]:
    """Contributions by worker as they reach the owner: of many large ones, neighbours' are added.

    Pair after pair, so that no worker receives more than a few matrices at each of log2(n) steps.
    """
    senders = [*parts.items()]
    if are_added_on_the_way(group, num_groups, len(senders)):
        unit = Unit("merge", group.block_index, group.index)
        while len(senders) > DIRECT_SENDERS:
            pairs = [senders[i : i + 2] for i in range(0, len(senders), 2)]
            senders = [
                (pair[0][0], crew.watch.call(pair[0][0], unit, *(ref for _, ref in pair)).values[0])
                if len(pair) > 1
                else pair[0]
                for pair in pairs
            ]
    return [ref for _, ref in senders]


def quantize(
    block: BlockInFlight,
    groups: Sequence[InputGroup],
    contributions: Sequence[list[Ref]],
    crew: Crew,
) -> list[Ref]:
    """Hand groups to their owners, and rows of the large ones to others as well; their results."""
    num_pieces = [crew.num_pieces(group) for group in groups]
    plans = plan_groups(groups, num_pieces, crew.speeds.of(crew.members), crew.load)
    prepared = [
        prepare(group, parts, plan, crew) if plan.is_split else None
        for group, parts, plan in zip(groups, contributions, plans, strict=True)
    ]
    new_results = []
    for group, parts, plan, made in zip(groups, contributions, plans, prepared, strict=True):
        if made is None:
            unit = Unit("quantize", group.block_index, group.index)
            call = crew.watch.call(plan.owner, unit, group, *parts, num_returns=2)
        else:
            call = solve_split(group, plan, made, crew)
        results, receipt = call.values
        block.groups.append(group)
        block.results.append(results)
        block.receipts.append(receipt)
        new_results.append(results)
    return new_results


def prepare(group: InputGroup, parts: Sequence[Ref], plan: GroupPlan, crew: Crew) -> list[Ref]:
    """Have a group's owner make what its pieces share; that, and numbers about it."""
    unit = Unit("prepare", group.block_index, group.index)
    return crew.watch.call(plan.owner, unit, group, *parts, num_returns=2).values


def solve_split(group: InputGroup, plan: GroupPlan, made: Sequence[Ref], crew: Crew) -> Call:
    """Have a group's rows solved by several workers and put together by its owner."""
    prepared, preparation = made
    unit = Unit("quantize_pieces", group.block_index, group.index)
    parts = [
        crew.watch.call(worker, unit, group, numbers, prepared).values[0]
        for worker, numbers in plan.pieces.items()
    ]
    unit = Unit("join", group.block_index, group.index)
    return crew.watch.call(plan.owner, unit, group, preparation, *parts, num_returns=2)
