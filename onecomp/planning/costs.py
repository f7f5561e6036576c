"""What each call of a worker costs: pure functions of method, shapes and tokens.

A simulator of a schedule asks ``UnitCosts.seconds`` for the same names of methods as the engine
calls.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

from onecomp.errors import ConfigError
from onecomp.models.layout import InputGroup
from onecomp.planning import operations as ops
from onecomp.planning.amounts import Amount
from onecomp.planning.hardware import Hardware
from onecomp.planning.methods import MethodShape
from onecomp.planning.operations import Work
from onecomp.planning.shapes import BlockShape, ModelShape, TextShape
from onecomp.qep.config import QEPConfig
from onecomp.quantizer.pieces import even_cuts, row_tile
from onecomp.schedule import (
    DIRECT_SENDERS,
    GroupCost,
    are_added_on_the_way,
    blocks_in_flight,
    few_rows,
    is_worth_splitting,
)

PHASES = ("read", "forward", "sums", "merge", "factor", "correct", "search", "solve", "write")

WorkByPhase = Mapping[str, Work]


@dataclass(frozen=True)
class Unit:
    """One call of a worker, by its shapes alone."""

    block: BlockShape
    group: InputGroup | None = None
    tokens: Amount = 0
    """Tokens of the shards that the worker holds; of all, where rows are sent and summed up."""
    num_rows: int | None = None
    """Output rows, where a group is solved in pieces; None for all of them."""
    num_parts: int = 1
    """Contributions that the sums of a group are added up from."""

    @property
    def rows(self) -> int:
        """Output rows that are solved."""
        return sum(self.group.out_features) if self.num_rows is None else self.num_rows


@dataclass(frozen=True)
class UnitCosts:
    """Work, bytes and seconds of every call of a worker."""

    model: ModelShape
    method: MethodShape
    text: TextShape | None
    """None for methods that read none."""
    qep: QEPConfig | None
    hardware: Hardware
    num_workers: int = 1
    """Equal workers."""
    has_checkpoint: bool = True
    """Whether finished blocks are written to a checkpoint."""

    @property
    def num_streams(self) -> int:
        """Streams that pass through the blocks."""
        return 1 if self.qep is None else 2

    def is_corrected(self, group: InputGroup) -> bool:
        """Whether the cross product of a group is summed up, and its weights are corrected."""
        return self.qep is not None and any(map(self.qep.corrects, group.layer_names))

    # What a call does

    def work(self, method: str, unit: Unit) -> WorkByPhase:
        """Work of one call, by phase.

        Args:
            method: ``hold``, ``begin_block``, ``observe`` (all groups), ``observe_group``,
                ``quantize`` (a whole group), or its parts ``prepare``, ``quantize_pieces``
                (``num_rows`` of it) and ``join``, ``merge`` (of ``num_parts`` contributions),
                ``apply``, ``finish_block``, ``store``.
            unit: Its shapes.

        Raises:
            ConfigError: No such method.
        """
        calls: dict[str, Callable[[Unit], WorkByPhase]] = {
            "hold": self._hold,
            "begin_block": self._begin_block,
            "observe": self._observe,
            "observe_group": self._observe_group,
            "quantize": self._quantize,
            "prepare": self._prepare,
            "quantize_pieces": self._quantize_pieces,
            "join": self._join,
            "merge": self._merge,
            "apply": self._apply,
            "finish_block": self._finish_block,
            "store": self._store,
        }
        if method not in calls:
            raise ConfigError("plan", [f"{method!r} is no call of a worker: {', '.join(calls)}."])
        return calls[method](unit)

    def seconds(self, method: str, unit: Unit) -> Amount:
        """Seconds of one call; arguments as for ``work``."""
        return self.seconds_of(self.work(method, unit))

    def phase_s(self, phase: str, work: Work) -> Amount:
        """Seconds of work of one phase."""
        return self.hardware.seconds(phase, work, self.model.dtype_bytes)

    def seconds_of(self, work: WorkByPhase) -> Amount:
        """Seconds of work by phase."""
        return sum((self.phase_s(phase, amount) for phase, amount in work.items()), start=0.0)

    def transfer_s(self, num_bytes: Amount) -> Amount:
        """Seconds to send bytes from one worker to another."""
        return self.hardware.transfer_s(num_bytes, self.num_workers)

    @property
    def _stored_bytes_each(self) -> Amount:
        stored = self.model.stored
        return self.model.dtype_bytes if stored is None else stored.num_bytes / stored.num_values

    def _hold(self, unit: Unit) -> WorkByPhase:
        model = self.model
        embedding = ops.read(
            model.num_embedding_weights, self._stored_bytes_each, model.dtype_bytes
        )
        return {
            "read": embedding,
            "forward": ops.embed(unit.tokens, model.hidden_size, model.dtype_bytes),
        }

    def _begin_block(self, unit: Unit) -> WorkByPhase:
        model, copies = self.model, self.num_streams
        stored = self._stored_bytes_each
        return {"read": ops.read(unit.block.num_parameters, stored, model.dtype_bytes, copies)}

    def _observe(self, unit: Unit) -> WorkByPhase:
        return added(
            self._observe_group(Unit(unit.block, group, unit.tokens)) for group in unit.block.groups
        )

    def _observe_group(self, unit: Unit) -> WorkByPhase:
        group = unit.group
        forward = self._forward(unit, group.index) * self.num_streams
        if self.sends_rows(group, self.num_at_once(unit.block, group)):
            return {"forward": forward}
        sums = ops.sums(group, unit.tokens, corrected=self.is_corrected(group))
        return {"forward": forward, "sums": sums}

    def _finish_block(self, unit: Unit) -> WorkByPhase:
        last = self._forward(unit, len(unit.block.groups))
        return {"forward": last * self.num_streams}

    def _forward(self, unit: Unit, stretch: int) -> Work:
        operations = unit.block.stretches[stretch].operations
        return ops.forward(operations, unit.tokens, self.text.length)

    @property
    def most_tokens(self) -> int:
        """Tokens of the worker that holds the most."""
        text = self.text
        return 0 if text is None else text.most_shards(self.num_workers) * text.shard_tokens

    def num_at_once(self, block: BlockShape, group: InputGroup) -> int:
        """Groups that are quantized at the same time as this one, itself included."""
        return len(block.groups) if self.qep is None else block.stage_size(group)

    @cached_property
    def blocks_in_flight(self) -> int:
        """Blocks that are begun before the oldest is finished."""
        if self.qep is not None or self.text is None:
            return 1
        return max(
            blocks_in_flight([self._group_cost(kind, g) for g in kind.groups], self.num_workers)
            for kind in self.model.kinds
        )

    def _group_cost(self, kind: BlockShape, group: InputGroup) -> GroupCost:
        """Seconds in place of multiplications; all pieces alike."""
        rows = sum(group.out_features)
        count = len(even_cuts(rows, self.row_tile(group))) if self.is_split(group) else 1
        solved_s = self.seconds("quantize_pieces", Unit(kind, group))
        prepare_s = self.seconds("prepare", Unit(kind, group))
        return GroupCost(prepare_s, (solved_s / count,) * count)

    def sends_rows(self, group: InputGroup, num_groups: int) -> bool:
        """Whether the inputs of one of so many groups are sent instead of their sums."""
        few = few_rows(group, num_groups, self.num_workers)
        return 2 * self.text.shard_tokens < group.in_features and self.most_tokens < few

    def _quantize(self, unit: Unit) -> WorkByPhase:
        return added([self._prepare(unit), self._quantize_pieces(unit)])

    def _prepare(self, unit: Unit) -> WorkByPhase:
        group = unit.group
        if not self.method.has_hessian:
            return {}
        corrected = self.is_corrected(group)
        prepared = {
            "merge": ops.merge(group, unit.num_parts - 1, corrected=corrected),
            "factor": ops.factor(group) * self.method.num_factors,
        }
        if self.sends_rows(group, self.num_at_once(unit.block, group)):
            tokens = unit.tokens or self.text.num_tokens
            prepared["sums"] = ops.sums(group, tokens, corrected=corrected)
        return prepared

    def _merge(self, unit: Unit) -> WorkByPhase:
        corrected = self.is_corrected(unit.group)
        return {"merge": ops.merge(unit.group, unit.num_parts - 1, corrected=corrected)}

    def _join(self, unit: Unit) -> WorkByPhase:
        return {"merge": Work(memory_bytes=2 * self.results_bytes(unit.group))}

    def _quantize_pieces(self, unit: Unit) -> WorkByPhase:
        group, rows = unit.group, unit.rows
        num_weights = rows * group.in_features
        solved = {
            "read": ops.read(num_weights, self._stored_bytes_each, ops.FLOAT_BYTES),
            "search": ops.search(group, rows, self.method),
            "solve": ops.solve(group, rows, self.method, self.row_tile(group)),
        }
        if self.is_corrected(group):
            solved["correct"] = ops.correct(group, rows)
        return solved

    def _apply(self, unit: Unit) -> WorkByPhase:
        return {"merge": ops.apply(unit.group, self.model.dtype_bytes)}

    def _store(self, unit: Unit) -> WorkByPhase:
        return {"write": ops.write(unit.block, self.method, self.model.dtype_bytes)}

    # What is sent

    def is_split(self, group: InputGroup) -> bool:
        """Whether rows of a group are solved by several workers."""
        rated = self.method.rated
        if self.num_workers == 1 or not self.method.has_hessian:
            return False
        if rated is not None and not all(map(rated.is_separable, group.layer_names)):
            return False
        corrected = self.is_corrected(group)
        return is_worth_splitting(group, self.hardware.device_type, corrected=corrected)

    def row_tile(self, group: InputGroup) -> int:
        """Most rows of a group that are solved at once."""
        return row_tile(self.hardware.device_type, group.in_features)

    def contribution_bytes(self, group: InputGroup, num_groups: int) -> Amount:
        """What a worker sends the owner of a group for one shard, or one subtree of them."""
        corrected = self.is_corrected(group)
        if self.sends_rows(group, num_groups):
            tokens, dtype_bytes = self.text.shard_tokens, self.model.dtype_bytes
            return ops.rows_bytes(group, tokens, dtype_bytes, corrected=corrected)
        return ops.sums_bytes(group, corrected=corrected)

    def num_contributions(self, group: InputGroup, num_groups: int) -> list[int]:
        """What each worker sends for the sums of a group, in contributions."""
        if self.sends_rows(group, num_groups):
            return [len(run) for run in even_runs(self.text.num_shards, self.num_workers)]
        return [*nodes_by_worker(self.text.num_shards, self.num_workers)]

    def num_received(self, group: InputGroup, num_groups: int) -> int:
        """Contributions that reach the owner of a group, its own included."""
        sent = [number for number in self.num_contributions(group, num_groups) if number]
        if are_added_on_the_way(group, num_groups, len(sent)):
            return min(sum(sent), DIRECT_SENDERS)
        return sum(sent)

    def prepared_bytes(self, group: InputGroup) -> Amount:
        """What a worker that solves rows of a group needs besides the weights."""
        matrices = 2 * ops.strip_share(group.in_features) + self.is_corrected(group)
        return ops.FLOAT_BYTES * group.in_features**2 * matrices

    def results_bytes(self, group: InputGroup) -> Amount:
        """Results of a group, as they are sent to who applies or stores them."""
        return ops.results_bytes(group, self.method)


def added(parts: Iterable[WorkByPhase]) -> WorkByPhase:
    """Sum by phase."""
    total: dict[str, Work] = defaultdict(Work)
    for part in parts:
        for phase, work in part.items():
            total[phase] += work
    return total


def even_runs(num_shards: int, num_workers: int) -> list[range]:
    """Contiguous runs of shards, as equal workers hold them.

    >>> even_runs(5, 2)
    [range(0, 2), range(2, 5)]
    """
    edges = [num_shards * i // num_workers for i in range(num_workers + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


@cache
def nodes_by_worker(num_shards: int, num_workers: int) -> tuple[int, ...]:
    """Nodes of the summation tree that each of equal workers has when its own are added up."""
    runs = even_runs(num_shards, num_workers)
    return tuple(tree_nodes(run, 0, num_shards) for run in runs)


def tree_nodes(held: range, first: int, last: int) -> int:
    """Nodes of the summation tree over ``first`` to ``last - 1`` that cover a run of shards.

    >>> tree_nodes(range(0, 4), 0, 8), tree_nodes(range(3, 6), 0, 8)
    (1, 2)
    """
    if not held or held.stop <= first or last <= held.start:
        return 0
    if held.start <= first and last <= held.stop:
        return 1
    middle = (first + last) // 2
    return tree_nodes(held, first, middle) + tree_nodes(held, middle, last)
