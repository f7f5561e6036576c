"""Which worker does what: pure functions of shapes and of the workers' measured speeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onecomp.models.layout import BlockLayout, InputGroup

LEAST_GAIN = 0.15
"""Shards move between healthy workers only where a block becomes this much shorter."""

Speeds = Mapping[int, float]
"""Tokens per second by worker, or any multiple of it: only ratios count."""


@dataclass(frozen=True)
class Move:
    """A shard that goes from one worker to another."""

    shard: int
    source: int
    target: int


def assign_shards(num_shards: int, speeds: Speeds) -> dict[int, range]:
    """Contiguous runs of shard numbers, one a worker: they hold the largest subtrees of the sum.

    A run is as long as its worker is fast.

    >>> assign_shards(5, {0: 1.0, 1: 1.0})
    {0: range(0, 2), 1: range(2, 5)}
    """
    total, passed = sum(speeds.values()), 0.0
    edges = [0]
    for speed in speeds.values():
        passed += speed
        edges.append(int(num_shards * passed / total + 1e-9))
    return {worker: range(a, b) for worker, (a, b) in zip(speeds, pairwise(edges), strict=True)}


def share_out(shards: Iterable[int], held: Mapping[int, int], speeds: Speeds) -> dict[int, int]:
    """Who takes shards that nobody holds: each goes to whoever is done with it first.

    Args:
        shards: The shards.
        held: How many shards each worker holds already.
        speeds: Of every worker that may take one.

    Returns:
        Worker by shard.
    """
    count = {worker: held.get(worker, 0) for worker in speeds}
    taken = {}
    for shard in shards:
        worker = min(count, key=lambda w: ((count[w] + 1) / speeds[w], w))
        taken[shard] = worker
        count[worker] += 1
    return taken


def balance(
    held: Mapping[int, Sequence[int]], speeds: Speeds, leaving: Iterable[int] = ()
) -> list[Move]:
    """Moves that let all workers be done with a block at about the same time.

    Args:
        held: Shards by worker, new workers included.
        speeds: Of the same workers.
        leaving: Workers that have to hand over everything.

    Returns:
        As few moves as possible; none between workers that stay where the gain is small.
    """
    leaving = set(leaving)
    staying = {worker: speeds[worker] for worker in speeds if worker not in leaving}
    if not staying:
        return []
    lists = {worker: sorted(held.get(worker, ())) for worker in speeds}
    moves = []
    for worker in sorted(leaving & lists.keys()):
        counts = {w: len(lists[w]) for w in staying}
        for shard, target in share_out(lists[worker], counts, staying).items():
            moves.append(Move(shard, worker, target))
            lists[target].append(shard)
    even = _evened_out({w: lists[w] for w in staying}, staying)
    return _joined(moves, even)


def _joined(first: list[Move], then: list[Move]) -> list[Move]:
    """One move for each shard, from where it was to where it goes in the end."""
    sources = {move.shard: move.source for move in reversed([*first, *then])}
    targets = {move.shard: move.target for move in [*first, *then]}
    return [Move(s, sources[s], t) for s, t in targets.items() if sources[s] != t]


def _evened_out(lists: dict[int, list[int]], speeds: Speeds) -> list[Move]:
    before, moves = _slowest(lists, speeds)[0], []
    while True:
        longest, source = _slowest(lists, speeds)
        target = min(lists, key=lambda w: ((len(lists[w]) + 1) / speeds[w], w))
        if target == source or (len(lists[target]) + 1) / speeds[target] >= longest:
            break
        shard = lists[source].pop()
        lists[target].append(shard)
        moves.append(Move(shard, source, target))
    gain = 1 - _slowest(lists, speeds)[0] / before if before else 0.0
    return moves if gain >= LEAST_GAIN else []


def _slowest(lists: Mapping[int, Sequence[int]], speeds: Speeds) -> tuple[float, int]:
    return max((len(lists[worker]) / speeds[worker], worker) for worker in lists)


@dataclass(frozen=True)
class GroupCost:
    """What quantizing a group takes, in multiplications that take as long."""

    prepare: float
    """What its pieces share is made by one worker, before any of them."""
    pieces: tuple[float, ...]
    """Each of the pieces of rows that it may be split into; a single one keeps it whole."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.prepare + sum(self.pieces)

    @property
    def longest(self) -> float:
        """The chain that no number of workers shortens."""
        return self.prepare + max(self.pieces)


def longest_first(
    costs: Sequence[float], speeds: Speeds, load: Mapping[int, float] | None = None
) -> list[int]:
    """Worker of each unit: the most expensive first, to the worker that is done with it first.

    Args:
        costs: Of the units.
        speeds: Of the workers.
        load: What each has to do already, in the unit of the costs.
    """
    busy = {worker: (load or {}).get(worker, 0.0) for worker in speeds}
    chosen = [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda i: -costs[i]):
        worker = min(busy, key=lambda w: ((busy[w] + costs[unit]) / speeds[w], w))
        chosen[unit] = worker
        busy[worker] += costs[unit]
    return chosen


# Splitting a group by rows


def split_largest(costs: Sequence[GroupCost], num_workers: int) -> list[GroupCost]:
    """Costs of groups that are quantized at the same time, with only those split that have to be.

    A group that takes less than every worker's even share keeps nobody waiting.
    """
    share = sum(cost.total for cost in costs) / num_workers
    return [
        cost
        if num_workers > 1 and cost.total > share
        else GroupCost(cost.prepare, (sum(cost.pieces),))
        for cost in costs
    ]


WORTH_SENDING = {"cpu": 40.0, "cuda": 600.0}
"""Operations for each byte sent from which on another worker's help is worth it: the ratio of what
a device does while it solves columns and what the object store moves, per second. Solving on a GPU
is mostly calls of small kernels, so it reaches about 2e12 operations a second; 3 GB arrive."""


def is_worth_splitting(group: InputGroup, device_type: str, *, corrected: bool) -> bool:
    """Whether rows are solved by several workers, to which the owner sends factor and Hessian.

    Args:
        group: The group.
        device_type: ``cpu`` or ``cuda``.
        corrected: Whether its weights are corrected: two more products, one more matrix.
    """
    operations = 2.0 * sum(group.out_features) * group.in_features**2 * (3 if corrected else 1)
    sent_bytes = 4 * group.in_features**2 * (3 if corrected else 2)
    return operations > sent_bytes * WORTH_SENDING.get(device_type, WORTH_SENDING["cuda"])


@dataclass(frozen=True)
class GroupPlan:
    """Who quantizes a group."""

    owner: int
    pieces: dict[int, list[int]]
    """Numbers of the row pieces by worker; all are the owner's where the group is not split."""

    @property
    def is_split(self) -> bool:
        """Whether anyone but the owner has a part in it."""
        return set(self.pieces) != {self.owner}


def plan_groups(costs: Sequence[GroupCost], speeds: Speeds) -> list[GroupPlan]:
    """Owners of groups, and workers of the pieces of those that are split.

    Args:
        costs: Of groups that are quantized at the same time.
        speeds: Of the workers.
    """
    first = [cost.prepare + (cost.pieces[0] if len(cost.pieces) == 1 else 0.0) for cost in costs]
    owners = longest_first(first, speeds)
    busy: dict[int, float] = {}
    if len(costs) > 1:  # of a single group, the pieces begin when everyone is idle
        for owner, cost in zip(owners, first, strict=True):
            busy[owner] = busy.get(owner, 0.0) + cost
    pieces = [
        (i, number)
        for i, cost in enumerate(costs)
        if len(cost.pieces) > 1
        for number in range(len(cost.pieces))
    ]
    plans = [GroupPlan(owner, {}) for owner in owners]
    sizes = [costs[i].pieces[number] for i, number in pieces]
    for (i, number), worker in zip(pieces, longest_first(sizes, speeds, busy), strict=True):
        plans[i].pieces.setdefault(worker, []).append(number)
    return [plan if plan.pieces else GroupPlan(plan.owner, {plan.owner: [0]}) for plan in plans]


# Blocks on their way

FORWARD_COST = {"cpu": 1.0, "cuda": 0.01}
"""Time of a multiplication in a forward pass, in those of ``GroupCost``: tensor cores do them."""


def forward_cost(multiplications: float | int, device_type: str) -> float:
    """A forward pass, in the unit of ``GroupCost``."""
    return multiplications * FORWARD_COST.get(device_type, FORWARD_COST["cuda"])


def are_worth_observing_ahead(
    stages: Sequence[Sequence[GroupCost]], pass_cost: float, num_workers: int
) -> bool:
    """Whether groups that do not depend on each other are quantized at once, or one by one.

    At once they keep more workers busy, but the passes have to run ahead of weights that are still
    to be quantized, and are made again afterwards: one more pass for each such stage.

    Args:
        stages: Costs of the groups by stage.
        pass_cost: Of both streams through the block, all tokens.
        num_workers: How many share the work.
    """
    saved, several = 0.0, [stage for stage in stages if len(stage) > 1]
    for stage in several:
        one_by_one = sum(max(cost.longest, cost.total / num_workers) for cost in stage)
        total = sum(cost.total for cost in stage) / num_workers
        saved += one_by_one - max(total, *(cost.longest for cost in stage))
    return saved > len(several) * pass_cost / num_workers


MOST_BLOCKS_IN_FLIGHT = 24
"""Each costs another copy of the streams."""


WAITING = 1.5
"""Time that a block is in flight, in that of its longest chain: its units wait for free workers."""


def blocks_in_flight(costs: Sequence[GroupCost], num_workers: int) -> int:
    """How many blocks are begun before the driver waits for the oldest, where passes need not wait.

    While the longest chain of a block is worked on, all others have to find work in other blocks.

    Args:
        costs: Of the groups of a block.
        num_workers: How many share the work.
    """
    total = sum(cost.total for cost in costs)
    longest = max((cost.longest for cost in costs), default=0.0)
    at_once = math.ceil(WAITING * num_workers * longest / total) if total else 1
    return min(MOST_BLOCKS_IN_FLIGHT, 1 + max(1, at_once))


# Sending sums

DIRECT_SENDERS = 3
"""Up to so many workers send their sums to the owner; of more, neighbours add theirs first."""
ADDED_AT_ONCE = 2
"""Contributions that neighbours add at a time."""
WORTH_MERGING_BYTES = 64 * 2**20


def few_rows(group: InputGroup, num_groups: int, num_workers: int) -> float:
    """A worker with fewer rows of a group than this sends them in place of their sums.

    Where a block has fewer groups than there are workers, owners must not become the place where
    all products are made. Where it has more, as with experts, what counts is what is sent: rows of
    two bytes each against a symmetric matrix of four.
    """
    return float(group.in_features) if num_groups >= num_workers else 0.0


def are_added_on_the_way(group: InputGroup, num_groups: int, num_senders: int) -> bool:
    """Whether neighbours add their sums in pairs; else the owner receives all of them."""
    sent_bytes = 2 * group.in_features**2 * num_senders
    return num_senders > max(DIRECT_SENDERS, num_groups) and sent_bytes > WORTH_MERGING_BYTES


def useful_workers(num_shards: int, blocks: Iterable[BlockLayout]) -> int:
    """The most workers that a run can keep busy: one for each shard, or for each group."""
    return max(num_shards, max((len(block.groups) for block in blocks), default=0), 1)
