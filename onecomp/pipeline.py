"""The one loop: block by block, observe the layers' inputs, quantize, go on.

The variants are strategies. ``FullPrecisionInputs`` calibrates every layer on what the original
model feeds it; ``ErrorPropagation`` on what the layers quantized so far produce; ``WeightsOnly``
serves methods that need no calibration.
"""

import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from onecomp.calibration.shards import CalibrationShard
from onecomp.executor import Executor, Ref
from onecomp.jobs import GroupReceipt
from onecomp.models.layout import BlockLayout, InputGroup, ModelLayout
from onecomp.plan import assign_owners, assign_shards
from onecomp.progress import Progress
from onecomp.worker import Worker, WorkerSettings

logger = logging.getLogger(__name__)


def quantize_model(
    settings: WorkerSettings,
    shards: Sequence[CalibrationShard],
    executor: Executor,
    progress: Progress,
) -> None:
    """Quantize every block that the run directory does not hold yet.

    Args:
        settings: Model, method and run directory.
        shards: The calibration samples, cut; empty for methods that need none.
        executor: Where the work runs; started and stopped by the caller.
        progress: Told of every finished block.
    """
    crew = Crew(executor, settings, shards)
    strategy = choose_strategy(settings)
    crew.export_outside(settings.layout)
    blocks = settings.layout.blocks
    unfinished = {block.index for block in blocks if not settings.run.has_block(block.index)}
    for is_new, stretch in itertools.groupby(blocks, lambda block: block.index in unfinished):
        if is_new:
            crew.wait()  # until the shards are here: no replay counts in the pace of new blocks
            progress.begin_work()
            _quantize_blocks(stretch, strategy, crew, progress)
        else:
            for block in stretch:
                crew.reuse(block, is_passed=any(index > block.index for index in unfinished))
    crew.wait()


def _quantize_blocks(
    blocks: Iterable[BlockLayout], strategy: "Strategy", crew: "Crew", progress: Progress
) -> None:
    """Quantize neighbouring blocks, a few of them in flight; all are collected at the end."""
    in_flight: list[BlockInFlight] = []
    for block in blocks:
        in_flight.append(crew.finish(strategy.quantize_block(block, crew)))
        if len(in_flight) > strategy.blocks_in_flight:
            crew.collect(in_flight.pop(0), progress)
    for block_in_flight in in_flight:
        crew.collect(block_in_flight, progress)


@dataclass
class BlockInFlight:
    """A block whose work was handed out; Refs to receipts and results, no values."""

    block: BlockLayout
    results: list[Ref] = field(default_factory=list)
    receipts: list[Ref] = field(default_factory=list)
    groups: list[InputGroup] = field(default_factory=list)
    stored: list[Ref] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class Crew:
    """The workers of one run, which shards each holds and which groups each owns."""

    def __init__(
        self, executor: Executor, settings: WorkerSettings, shards: Sequence[CalibrationShard]
    ):
        self.executor, self.run = executor, settings.run
        self._pending: list[Ref] = []
        self._turn = itertools.cycle(range(executor.num_workers))
        executor.start(Worker, settings)
        holders = assign_shards(len(shards), executor.num_workers)
        self._with_shards = [n for n, held in enumerate(holders) if len(held)]
        for number in self._with_shards:
            held = [shards[i] for i in holders[number]]
            self._pending += executor.submit(number, "hold", *held)
        self._last_collected = time.monotonic()

    def everywhere(self, method: str, *arguments: object) -> None:
        """Call a method of every worker that holds shards."""
        for number in self._with_shards:
            self._pending += self.executor.submit(number, method, *arguments)

    def export_outside(self, layout: ModelLayout) -> None:
        """Have everything written that no quantized layer belongs to."""
        self._anyone("export_outer")
        for index in range(len(layout.blocks), layout.num_blocks):
            self._anyone("export", index)

    def reuse(self, block: BlockLayout, *, is_passed: bool) -> None:
        """Take a block as an earlier run finished it.

        Args:
            block: The block.
            is_passed: Whether blocks behind it need the shards carried through it.
        """
        if is_passed:
            self.everywhere("replay_block", block.index)
        self._anyone("export", block.index)

    def _anyone(self, method: str, *arguments: object) -> None:
        number = next(self._turn)
        self._pending += self.executor.submit(number, method, *arguments)

    def observe(self, groups: Sequence[InputGroup]) -> list[list[Ref]]:
        """For each group, every worker's contributions to its sums, from one pass."""
        if len(groups) <= 1:
            return [self.observe_group(group) for group in groups]
        indices = [group.index for group in groups]
        by_worker = [
            self.executor.submit(number, "observe", indices, num_returns=len(indices))
            for number in self._with_shards
        ]
        return [list(refs) for refs in zip(*by_worker, strict=True)]

    def observe_group(self, group: InputGroup) -> list[Ref]:
        """Every worker's contributions to the sums of one group."""
        return [
            ref
            for number in self._with_shards
            for ref in self.executor.submit(number, "observe_group", group.index)
        ]

    def quantize(
        self, block: BlockInFlight, groups: Sequence[InputGroup], contributions: Sequence[list[Ref]]
    ) -> list[Ref]:
        """Hand each group to its owner; Refs to the results."""
        owners = assign_owners(block.block.groups, self.executor.num_workers)
        new_results = []
        for group, parts in zip(groups, contributions, strict=True):
            results, receipt = self.executor.submit(
                owners[group.index], "quantize", group, *parts, num_returns=2
            )
            block.groups.append(group)
            block.results.append(results)
            block.receipts.append(receipt)
            new_results.append(results)
        return new_results

    def finish(self, block: BlockInFlight) -> BlockInFlight:
        """Have the block written, by the workers in turn."""
        number = next(self._turn)
        block.stored = self.executor.submit(number, "store", block.block.index, *block.results)
        return block

    def collect(self, block: BlockInFlight, progress: Progress) -> None:
        """Wait for a block, write its events and report it."""
        self.wait()  # first: what failed here is the cause of what fails below
        receipts: list[GroupReceipt] = self.executor.fetch(block.receipts)
        self.executor.fetch(block.stored)
        for group, receipt in zip(block.groups, receipts, strict=True):
            self.run.append("group", block=block.block.index, group=group.index, **asdict(receipt))
            for fallback in receipt.fallbacks:
                logger.warning("%s: %s", group, fallback)
        seconds = time.monotonic() - max(block.started, self._last_collected)
        self._last_collected = time.monotonic()
        quantize_s = sum(receipt.seconds for receipt in receipts) / self.executor.num_workers
        error = mean_output_error(receipts)
        self.run.append(
            "block",
            block=block.block.index,
            seconds=seconds,
            output_error=error,
            bytes_moved=sum(receipt.received_bytes for receipt in receipts),
        )
        progress.finished_block(error, max(0.0, seconds - quantize_s), quantize_s)

    def wait(self) -> None:
        """Wait for every call made so far; raises what any of them raised."""
        self.executor.fetch(self._pending)
        self._pending.clear()


def mean_output_error(receipts: Sequence[GroupReceipt]) -> float | None:
    """Mean relative squared output error over layers that have one."""
    errors = [
        numbers["relative_output_squared_error"]
        for receipt in receipts
        for numbers in receipt.layers.values()
        if "relative_output_squared_error" in numbers
    ]
    return sum(errors) / len(errors) if errors else None


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
        crew.everywhere("begin_block", block.index)
        contributions = crew.observe(block.groups)
        crew.everywhere("finish_block")
        crew.quantize(work, block.groups, contributions)
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
        crew.everywhere("begin_block", block.index)
        for group in block.groups:
            [results] = crew.quantize(work, [group], [crew.observe_group(group)])
            crew.everywhere("apply", group.index, results)
        crew.everywhere("finish_block")
        return work


class WeightsOnly(Strategy):
    """Groups are quantized from their weights alone; no text is read."""

    blocks_in_flight = 2

    def quantize_block(self, block: BlockLayout, crew: Crew) -> BlockInFlight:
        """Hand all groups to their owners."""
        work = BlockInFlight(block)
        crew.quantize(work, block.groups, [[] for _ in block.groups])
        return work


def choose_strategy(settings: WorkerSettings) -> Strategy:
    """The strategy that the settings ask for."""
    if not settings.quantizer.flag_calibration:
        return WeightsOnly()
    return FullPrecisionInputs() if settings.qep is None else ErrorPropagation()
