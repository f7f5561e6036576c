"""The plan of a run: work by phase, time, memory, network and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from onecomp.models.layout import InputGroup
from onecomp.planning.amounts import Amount
from onecomp.planning.costs import PHASES, Unit, UnitCosts, WorkByPhase, added
from onecomp.planning.memory import MemoryModel, MemoryPlan
from onecomp.planning.operations import Work
from onecomp.planning.shapes import BlockShape
from onecomp.quantizer.pieces import even_cuts

CLUSTER_START_S = 8.0
"""Seconds until a cluster on this machine, or workers on one that runs, answer."""


@dataclass(frozen=True)
class Settings:
    """How a run is spread out, and what a worker costs."""

    in_process: bool
    """Workers are threads of one process, without Ray."""
    price_per_hour: Amount | None = None
    """Of one worker."""
    process_start_s: Amount = 8.0
    """Processor seconds that a process takes to import everything and to build the model."""

    @property
    def startup_s(self) -> Amount:
        """Seconds before the work starts: this process, and with Ray its cluster and workers."""
        return self.process_start_s * (1 if self.in_process else 2) + CLUSTER_START_S * (
            not self.in_process
        )


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase of the whole run, all workers together."""

    name: str
    operations: Amount
    num_bytes: Amount
    """Read and written, in memory and files."""
    seconds: Amount


@dataclass(frozen=True)
class Estimate:
    """What a run will take; times are those of the slowest way through it."""

    costs: UnitCosts
    settings: Settings

    @property
    def num_workers(self) -> int:
        """Workers."""
        return self.costs.num_workers

    @cached_property
    def memory(self) -> MemoryPlan:
        """Peaks, and what the run directory will hold."""
        return self._memory_model.plan()

    @property
    def _memory_model(self) -> MemoryModel:
        return MemoryModel(self.costs, self.settings.in_process)

    # Work

    @cached_property
    def phases(self) -> tuple[PhaseEstimate, ...]:
        """Every phase in which anything is done."""
        total = added([self._start_work(), *(self._kind_work(kind) for kind in self._kinds())])
        return tuple(
            PhaseEstimate(
                phase,
                total[phase].operations,
                _bytes(total[phase]),
                self.costs.seconds_of({phase: total[phase]}),
            )
            for phase in PHASES
            if phase in total
        )

    @property
    def work_s(self) -> Amount:
        """Seconds of all workers together: processor seconds on CPUs."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def workers_start_s(self) -> Amount:
        """Processor seconds that the workers' own processes take to start, all together."""
        settings = self.settings
        return 0.0 if settings.in_process else self.num_workers * settings.process_start_s

    def _kinds(self) -> Sequence[BlockShape]:
        return self.costs.model.kinds

    def _start_work(self) -> WorkByPhase:
        """Embedding, and the checkpoint's part outside the blocks."""
        costs, outer = self.costs, self.costs.model.num_outer_parameters
        copied = Work()
        if costs.has_checkpoint:
            size = outer * costs.model.dtype_bytes
            copied = Work(read_bytes=size, written_bytes=size, memory_bytes=3 * size)
        if costs.text is None:
            return {"write": copied}
        unit = Unit(self._kinds()[0], tokens=costs.text.num_tokens)
        return added([{"write": copied}, costs.work("hold", unit)])

    def _kind_work(self, kind: BlockShape) -> WorkByPhase:
        """All blocks of a kind; those behind the last target are written only."""
        costs = self.costs
        computed = sum(i <= costs.model.last_target_block for i in kind.indices)
        stored = scaled(costs.work("store", Unit(kind)), kind.count)
        quantized = [costs.work("quantize", self._group_unit(kind, group)) for group in kind.groups]
        parts = [stored, scaled(added(quantized), computed)]
        if costs.text is not None:
            parts.append(scaled(self._carried(kind), computed))
        return added(parts)

    def _carried(self, kind: BlockShape) -> WorkByPhase:
        """One block's passes, on all workers together."""
        costs, unit = self.costs, Unit(kind, tokens=self.costs.text.num_tokens)
        parts = [scaled(costs.work("begin_block", unit), self.num_workers)]
        parts += [costs.work("observe", unit), costs.work("finish_block", unit)]
        if costs.qep is not None:
            applied = [costs.work("apply", Unit(kind, group)) for group in kind.groups]
            parts.append(scaled(added(applied), self.num_workers))
        return added(parts)

    def _group_unit(self, kind: BlockShape, group: InputGroup, num_rows: int | None = None) -> Unit:
        num_parts = 1
        if self.costs.text is not None:
            at_once = self.costs.num_at_once(kind, group)
            num_parts = sum(self.costs.num_contributions(group, at_once))
        return Unit(kind, group, num_rows=num_rows, num_parts=num_parts)

    # Time

    @property
    def wall_s(self) -> Amount:
        """Seconds of the run: all work shared evenly, or the longest chain of what must wait."""
        return self.settings.startup_s + max(self.work_s / self.num_workers, self.chain_s)

    @cached_property
    def chain_s(self) -> Amount:
        """Longest chain of calls of which each waits for the one before."""
        model, start = self.costs.model, self.costs.seconds_of(self._start_work())
        last = model.last_target_block
        chains = (sum(i <= last for i in k.indices) * self.block_chain_s(k) for k in model.kinds)
        return start / self.num_workers + sum(chains)

    def block_chain_s(self, kind: BlockShape) -> Amount:
        """Seconds of one block's chain.

        With error propagation every group waits for the one before it: observed by all workers,
        sent, factored by its owner, solved by all, sent, applied. Without, passes of all blocks
        go on, and groups wait for nobody but workers.
        """
        costs = self.costs
        if costs.text is None:
            return 0.0
        unit = Unit(kind, tokens=self._largest_share * costs.text.num_tokens)
        if costs.qep is None:
            return sum(costs.seconds(m, unit) for m in ("begin_block", "observe", "finish_block"))
        carried = sum(costs.seconds(m, unit) for m in ("begin_block", "finish_block", "store"))
        return carried + sum(self._group_chain_s(kind, group) for group in kind.groups)

    @property
    def _largest_share(self) -> Amount:
        """Part of the tokens that the worker with the most shards holds."""
        text = self.costs.text
        return text.most_shards(self.num_workers) / text.num_shards

    def _group_chain_s(self, kind: BlockShape, group: InputGroup) -> Amount:
        costs, tokens = self.costs, self._largest_share * self.costs.text.num_tokens
        rows = self._rows_of_one(group)
        calls = [
            ("observe_group", Unit(kind, group, tokens)),
            ("prepare", self._group_unit(kind, group)),
            ("quantize_pieces", self._group_unit(kind, group, rows)),
            ("apply", Unit(kind, group)),
        ]
        computed = sum(costs.seconds(method, unit) for method, unit in calls)
        return computed + costs.transfer_s(self._chain_bytes(kind, group))

    def _chain_bytes(self, kind: BlockShape, group: InputGroup) -> Amount:
        """Bytes that the owner of a group gets and gives, one after the other."""
        if self.num_workers == 1 or self.settings.in_process:
            return 0.0
        gathered = self.sums_sent_bytes(kind, group)
        prepared = self.costs.prepared_bytes(group) if self.costs.is_split(group) else 0.0
        return gathered + prepared + self.costs.results_bytes(group)

    def _rows_of_one(self, group: InputGroup) -> int:
        """Rows that the worker with the most of them solves."""
        rows = sum(group.out_features)
        if not self.costs.is_split(group):
            return rows
        pieces = even_cuts(rows, self.costs.row_tile(group))
        return min(rows, -(-len(pieces) // self.num_workers) * -(-rows // len(pieces)))

    # Network and cost

    def network_bytes(self, kind: BlockShape) -> Mapping[str, Amount]:
        """Bytes from worker to worker for one block of a kind, by what they are."""
        return self._memory_model.network_bytes(kind)

    def sums_sent_bytes(self, kind: BlockShape, group: InputGroup) -> Amount:
        """Contributions to a group's sums that have to leave a worker, at least."""
        return self._memory_model.least_sent_bytes(kind, group)

    @property
    def cost(self) -> Amount | None:
        """Price of all workers for the time of the run."""
        price = self.settings.price_per_hour
        return None if price is None else price * self.num_workers * self.wall_s / 3600


def scaled(work: WorkByPhase, factor: Amount) -> WorkByPhase:
    """So many times the work."""
    return {phase: amount * factor for phase, amount in work.items()}


def _bytes(work: Work) -> Amount:
    return work.memory_bytes + work.read_bytes + work.written_bytes
