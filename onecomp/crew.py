"""The workers of one run: who holds which shards, who comes and goes, and what a loss takes."""

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from onecomp.calibration.shards import CalibrationShard
from onecomp.dispatch import Dispatch
from onecomp.errors import WorkerError
from onecomp.executor import Call, Executor, Ref
from onecomp.jobs import group_cost
from onecomp.later import Later
from onecomp.losses import Losses, Patience
from onecomp.models.layout import BlockLayout, InputGroup
from onecomp.schedule import (
    GroupCost,
    are_worth_observing_ahead,
    assign_shards,
    balance,
    forward_cost,
    share_out,
    split_largest,
)
from onecomp.speeds import MeasuredSpeeds
from onecomp.store import RunDirectory
from onecomp.watch import FinishedUnit, Unit, Watch
from onecomp.worker import Worker, WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lap:
    """Time from one block's end to the next one's."""

    seconds: float
    driver_seconds: float
    """Of these, seconds in which the driver did not wait for workers."""


class Crew:
    """The workers, the shards that each holds, and where these are.

    Args:
        executor: Where the workers live.
        settings: What every worker has to know.
        shards: All calibration shards.
        patience: When to give up.
    """

    def __init__(
        self,
        executor: Executor,
        settings: WorkerSettings,
        shards: Sequence[CalibrationShard],
        patience: Patience,
    ):
        self.executor, self.settings = executor, settings
        self.run: RunDirectory = settings.run
        self.watch = Watch(executor, patience.unit_timeout_s)
        self.later = Later(self.watch)
        self.speeds = MeasuredSpeeds()
        self._shards = {shard.index: shard for shard in shards}
        self._tokens = {s.index: int(s.attention_mask.sum()) for s in shards}
        self._blocks = settings.layout.blocks
        self.finished = {b.index for b in self._blocks if self.run.has_block(b.index)}
        """Blocks whose results are stored, as far as the driver knows."""
        self._pending: list[Ref] = []
        self._costs: dict[InputGroup, GroupCost] = {}
        self._last: dict[int, Ref] = {}
        self._losses = Losses(executor, patience, str(self.run.path))
        self._leaving: set[int] = set()
        self._position = 0
        """Block in front of which the shards are when all calls are done."""
        self._turn = itertools.count()
        self._lap_ended, self._lap_waited_s = time.monotonic(), 0.0
        executor.start(Worker, settings)
        self.members = list(executor.workers)
        self.dispatch = Dispatch(self.watch, self.later, self._speeds_of_staying)
        self.held: dict[int, list[int]] = {worker: [] for worker in self.members}
        self._note_workers("joined", self.members)
        even = dict.fromkeys(self.members, 1.0)
        for worker, run in assign_shards(len(shards), even).items():
            self._hold(worker, run)

    def _speeds_of_staying(self) -> dict[int, float]:
        """Of workers that may be given something that takes long."""
        leaving = self._leaving | self.watch.leaving
        return self.speeds.of([w for w in self.members if w not in leaving] or self.members)

    # Calls

    @property
    def with_shards(self) -> list[int]:
        """Workers that hold shards."""
        return [worker for worker in self.members if self.held[worker]]

    @property
    def first_unfinished(self) -> int:
        """The first block that is not finished, or the number of blocks."""
        unfinished = (b.index for b in self._blocks if b.index not in self.finished)
        return next(unfinished, len(self._blocks))

    def carry(self, worker: int, unit: Unit, *arguments: object, num_returns: int = 1) -> Call:
        """Call a method that moves the worker's shards: it runs only if the one before it did."""
        after = self._last.get(worker)
        call = self.watch.call(worker, unit, *arguments, num_returns=num_returns, after=after)
        self._last[worker] = call.receipt
        return call

    def carry_everywhere(self, unit: Unit, *arguments: object) -> None:
        """``carry`` with every worker that holds shards; failures show when the driver waits."""
        for worker in self.with_shards:
            self._pending += self.carry(worker, unit, *arguments).values

    def anyone(self, unit: Unit, *arguments: object) -> Call:
        """Call a method of the worker whose turn it is."""
        return self.watch.call(self.next_in_turn(), unit, *arguments)

    def next_in_turn(self) -> int:
        """One worker after the other."""
        return self.members[next(self._turn) % len(self.members)]

    def do_later(self, unit: Unit, *arguments: object) -> None:
        """Have any worker do it; failures show when the driver waits."""
        self._pending += self.anyone(unit, *arguments).values

    def wait(self) -> None:
        """Wait for all calls whose values nobody asked for; raises what any of them raised."""
        self.watch.fetch(self._pending)
        self._pending.clear()

    # Blocks

    def costs(self, groups: Sequence[InputGroup]) -> list[GroupCost]:
        """What groups take that are quantized at the same time; in pieces where that helps."""
        return split_largest([self._cost(group) for group in groups], len(self.members))

    def _cost(self, group: InputGroup) -> GroupCost:
        if group not in self._costs:
            quantizer, qep = self.settings.quantizer, self.settings.qep
            self._costs[group] = group_cost(quantizer, group, qep, self._device_type)
        return self._costs[group]

    def stages(self, block: BlockLayout) -> Sequence[Sequence[InputGroup]]:
        """The block's groups in the order of work; those of one stage are quantized at once.

        They are the layout's stages where more workers than one have something of them, else each
        group is a stage, in the order of the calls.
        """
        products = 2 * sum(self._tokens.values()) * sum(g.num_weights for g in block.groups)
        pass_cost = forward_cost(products, self._device_type)
        costs = [self.costs(stage) for stage in block.stages]
        if are_worth_observing_ahead(costs, pass_cost, len(self.members)):
            return block.stages
        return [[group] for group in block.groups]

    @cached_property
    def _device_type(self) -> str:
        [device_type] = self.watch.fetch(self.anyone(Unit("device_type")).values)
        return str(device_type)

    def begin_block(self, block: BlockLayout) -> None:
        """Have the shards' passes through a block started."""
        for worker in self.with_shards:
            tokens = sum(self._tokens[shard] for shard in self.held[worker])
            self.speeds.note_tokens(worker, block.index, tokens)
        unit = Unit("begin_block", block.index)
        self.carry_everywhere(unit, block.index, min(block.index, self.first_unfinished))

    def finish_block(self, block: BlockLayout) -> None:
        """Have the shards carried to the end of the block."""
        self.carry_everywhere(Unit("finish_block", block.index))
        self._position = block.index + 1

    def reuse(self, block: BlockLayout) -> None:
        """Take a block as it was finished before; shards in front of it pass if they are needed."""
        is_passed = any(b.index not in self.finished for b in self._blocks[block.index :])
        if is_passed and self._position == block.index:
            self.carry_everywhere(Unit("replay_block", block.index), block.index)
            self._position = block.index + 1
        self.do_later(Unit("export", block.index), block.index)

    def export_outside(self) -> None:
        """Have everything written that no quantized layer belongs to, unless it is there."""
        self.do_later(Unit("export_outer"))
        for index in range(len(self._blocks), self.settings.layout.num_blocks):
            self.do_later(Unit("export", index), index)

    def _hold(self, worker: int, shards: Iterable[int]) -> None:
        indices = list(shards)
        if indices:
            taken = [self._shards[index] for index in indices]
            self._pending += self.carry(worker, Unit("hold"), *taken).values
            self.held[worker] = sorted([*self.held[worker], *indices])

    # What was done

    def accept(self, block_index: int) -> list[FinishedUnit]:
        """A block is stored: failures before it count no longer.

        Returns:
            Units that have ended since the last block.
        """
        units = self.watch.finished()  # first: it raises if a worker hangs
        self.finished.add(block_index)
        self._losses.forget()
        self.speeds.learn(units)
        return units

    def lap(self, began: float) -> Lap:
        """Seconds of a block that began then, not counting those of the block before."""
        now, waited_s = time.monotonic(), self.watch.waited_s
        since, worked_s = self._lap_ended, waited_s - self._lap_waited_s
        self._lap_ended, self._lap_waited_s = now, waited_s
        return Lap(now - max(began, since), max(0.0, now - since - worked_s))

    # Coming and going

    def must_settle(self) -> bool:
        """Whether workers are about to leave, so that nothing may be in flight on them."""
        self.watch.look_around()
        self._leaving |= self.executor.leaving() | self.watch.leaving
        self._leaving &= set(self.members)
        return bool(self._leaving)

    def adjust(self) -> None:
        """Between two blocks: take in who has come, let go who leaves, even the shards out."""
        joined = self.executor.recruit()
        if self._leaving and not set(self.members) - self._leaving and not joined:
            logger.warning("every worker is about to leave: waiting for others to come")
            joined = self.executor.recruit(wait=True)
        self._welcome(joined)
        self._move()
        self._part()

    def _welcome(self, joined: Iterable[int]) -> None:
        for worker in joined:
            self.members.append(worker)
            self.held[worker] = []
            place = self.executor.place(worker)
            logger.info("worker %d joined on %s: %d workers", worker, place.host, len(self.members))
            self._note_workers("joined", [worker])

    def _move(self) -> None:
        speeds = self.speeds.of(self.members)
        moves = balance(self.held, speeds, self._leaving)
        for (source, target), group in itertools.groupby(
            sorted(moves, key=lambda m: (m.source, m.target)), key=lambda m: (m.source, m.target)
        ):
            shards = [move.shard for move in group]
            [given] = self.carry(source, Unit("give"), shards).values
            self._pending += self.carry(target, Unit("take"), given).values
            self.held[source] = [s for s in self.held[source] if s not in shards]
            self.held[target] = sorted([*self.held[target], *shards])

    def _part(self) -> None:
        if not self._leaving:
            return
        self.wait()  # what they hold has arrived elsewhere
        self.watch.settle(self._leaving)
        self.watch.look_around()  # their last units are still to be noted
        for worker in sorted(self._leaving):
            host = self.executor.place(worker).host
            self.executor.release(worker, replace=True)
            self._forget(worker)
            logger.info("worker %d left on %s: %d workers", worker, host, len(self.members))
            self._note_workers("left", [worker])
        self._leaving.clear()

    def _forget(self, worker: int) -> None:
        self.members.remove(worker)
        del self.held[worker]
        self._last.pop(worker, None)
        self.watch.drop(worker)
        self.speeds.forget(worker)

    def _note_workers(self, change: str, workers: Iterable[int], **fields: object) -> None:
        for worker in workers:
            place = self.executor.place(worker)
            self.run.append(
                "worker", worker=worker, change=change, node=place.node, host=place.host,
                pid=place.pid, **fields,
            )  # fmt: skip

    # Losses

    def recover(self, error: WorkerError) -> None:
        """Go back in front of the first unfinished block with everyone who is left.

        Shards of lost workers are carried there from their tokens, through the finished blocks.

        Raises:
            GaveUpError: Too many losses at the same block.
            WorkerError: Another loss meanwhile.
        """
        began = time.monotonic()
        block = self.first_unfinished
        self._losses.note(error)
        self.later.forget()
        self.speeds.begin_anew()
        self._pending.clear()
        self._last.clear()
        self.dispatch.forget()
        must_go = (error.hangs or error.out_of_memory) and error.worker in self.members
        lost = [self._dismiss(error.worker, error)] if must_go else []
        positions = self._roll_call(block, error, lost)
        self._losses.require_patience(block)
        if not self.members:
            logger.warning("no worker is left: waiting for others to come")
            self._welcome(self.executor.recruit(wait=True))
        replayed = self._reassign(positions, block)
        self._position = block
        self.wait()
        self.run.append(
            "recovery", block=block, lost=lost, replayed_shards=replayed,
            seconds=time.monotonic() - began,
        )  # fmt: skip

    def _roll_call(self, block: int, error: WorkerError, lost: list[int]) -> dict[int, int]:
        """Rewind everyone; who does not answer is lost. By shard, the block it is in front of."""
        calls = {
            worker: self.watch.call(worker, Unit("rewind", block), block) for worker in self.members
        }
        positions: dict[int, int] = {}
        for worker, call in calls.items():
            while worker in self.members:
                try:
                    [found] = self.watch.fetch(call.values)
                except WorkerError as loss:  # of this worker, or one that hangs meanwhile
                    culprit = loss.worker if loss.worker in self.members else worker
                    cause = error if error.worker in (culprit, -1) else loss
                    lost.append(self._dismiss(culprit, cause))
                    continue
                self.held[worker] = sorted(found)
                positions |= found
                break
        return {s: p for s, p in positions.items() if any(s in h for h in self.held.values())}

    def _dismiss(self, worker: int, error: WorkerError) -> int:
        self.executor.dismiss(worker)
        self._forget(worker)
        self._leaving.discard(worker)
        self._losses.note_worker(worker)
        logger.warning("%s (%s)", error, self._losses.where(worker))
        self._note_workers("lost", [worker], doing=error.doing, reason=error.reason)
        self.executor.meter("onecomp_workers_lost", 1, run=self.run.path.name)
        return worker

    def _reassign(self, positions: Mapping[int, int], block: int) -> int:
        """Have lost shards taken by others and carried to the block; their number."""
        homeless = [index for index in self._shards if index not in positions]
        counts = {worker: len(held) for worker, held in self.held.items()}
        takers = share_out(homeless, counts, self.speeds.of(self.members))
        for worker in self.members:
            self._hold(worker, [shard for shard in homeless if takers[shard] == worker])
        behind = {shard: positions.get(shard, 0) for shard in self._shards}
        for index in range(block):
            for worker in self.members:
                if any(behind[shard] <= index for shard in self.held[worker]):
                    unit = Unit("replay_block", index)
                    self._pending += self.carry(worker, unit, index).values
        return len(homeless)
