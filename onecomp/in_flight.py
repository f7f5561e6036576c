"""What was handed out of a block: Refs to sums, results and receipts, no values."""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from onecomp.crew import Crew
from onecomp.executor import Call, Ref
from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.schedule import GroupCost
from onecomp.watch import Unit

URGENT = {"merge": -2.0, "store": -2.0, "join": -2.0, "prepare": -1.0}
"""What takes little and many wait for comes first, then what begins a long chain."""


class Part(NamedTuple):
    """What a worker contributes to the sums of a group."""

    sums: Ref
    receipt: Ref
    """Of the call that makes it: fewer to wait for than the sums of all groups."""


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
    costs: list[GroupCost] = field(default_factory=list)
    """Of its groups in their order, where all are quantized at the same time."""
    solved: list[SolvedGroup] = field(default_factory=list)
    awaits_idle_worker: bool = False
    """All its groups are handed out, and it may be written whenever a worker has nothing to do."""
    stored: list[Ref] = field(default_factory=list)
    """Empty until it is handed out to be written."""
    is_handed_to_store: bool = False
    """It is to be written as soon as all its groups are solved."""
    is_stored: bool = False
    """Whether it was written, or failed to be."""
    started: float = field(default_factory=time.monotonic)

    def store(self, crew: Crew, worker: int) -> Call:
        """Have the block written."""
        self.awaits_idle_worker = False
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
        """Have the block written as soon as all groups are solved, if all are handed out."""
        if len(self.solved) == len(self.block.groups) and not self.is_handed_to_store:
            self.is_handed_to_store = True
            store = partial(crew.dispatch.add, (URGENT["store"],), partial(self.store, crew))
            crew.later.add([s.receipt for s in self.solved], store)
