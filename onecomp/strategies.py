"""How the groups of a block are observed and quantized, and in which order.

``FullPrecisionInputs`` calibrates every layer on what the original model feeds it;
``ErrorPropagation`` on what the layers quantized so far produce; ``WeightsOnly`` serves methods
that need no calibration. All of it is handed out in calls of workers; nothing here waits.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from onecomp.crew import Crew
from onecomp.executor import Call, Ref
from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.schedule import (
    ADDED_AT_ONCE,
    GroupCost,
    GroupPlan,
    are_added_on_the_way,
    blocks_in_flight,
    few_rows,
    plan_groups,
)
from onecomp.watch import Unit
from onecomp.worker import WorkerSettings

URGENT = {"merge": -2.0, "store": -2.0, "join": -2.0, "prepare": -1.0}
"""What takes little and many wait for comes first, then what begins a long chain."""


@dataclass(frozen=True)
class SolvedGroup:
    """A group that was handed out to be solved."""

    group: InputGroup
    results: Ref
    receipt: Ref


@dataclass
class BlockInFlight:
    """A block that was begun; Refs to receipts and results, no values."""

    block: BlockLayout
    solved: list[SolvedGroup] = field(default_factory=list)
    stored: list[Ref] = field(default_factory=list)
    """Empty until it is handed out to be written."""
    is_stored: bool = False
    """Whether it was written, or failed to be."""
    started: float = field(default_factory=time.monotonic)

    def store(self, crew: Crew, worker: int) -> Call:
        """Have the block written."""
        self.solved.sort(key=lambda solved: solved.group.index)
        parts = [*(s.results for s in self.solved), *(s.receipt for s in self.solved)]
        unit = Unit("store", self.block.index)
        call = crew.watch.call(worker, unit, self.block.index, len(self.solved), *parts)
        self.stored = call.values
        crew.later.add(self.stored, self._note_stored)
        return call

    def _note_stored(self) -> None:
        self.is_stored = True

    def store_when_solved(self, crew: Crew) -> None:
        """Have the block written as soon as all its groups are solved."""
        if len(self.solved) == len(self.block.groups):
            store = partial(crew.dispatch.add, (URGENT["store"],), 0.0, partial(self.store, crew))
            crew.later.add([s.receipt for s in self.solved], store)


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
        block = work.block
        crew.begin_block(block)
        observed = observe(block.groups, crew)
        crew.finish_block(block)

        def gather() -> None:
            for group, parts in zip(block.groups, observed, strict=True):
                GroupOnTheWay(group, work, crew).gather(parts)

        crew.later.add([part.receipt for part in observed[0].values()] if observed else [], gather)
        work.store_when_solved(crew)  # at once where it has no groups
        meanwhile()


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
        crew.finish_block(block)


class WeightsOnly(Strategy):
    """Groups are quantized from their weights alone; no text is read."""

    def most_in_flight(self, block: BlockLayout, crew: Crew) -> int:
        """Enough that everyone is busy."""
        return blocks_in_flight(crew.costs(block.groups), len(crew.members))

    def begin(self, work: BlockInFlight, crew: Crew, meanwhile: Callable[[], None]) -> None:
        """Hand all groups to their owners."""
        for group in work.block.groups:
            GroupOnTheWay(group, work, crew).quantize([])
        work.store_when_solved(crew)
        meanwhile()


def choose_strategy(settings: WorkerSettings) -> Strategy:
    """The strategy that the settings ask for."""
    if not settings.quantizer.flag_calibration:
        return WeightsOnly()
    return FullPrecisionInputs() if settings.qep is None else ErrorPropagation()


# Steps that strategies are made of


class Part(NamedTuple):
    """What a worker contributes to the sums of a group."""

    sums: Ref
    receipt: Ref
    """Of the call that makes it: fewer to wait for than the sums of all groups."""


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


# A group at once, where nobody has anything else to do


def add_on_the_way(
    group: InputGroup, num_groups: int, parts: Mapping[int, Part], crew: Crew
) -> list[Ref]:
    """Contributions by worker as they reach the owner: of many large ones, neighbours' are added.

    A few at a time, so that no worker receives more than a few matrices at each of log2(n) steps.
    """
    while are_added_on_the_way(group, num_groups, len(parts)):
        parts = dict(merge(group, few, crew) for few in neighbours(parts))
    return [part.sums for part in parts.values()]


def neighbours(parts: Mapping[int, Part]) -> list[dict[int, Part]]:
    """Contributions of a few workers each, as they are added up together."""
    items = [*parts.items()]
    return [dict(items[i : i + ADDED_AT_ONCE]) for i in range(0, len(items), ADDED_AT_ONCE)]


def merge(group: InputGroup, parts: Mapping[int, Part], crew: Crew) -> tuple[int, Part]:
    """Have the first of some workers add up their contributions; the worker and the sum."""
    worker = next(iter(parts))
    if len(parts) == 1:
        return worker, parts[worker]
    unit = Unit("merge", group.block_index, group.index)
    call = crew.watch.call(worker, unit, *(part.sums for part in parts.values()))
    return worker, Part(call.values[0], call.receipt)


def quantize(
    groups: Sequence[InputGroup], contributions: Sequence[list[Ref]], crew: Crew
) -> list[SolvedGroup]:
    """Hand groups to their owners, and rows of the large ones to others as well."""
    plans = plan_groups(crew.costs(groups), crew.speeds.of(crew.members))
    prepared = [
        prepare(group, parts, plan.owner, crew) if plan.is_split else None
        for group, parts, plan in zip(groups, contributions, plans, strict=True)
    ]
    solved = []
    for group, parts, plan, made in zip(groups, contributions, plans, prepared, strict=True):
        if made is None:
            unit = Unit("quantize", group.block_index, group.index)
            call = crew.watch.call(plan.owner, unit, group, *parts, num_returns=2)
        else:
            call = solve_split(group, plan, made.values, crew)
        solved.append(SolvedGroup(group, *call.values))
    return solved


def prepare(group: InputGroup, parts: Sequence[Ref], owner: int, crew: Crew) -> Call:
    """Have a group's owner make what its pieces share; that, and numbers about it."""
    unit = Unit("prepare", group.block_index, group.index)
    return crew.watch.call(owner, unit, group, *parts, num_returns=2)


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


# A group step by step, while workers have other things to do


@dataclass(frozen=True)
class GroupOnTheWay:
    """A group from its sums to its results: each step goes to who has least to do by then."""

    group: InputGroup
    work: BlockInFlight
    crew: Crew

    def gather(self, parts: Mapping[int, Part]) -> None:
        """Have contributions that are there added up, neighbours' first, and go on."""
        num_groups = len(self.work.block.groups)
        if not are_added_on_the_way(self.group, num_groups, len(parts)):
            self.quantize([part.sums for part in parts.values()])
            return
        together = neighbours(parts)
        merged: dict[int, Part] = {}

        def note(number: int, part: Part) -> None:
            merged[number] = part
            if len(merged) == len(together):
                self.gather(dict(sorted(merged.items())))

        def note_call(number: int, call: Call) -> None:
            part = Part(call.values[0], call.receipt)
            self.crew.later.add([call.receipt], partial(note, number, part))

        for number, few in enumerate(together):
            if len(few) == 1:
                note(number, *few.values())
            else:
                sums = [part.sums for part in few.values()]
                self._give("merge", 0.0, partial(note_call, number), *sums)

    def quantize(self, parts: Sequence[Ref]) -> None:
        """Have it quantized by one worker, or prepared if it is split."""
        [cost] = self.crew.costs([self.group])
        if len(cost.pieces) == 1:
            self._give("quantize", cost.longest, self._note_solved, *parts, num_returns=2)
        else:
            solve = partial(self._solve, cost)
            self._give("prepare", cost.longest, solve, *parts, num_returns=2)

    def _solve(self, cost: GroupCost, made: Call) -> None:
        """Have the pieces solved, and put together when all are there."""
        prepared, preparation = made.values
        solved: list[Call] = []

        def note(piece: Call) -> None:
            solved.append(piece)
            if len(solved) == len(cost.pieces):
                parts = preparation, *(call.values[0] for call in solved)
                join = partial(self._give, "join", 0.0, self._note_solved, *parts, num_returns=2)
                self.crew.later.add([call.receipt for call in solved], join)

        def solve() -> None:
            for number, piece in enumerate(cost.pieces):
                self._give("quantize_pieces", piece, note, [number], prepared)

        self.crew.later.add([made.receipt], solve)

    def _give(
        self,
        method: str,
        cost: float,
        then: Callable[[Call], None],
        *arguments: object,
        num_returns: int = 1,
    ) -> None:
        """Have a method called of whoever has least to do: oldest block first, then longest."""
        unit = Unit(method, self.group.block_index, self.group.index)

        def hand_out(worker: int) -> Call:
            of_group = () if method == "merge" else (self.group,)
            call = self.crew.watch.call(
                worker, unit, *of_group, *arguments, num_returns=num_returns
            )
            then(call)
            return call

        block = self.group.block_index
        urgency = URGENT.get(method, 0.0), float(block), -cost
        self.crew.dispatch.add(urgency, cost, hand_out)

    def _note_solved(self, call: Call) -> None:
        self.work.solved.append(SolvedGroup(self.group, *call.values))
        self.work.store_when_solved(self.crew)
