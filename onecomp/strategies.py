"""In which order the groups of a block are observed and quantized.

``FullPrecisionInputs`` calibrates every layer on what the original model feeds it;
``ErrorPropagation`` on what the layers quantized so far produce; ``WeightsOnly`` serves methods
that need no calibration. All of it is handed out in calls of workers; nothing here waits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from onecomp.crew import Crew
from onecomp.in_flight import BlockInFlight, Part
from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.schedule import blocks_in_flight, few_rows
from onecomp.solving import GroupOnTheWay, add_on_the_way, quantize
from onecomp.watch import Unit
from onecomp.worker import WorkerSettings


class Strategy(ABC):
    """In which order the groups of a block are observed and quantized."""

    @abstractmethod
    def most_in_flight(self, block: BlockLayout, crew: Crew) -> int:
        """How many blocks are begun before the driver waits for the oldest."""

    @abstractmethod
    def begin(self, work: BlockInFlight, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """Hand out a block, now or when what it needs is there.

        Args:
            work: The block.
            crew: The workers.
            meanwhile: Hands out what can be done while some workers have nothing to do.
        """


class FullPrecisionInputs(Strategy):
    """All groups from one forward pass of the original block; passes do not wait for solvers."""

    def most_in_flight(self, block: BlockLayout, crew: Crew) -> int:
        """As many as keep everyone busy while the longest chain of a block is worked on."""
        return blocks_in_flight(crew.costs(block.groups), len(crew.members))

    def begin(self, work: BlockInFlight, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """One pass to the end of the block; groups as their sums arrive."""
        del meanwhile
        block = work.block
        work.costs = crew.costs(block.groups)
        crew.begin_block(block)
        observed = observe(block.groups, crew)
        crew.finish_block(block)

        receipts = [part.receipt for part in observed[0].values()] if observed else []

        def gather() -> None:
            crew.watch.fetch(receipts)  # raises what a pass has raised
            for group, parts in zip(block.groups, observed, strict=True):
                GroupOnTheWay(group, work, crew).gather(parts)

        crew.later.add(receipts, gather)
        work.store_when_solved(crew)  # at once where it has no groups


class ErrorPropagation(Strategy):
    """Stage after stage: what lies behind a group is computed with its quantized weights.

    Quantization error propagation (Arai and Ichikawa, 2025, arXiv:2504.09629); with
    ``perccorr=0`` this is sequential quantization.
    """

    def most_in_flight(self, block: BlockLayout, crew: Crew) -> int:
        """A block waits for the one before it, but not for its files."""
        del block, crew
        return 1

    def begin(self, work: BlockInFlight, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """Observe, quantize and apply what does not depend on each other, then what does."""
        block = work.block
        crew.begin_block(block)
        for stage in crew.stages(block):
            indices = [group.index for group in stage]
            is_next = indices == [len(work.solved)]  # all before it are applied
            method = "observe" if is_next else "observe_ahead"
            observed = observe(stage, crew, method)
            sums = [
                add_on_the_way(group, len(stage), parts, crew)
                for group, parts in zip(stage, observed, strict=True)
            ]
            solved = quantize(stage, sums, crew)
            meanwhile()
            work.solved += solved
            unit = Unit("apply", block.index, indices[0])
            crew.carry_everywhere(unit, indices, *(group.results for group in solved))
        meanwhile()  # a block without groups keeps nobody busy
        crew.finish_block(block)
        work.awaits_idle_worker = True


class WeightsOnly(Strategy):
    """Groups are quantized from their weights alone; no text is read."""

    def most_in_flight(self, block: BlockLayout, crew: Crew) -> int:
        """Enough that everyone is busy."""
        return blocks_in_flight(crew.costs(block.groups), len(crew.members))

    def begin(self, work: BlockInFlight, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """Hand all groups to their owners."""
        del meanwhile
        work.costs = crew.costs(work.block.groups)
        for group in work.block.groups:
            GroupOnTheWay(group, work, crew).quantize([])
        work.store_when_solved(crew)


def choose_strategy(settings: WorkerSettings) -> Strategy:
    """The strategy that the settings ask for."""
    if not settings.quantizer.flag_calibration:
        return WeightsOnly()
    return FullPrecisionInputs() if settings.qep is None else ErrorPropagation()


# Steps that strategies are made of


ONE_GROUP = {"observe": "observe_group", "observe_ahead": "observe_group_ahead"}


def observe(
    groups: Sequence[InputGroup], crew: Crew, method: str = "observe"
) -> list[dict[int, Part]]:
    """For each group, contributions to its sums by worker with shards, from one pass.

    Args:
        groups: Those of a block that are quantized at the same time.
        crew: The workers.
        method: ``observe``, or ``observe_ahead`` for a pass that is thrown away.
    """
    if not groups:
        return []
    block = groups[0].block_index
    few = [few_rows(group, len(groups), len(crew.members)) for group in groups]
    if len(groups) == 1:
        unit = Unit(ONE_GROUP[method], block, groups[0].index)
        arguments: list[object] = [groups[0].index, few[0]]
    else:
        unit, arguments = Unit(method, block), [[group.index for group in groups], few]
    by_worker = {
        worker: crew.carry(worker, unit, *arguments, num_returns=len(groups))
        for worker in crew.with_shards
    }
    return [
        {worker: Part(call.values[i], call.receipt) for worker, call in by_worker.items()}
        for i, _ in enumerate(groups)
    ]
