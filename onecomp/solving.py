"""Handing out the groups of a block whose inputs were observed, up to their results.

``quantize`` hands out everything at once, where nobody has anything else to do;
``GroupOnTheWay`` goes step by step, while workers have other things to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from onecomp.crew import Crew
from onecomp.executor import Call, Ref
from onecomp.in_flight import URGENT, BlockInFlight, Part, SolvedGroup
from onecomp.models.layout import InputGroup
from onecomp.schedule import (
    ADDED_AT_ONCE,
    GroupCost,
    GroupPlan,
    are_added_on_the_way,
    plan_groups,
)
from onecomp.watch import Unit

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
    """A group from its sums to its results: each step goes to who has nothing to do by then."""

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
        cost = self.work.costs[self.group.index]
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
        """Have a method called of whoever has nothing to do: oldest block first, then longest."""
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
        self.crew.dispatch.add(urgency, hand_out)

    def _note_solved(self, call: Call) -> None:
        self.work.solved.append(SolvedGroup(self.group, *call.values))
        self.work.store_when_solved(self.crew)
