"""A cluster on a simulated clock: the real driver's calls, their durations from shapes alone.

``SimulatedExecutor`` runs nothing. Every call takes what ``UnitCosts`` says that it takes, begins
when its worker is free and what it needs has arrived, and ends on a clock that only the driver's
waiting moves. So what ``quantize_model`` hands out to whom, and in which order, is the real thing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import CalibrationShard, cut_shards
from onecomp.executor import Call, Executor, Receipt, Ref
from onecomp.jobs import GroupReceipt, group_pieces
from onecomp.models import ModelSource
from onecomp.models.layout import BlockLayout, InputGroup, ModelLayout
from onecomp.pipeline import quantize_model
from onecomp.planning import operations as ops
from onecomp.planning.costs import Unit, UnitCosts, tree_nodes
from onecomp.planning.shapes import BlockShape, TextShape
from onecomp.progress import Progress
from onecomp.quantizer import Quantizer
from onecomp.store import RunDirectory
from onecomp.worker import WorkerSettings

READ_AHEAD = 1


@dataclass(frozen=True)
class SimulatedModel:
    """Shapes of a model, and what each call of a worker costs."""

    blocks: tuple[BlockShape, ...]
    """One for each block."""
    costs: UnitCosts
    routed_tokens: Callable[[InputGroup], float] = lambda group: 1.0
    """Share of the tokens that reaches a group."""

    def layout(self) -> ModelLayout:
        """As the engine sees it."""
        blocks = [
            BlockLayout(
                index,
                f"block.{index}",
                tuple(replace(group, block_index=index) for group in block.groups),
                block.dependencies,
            )
            for index, block in enumerate(self.blocks)
        ]
        return ModelLayout(tuple(blocks), len(blocks), blocks_return_tuples=False)

    def costs_of(self, group: InputGroup | None) -> UnitCosts:
        """Costs where the text has as many tokens as reach the group."""
        share = 1.0 if group is None else self.routed_tokens(group)
        text = self.costs.text
        if share == 1.0 or text is None:
            return self.costs
        short = TextShape(text.num_samples, int(text.length * share), text.num_shards)
        return replace(self.costs, text=short)


@dataclass(eq=False)
class Promise:
    """A value that is to come; identity is its key."""

    worker: int
    done_s: float
    value: object = None
    num_bytes: float = 0.0
    shards: tuple[int, ...] = ()
    """Shards whose sums it holds."""
    group: InputGroup | None = None
    """Whose sums they are."""


@dataclass
class SimulatedWorker:
    """When a worker is free, and what it holds."""

    speed: float
    free_s: float = 0.0
    busy_s: float = 0.0
    shards: dict[int, int] = field(default_factory=dict)
    """Tokens by shard."""
    read_ahead: dict[int, float] = field(default_factory=dict)
    """When the weights of a block will have been read."""
    here: set[Promise] = field(default_factory=set)
    """Values of others that have arrived."""


class SimulatedExecutor(Executor):
    """Workers on a simulated clock.

    Args:
        model: Shapes and costs.
        quantizer: Cuts groups into pieces.
        speeds: Of each worker; 1 is what the costs are for.
    """

    def __init__(self, model: SimulatedModel, quantizer: Quantizer, speeds: Sequence[float]):
        self.model, self.quantizer, self.layout = model, quantizer, model.layout()
        self.simulated = [SimulatedWorker(speed) for speed in speeds]
        self._known: dict[tuple, Any] = {}
        self.now_s = 0.0

    @property
    def workers(self) -> list[int]:
        return list(range(len(self.simulated)))

    @property
    def work_s(self) -> float:
        """Seconds that the workers were busy, all together."""
        return sum(worker.busy_s for worker in self.simulated)

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        del make_worker, arguments

    def call(
        self,
        worker: int,
        method: str,
        *arguments: object,
        num_returns: int = 1,
        after: Ref | None = None,
    ) -> Call:
        state = self.simulated[worker]
        needs = [value for value in (after, *arguments) if isinstance(value, Promise)]
        ready_s = max([self.now_s, state.free_s, *(p.done_s for p in needs)])
        ready_s = max(
            ready_s, max((p.done_s for p in needs), default=0.0) + self._arrival_s(worker, needs)
        )
        seconds, values = self._perform(worker, method, arguments, num_returns)
        if method == "begin_block":
            ready_s = self._wait_for_weights(state, arguments[0], ready_s, seconds)
        done_s = ready_s + seconds
        state.free_s, state.busy_s = done_s, state.busy_s + seconds
        for promise in values:
            promise.done_s = done_s
        receipt = Promise(worker, done_s, Receipt(ready_s, seconds))
        return Call([*values], receipt)

    def _arrival_s(self, worker: int, needs: Sequence[Promise]) -> float:
        """Seconds to bring what other workers made; each value once."""
        here = self.simulated[worker].here
        new = [p for p in needs if p.worker != worker and p.num_bytes and p not in here]
        here.update(new)
        return self.model.costs.transfer_s(sum(p.num_bytes for p in new)) if new else 0.0

    def _wait_for_weights(
        self, state: SimulatedWorker, block: int, ready_s: float, seconds: float
    ) -> float:
        """Blocks are read one after the other while those before them are worked on."""
        if block not in state.read_ahead:
            state.read_ahead[block] = ready_s + self._reading_s(block)
        begin_s = max(ready_s, state.read_ahead.pop(block))
        last = max(state.read_ahead.values(), default=begin_s)
        for following in range(block + 1, min(block + 1 + READ_AHEAD, len(self.model.blocks))):
            if following not in state.read_ahead:
                last = max(last, begin_s) + self._reading_s(following)
                state.read_ahead[following] = last
        return begin_s

    def _reading_s(self, block: int) -> float:
        costs = self.model.costs
        work = costs.work("begin_block", Unit(self.model.blocks[block]))["read"]
        return work.read_bytes / costs.hardware.storage_rate

    # What calls do

    def _perform(
        self, worker: int, method: str, arguments: Sequence, num_returns: int
    ) -> tuple[float, list[Promise]]:
        values = [Promise(worker, 0.0) for _ in range(num_returns)]
        does = getattr(self, f"_{method}")
        seconds = does(self.simulated[worker], values, *arguments)
        return seconds / self.simulated[worker].speed, values

    def _seconds(
        self, method: str, block: int, group: InputGroup | None = None, **sizes: float
    ) -> float:
        """Of one call; remembered, as blocks and experts are alike."""
        shape = self.model.blocks[block]
        alike = None if group is None else self._alike(group)
        key = (method, id(shape), alike, *sorted(sizes.items()))
        if key not in self._known:
            costs = self.model.costs_of(group)
            self._known[key] = costs.seconds(method, Unit(shape, group, **sizes))
        return self._known[key]

    def _alike(self, group: InputGroup) -> tuple:
        """What groups have in common that cost the same; the stretch in front of them, too."""
        stretch = self.model.blocks[group.block_index].stretches[group.index].operations
        corrected = self.model.costs.is_corrected(group)
        share = self.model.routed_tokens(group)
        return group.in_features, group.out_features, corrected, share, stretch

    def _hold(self, state, values, *shards: CalibrationShard) -> float:
        for shard in shards:
            state.shards[shard.index] = shard.input_ids.numel()
        return self._seconds("hold", 0, tokens=sum(s.input_ids.numel() for s in shards))

    def _give(self, state, values, shards: Sequence[int]) -> float:
        values[0].value = {shard: state.shards.pop(shard) for shard in shards}
        return 0.0

    def _take(self, state, values, given: Promise) -> float:
        state.shards |= given.value
        return 0.0

    def _begin_block(self, state, values, block: int, oldest: int) -> float:
        self._block = block
        return self._seconds("begin_block", block) - self._reading_s(block)

    def _observe(self, state, values, groups: Sequence[int], few: Sequence[float]) -> float:
        return sum(
            self._observe_group(state, [value], index, limit)
            for value, index, limit in zip(values, groups, few, strict=True)
        )

    def _observe_group(self, state, values, index: int, few: float) -> float:
        block = self._block
        group = self.layout.blocks[block].groups[index]
        self._fill_sums(values[0], group, tuple(state.shards))
        tokens = sum(state.shards.values()) * self.model.routed_tokens(group)
        return self._seconds("observe_group", block, group, tokens=tokens)

    def _fill_sums(self, promise: Promise, group: InputGroup, shards: tuple[int, ...]) -> None:
        promise.group, promise.shards = group, tuple(sorted(shards))
        shape = self.model.blocks[group.block_index]
        key = ("contribution", id(shape), self._alike(group))
        if key not in self._known:
            costs = self.model.costs_of(group)
            num_groups = costs.num_at_once(shape, group)
            each = costs.contribution_bytes(group, num_groups)
            self._known[key] = each, costs.sends_rows(group, num_groups)
        each, sends_rows = self._known[key]
        parts = len(shards) if sends_rows else self._nodes(promise.shards)
        promise.num_bytes = parts * each

    def _nodes(self, shards: tuple[int, ...]) -> int:
        return nodes_of(shards, self.model.costs.text.num_shards)

    def _merge(self, state, values, *parts: Promise) -> float:
        self._fill_sums(values[0], parts[0].group, sum((p.shards for p in parts), ()))
        block = parts[0].group.block_index
        return self._seconds("merge", block, parts[0].group, num_parts=self._num_parts(parts))

    def _device_type(self, state, values) -> float:
        values[0].value = self.model.costs.hardware.device_type
        return 0.0

    def _quantize(self, state, values, group: InputGroup, *parts: Promise) -> float:
        self._finish_group(values, group)
        return self._seconds("quantize", group.block_index, group, num_parts=self._num_parts(parts))

    def _num_parts(self, parts: Sequence[Promise]) -> int:
        return max(1, sum(self._nodes(part.shards) for part in parts))

    def _finish_group(self, values, group: InputGroup) -> None:
        values[0].num_bytes = self.model.costs.results_bytes(group)
        values[1].value = GroupReceipt({}, [], 0, 0.0, 0, 0)

    def _prepare(self, state, values, group: InputGroup, *parts: Promise) -> float:
        values[0].num_bytes = self.model.costs.prepared_bytes(group)
        return self._seconds("prepare", group.block_index, group, num_parts=self._num_parts(parts))

    def _quantize_pieces(self, state, values, group: InputGroup, numbers, prepared) -> float:
        pieces = group_pieces(self.quantizer, group, self.model.costs.hardware.device_type)
        rows = [pieces[number].num_rows for number in numbers]
        share = sum(rows) / sum(group.out_features)
        values[0].num_bytes = share * self.model.costs.results_bytes(group)
        return sum(
            self._seconds("quantize_pieces", group.block_index, group, num_rows=count)
            for count in rows
        )

    def _join(self, state, values, group: InputGroup, preparation, *parts) -> float:
        self._finish_group(values, group)
        return self._seconds("join", group.block_index, group)

    def _observe_ahead(self, state, values, groups: Sequence[int], few: Sequence[float]) -> float:
        """A pass from the start of the block; what lies between the groups is computed as well."""
        between = set(range(max(groups))) - set(groups)
        passed = sum(self._passing_s(state, index) for index in between)
        return passed + self._observe(state, values, groups, few)

    def _observe_group_ahead(self, state, values, index: int, few: float) -> float:
        return self._observe_ahead(state, values, [index], [few])

    def _passing_s(self, state, index: int) -> float:
        """Seconds of the stretch in front of a group that is not observed."""
        block = self.model.blocks[self._block]
        group = self.layout.blocks[self._block].groups[index]
        costs = self.model.costs_of(group)
        tokens = sum(state.shards.values()) * self.model.routed_tokens(group)
        operations = block.stretches[index].operations
        work = ops.forward(operations, tokens, costs.text.length) * costs.num_streams
        return costs.phase_s("forward", work)

    def _apply(self, state, values, indices: Sequence[int], *results) -> float:
        groups = self.layout.blocks[self._block].groups
        return sum(self._seconds("apply", self._block, groups[index]) for index in indices)

    def _finish_block(self, state, values) -> float:
        return self._seconds("finish_block", self._block, tokens=sum(state.shards.values()))

    def _store(self, state, values, block: int, num_groups: int, *parts) -> float:
        return self._seconds("store", block)

    def _export_outer(self, state, values) -> float:
        return 0.0

    # The clock

    def fetch(self, refs: Sequence[Ref]) -> list:
        self._wait(refs)
        return [ref.value for ref in refs]

    def _wait(self, refs: Sequence[Ref]) -> None:
        self.now_s = max([self.now_s, *(ref.done_s for ref in refs)])

    def ready(
        self, refs: Sequence[Ref], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[Ref]:
        if timeout_s and refs:
            last = (max if wait_for_all else min)(ref.done_s for ref in refs)
            self.now_s = max(self.now_s, last)
        now_s = self.now_s
        return {ref for ref in refs if ref.done_s <= now_s}

    def is_ref(self, value: object) -> bool:
        return isinstance(value, Promise)

    def stop(self) -> None:
        pass

    @property
    def driver_bytes(self) -> int:
        return 0

    def describe(self) -> str:
        return f"{self.num_workers} simulated workers"


@cache
def nodes_of(shards: tuple[int, ...], num_shards: int) -> int:
    """Nodes of the summation tree that shards make, run by run."""
    breaks = [i for i, (a, b) in enumerate(pairwise(shards), 1) if b != a + 1]
    edges = [0, *breaks, len(shards)]
    runs = [shards[a:b] for a, b in pairwise(edges) if a < b]
    return sum(tree_nodes(range(r[0], r[-1] + 1), 0, num_shards) for r in runs)


def simulate(
    model: SimulatedModel, quantizer: Quantizer, speeds: Sequence[float], folder: Path
) -> SimulatedExecutor:
    """A whole run on workers of these speeds; the executor with its clock at the end."""
    text = model.costs.text
    ids = torch.zeros(text.num_samples, text.length, dtype=torch.long)
    executor = SimulatedExecutor(model, quantizer, speeds)
    run = RunDirectory(folder)
    run.begin({}, None)
    settings = WorkerSettings(
        source=ModelSource("simulated", folder, trust_remote_code=False),
        dtype=torch.bfloat16, device="auto", layout=executor.layout,
        quantizer=quantizer, qep=model.costs.qep, num_shards=text.num_shards, run=run, writer=None,
    )  # fmt: skip
    with Progress(len(model.blocks), silent=True) as progress:
        quantize_model(
            settings, cut_shards(CalibrationSamples(ids, torch.ones_like(ids))), executor, progress
        )
    executor.now_s = max([executor.now_s, *(w.free_s for w in executor.simulated)])
    return executor
