"""The plain class behind every worker: it holds calibration shards and quantizes input groups."""

import copy
import math
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onecomp.calibration.shards import CalibrationShard
from onecomp.export.save import CheckpointWriter
from onecomp.jobs import (
    GroupReceipt,
    PieceResult,
    Preparation,
    PreparedGroup,
    block_events,
    group_pieces,
    join_pieces,
    prepare_group,
    quantize_piece,
)
from onecomp.models.calls import CallInterner, fill_on_demand, record_calls
from onecomp.models.layout import InputGroup, ModelLayout
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.qep.config import QEPConfig
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.pieces import RowPiece
from onecomp.quantizer.result import QuantizationResult
from onecomp.resources import device_here
from onecomp.statistics import Contribution, ShardSums, merge, total, with_sums
from onecomp.store import RunDirectory
from onecomp.stream import HeldShard, MicroBatch, OpenBlock, Streams


@dataclass(frozen=True)
class WorkerSettings:
    """Everything a worker has to know; the same for all workers of a run."""

    source: ModelSource
    dtype: torch.dtype
    device: str
    """``auto`` for CUDA where the worker sees one, else the CPU."""
    layout: ModelLayout
    quantizer: Quantizer
    qep: QEPConfig | None
    """Propagate errors: calibrate on the inputs that the quantized layers produce."""
    num_shards: int
    run: RunDirectory
    writer: CheckpointWriter | None
    """Where finished blocks go in the checkpoint's format; None for results only."""

    def device_here(self) -> torch.device:
        """The device of a worker in this process."""
        return device_here(self.device)


class Worker:
    """Carries its calibration shards through the model and quantizes the groups it owns.

    Nothing here knows where it runs. Per block the driver calls ``begin_block``, then
    ``observe``, ``quantize`` and ``apply`` for groups of layers, then ``finish_block``.
    """

    def __init__(self, number: int, settings: WorkerSettings):
        self.number, self.settings = number, settings
        settings.run.require_visible(f"worker {number}")
        self.device = settings.device_here()
        torch.set_num_threads(1)  # products shared by threads differ in the last bit, see executor
        self.skeleton = Skeleton.build(settings.source, settings.dtype)
        self._front: Skeleton | None = Skeleton.build(settings.source, settings.dtype)
        self._shards: list[HeldShard] = []
        self._moving: list[HeldShard] = []
        self._block: OpenBlock | None = None
        self._reader = ThreadPoolExecutor(1, "read-next-block")
        self._next: tuple[int, Future[nn.Module]] | None = None

    @staticmethod
    def peak_memory_bytes() -> int:
        """Largest resident memory of the worker's process so far."""
        return peak_memory_bytes()

    # Shards

    def hold(self, *shards: CalibrationShard) -> int:
        """Take calibration shards and run them through everything in front of the blocks.

        Returns:
            Number of tokens taken, padding not counted.
        """
        front = self._front or self._new_front()
        fill_on_demand(front, self.device)
        interner = CallInterner()
        for shard in shards:
            batches = [self._embed(front, interner, *b) for b in shard.micro_batches()]
            self._keep(HeldShard(shard.index, batches))
        self._front = None  # frees the embedding
        return sum(int(shard.attention_mask.sum()) for shard in shards)

    def _new_front(self) -> Skeleton:
        if self._next is not None:  # building modules changes torch for all threads
            self._next[1].result()
        return Skeleton.build(self.settings.source, self.settings.dtype)

    def _keep(self, shard: HeldShard) -> None:
        self._shards = sorted([*self._shards, shard], key=lambda held: held.index)

    def give(self, shard_indices: Collection[int]) -> list[HeldShard]:
        """Hand shards over, with all that their next holder needs to go on."""
        given = [shard for shard in self._shards if shard.index in shard_indices]
        self._shards = [shard for shard in self._shards if shard.index not in shard_indices]
        return [shard.to(torch.device("cpu")) for shard in given]

    def take(self, shards: Sequence[HeldShard]) -> None:
        """Hold shards that another worker gave; they go on where they are."""
        for shard in shards:
            self._keep(shard.to(self.device))

    def rewind(self, block_index: int) -> dict[int, int]:
        """Drop the block in work, and go back in front of a block with every shard behind it.

        Returns:
            By shard that is held still, the block in front of which it is: earlier ones have to
            be carried on.
        """
        self._shards = [shard for shard in self._shards if shard.rewind(block_index)]
        self._close_block()
        return {shard.index: shard.position for shard in self._shards}

    def _embed(
        self, skeleton: Skeleton, interner: CallInterner, input_ids: Tensor, mask: Tensor
    ) -> MicroBatch:
        is_padded = not bool(mask.all())
        hidden, calls = record_calls(
            skeleton,
            input_ids.to(self.device),
            mask.to(self.device) if is_padded else None,
            returns_tuple=self.settings.layout.blocks_return_tuples,
        )
        return MicroBatch(
            calls=[interner.intern(call) for call in calls[: len(self.settings.layout.blocks)]],
            streams=Streams(hidden, None if self.settings.qep is None else hidden),
            valid=mask.reshape(-1).bool().to(self.device) if is_padded else None,
        )

    # One block

    def begin_block(self, block_index: int, oldest: int | None = None) -> None:
        """Load a block and start the passes of every shard that is in front of it.

        Args:
            block_index: The block.
            oldest: First block that may have to be made again; default: this one.
        """
        original = self._load_block(block_index)
        quantized = None if self.settings.qep is None else copy.deepcopy(original)
        self._block = OpenBlock.of(self.settings.layout.blocks[block_index], original, quantized)
        self._moving = [shard for shard in self._shards if shard.position == block_index]
        for shard in self._moving:
            shard.enter(self._block, block_index if oldest is None else oldest)

    def _load_block(self, block_index: int) -> nn.Module:
        """The block, read ahead if it was; the next one is then read while this one is used."""
        if self._next is not None and self._next[0] == block_index:
            block = self._next[1].result()
        else:
            block = self.skeleton.load_block(block_index, self.device)
        following = block_index + 1
        self._next = None
        if following < len(self.settings.layout.blocks):
            future = self._reader.submit(self.skeleton.load_block, following, self.device)
            self._next = following, future
        return block

    def observe(
        self, group_indices: Sequence[int], few_rows: Sequence[float] | None = None
    ) -> list[list[Contribution]]:
        """Carry every pass to the given groups and sum up their inputs.

        Args:
            group_indices: Groups of the block, in the order of their calls.
            few_rows: For each group, the number of rows below which a worker may send them in
                place of their sums; default: any.

        Returns:
            For each group, this worker's nodes of the summation tree.
        """
        return self._sum_up(self._passes, group_indices, few_rows)

    def observe_group(self, group_index: int, few_rows: float = math.inf) -> list[Contribution]:
        """``observe`` for a single group: this worker's nodes of its summation tree."""
        return self.observe([group_index], [few_rows])[0]

    def observe_ahead(
        self, group_indices: Sequence[int], few_rows: Sequence[float] | None = None
    ) -> list[list[Contribution]]:
        """``observe`` for groups behind others that are not quantized, nor needed by them.

        The passes that do it begin anew and are thrown away; the block's own stay where they are.
        """
        return self._sum_up(self._passes_ahead, group_indices, few_rows)

    def observe_group_ahead(
        self, group_index: int, few_rows: float = math.inf
    ) -> list[Contribution]:
        """``observe_ahead`` for a single group."""
        return self.observe_ahead([group_index], [few_rows])[0]

    def _sum_up(
        self,
        passes_of: Callable[[HeldShard], Iterator[MicroBatch]],
        group_indices: Sequence[int],
        few_rows: Sequence[float] | None,
    ) -> list[list[Contribution]]:
        nodes: list[list[Contribution]] = [[] for _ in group_indices]
        limits = few_rows or [math.inf] * len(nodes)
        for shard in self._moving:
            sums = [ShardSums(shard.index) for _ in group_indices]
            for batch in passes_of(shard):
                for group_index, group_sums in zip(group_indices, sums, strict=True):
                    self._observe(batch, group_index, group_sums)
            for group_nodes, group_sums, limit in zip(nodes, sums, limits, strict=True):
                group_nodes[:] = self._added(group_nodes, group_sums.contribution(), limit)
        return nodes

    def _passes(self, shard: HeldShard) -> Iterator[MicroBatch]:
        """The passes of a shard; where nothing waits for a group, each then goes to the end."""
        for batch in shard.micro_batches:
            yield batch
            if self.settings.qep is None:
                batch.leave(is_last=self._is_last())

    def _passes_ahead(self, shard: HeldShard) -> Iterator[MicroBatch]:
        """Passes from the start of the block, one after the other."""
        for batch in shard.micro_batches:
            ahead = replace(batch)
            ahead.enter(self._block)
            yield ahead
            ahead.give_up()

    def _added(
        self, nodes: list[Contribution], leaf: Contribution | None, few_rows: float
    ) -> list[Contribution]:
        """Nodes with one more leaf; merged at once, so that few matrices are kept."""
        nodes = nodes if leaf is None else [*nodes, leaf]
        if sum(node.content.num_rows for node in nodes) >= few_rows:
            nodes = with_sums(nodes)
        return merge(nodes, self.settings.num_shards)

    def merge(self, *contributions: Sequence[Contribution]) -> list[Contribution]:
        """Add up what several workers contribute to a group, as far as the tree allows."""
        return merge([node for part in contributions for node in part], self.settings.num_shards)

    def _observe(self, batch: MicroBatch, group_index: int, sums: ShardSums) -> None:
        current = batch.original_pass if batch.quantized_pass is None else batch.quantized_pass
        inputs = current.run_to(group_index)
        if inputs is None:
            return
        original = None
        if self._is_corrected(self._block.layout.groups[group_index]):
            original = batch.rows(batch.original_pass.run_to(group_index))
        sums.add(batch.rows(inputs), original)

    def _is_corrected(self, group: InputGroup) -> bool:
        qep = self.settings.qep
        return qep is not None and any(qep.corrects(name) for name in group.layer_names)

    def apply(
        self, group_indices: Sequence[int], *results: Mapping[str, QuantizationResult]
    ) -> None:
        """Give the quantized copy of the block the weights of quantized groups, if there is one."""
        if self._block.quantized is None:
            return
        for group_index, of_group in zip(group_indices, results, strict=True):
            self._apply(self._block.layout.groups[group_index], of_group)

    def _apply(self, group: InputGroup, results: Mapping[str, QuantizationResult]) -> None:
        for short, name in zip(
            self._block.layout.short_names(group), group.layer_names, strict=True
        ):
            weight = results[name].dequantize(self.device).to(self.settings.dtype)
            layer = self._block.quantized.module.get_submodule(short)
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def finish_block(self) -> None:
        """Carry every pass to the end of the block; nothing follows the last one."""
        for shard in self._moving:
            shard.leave(is_last=self._is_last())
        self._close_block()

    def _close_block(self) -> None:
        self._moving = []
        if self._block is not None:
            self._block.close()
        self._block = None

    def _is_last(self) -> bool:
        return self._block.layout.index == len(self.settings.layout.blocks) - 1

    def replay_block(self, block_index: int) -> None:
        """Carry the shards in front of a block that is finished already through it."""
        self.begin_block(block_index)
        if self.settings.qep is not None:
            results = self.settings.run.read_block(block_index)
            for group in self._block.layout.groups:
                self._apply(group, results)
        self.finish_block()

    # Groups

    def device_type(self) -> str:
        """``cpu`` or ``cuda``; pieces of rows are cut for it."""
        return self.device.type

    def quantize(
        self, group: InputGroup, *contributions: Sequence[Contribution]
    ) -> tuple[dict[str, QuantizationResult], GroupReceipt]:
        """Quantize a group from all workers' contributions to its sums."""
        prepared, preparation = self.prepare(group, *contributions)
        pieces = self.quantize_pieces(group, range(len(self.pieces(group))), prepared)
        return self.join(group, preparation, pieces)

    def prepare(
        self, group: InputGroup, *contributions: Sequence[Contribution]
    ) -> tuple[PreparedGroup, Preparation]:
        """Make what the pieces of a group share, from all workers' contributions to its sums."""
        started = time.monotonic()
        settings = self.settings
        nodes = [node for part in contributions for node in part]
        statistics = total(nodes, settings.num_shards) if nodes else None
        prepared = prepare_group(
            settings.quantizer, statistics, settings.qep, group.layer_names, group.in_features,
            device=self.device,
        )  # fmt: skip
        return prepared, Preparation(
            num_tokens=prepared.num_tokens,
            seconds=time.monotonic() - started,
            received_bytes=sum(node.content.num_bytes for node in nodes),
        )

    def quantize_pieces(
        self, group: InputGroup, numbers: Sequence[int], prepared: PreparedGroup
    ) -> list[PieceResult]:
        """Quantize some of the pieces into which a group's rows are cut."""
        settings, prepared = self.settings, prepared.to(self.device)
        pieces = self.pieces(group)
        return [
            quantize_piece(
                settings.quantizer,
                pieces[number],
                self.rows(pieces[number]),
                prepared,
                settings.qep,
            ).map_results(QuantizationResult.narrowed)
            for number in numbers
        ]

    def join(
        self, group: InputGroup, preparation: Preparation, *parts: Sequence[PieceResult]
    ) -> tuple[dict[str, QuantizationResult], GroupReceipt]:
        """Put a group together from its pieces."""
        pieces = [piece.map_results(QuantizationResult.widened) for part in parts for piece in part]
        results, fallbacks = join_pieces(group.layer_names, pieces)
        return {name: result.narrowed() for name, result in results.items()}, GroupReceipt(
            layers={name: _numbers(result) for name, result in results.items()},
            fallbacks=fallbacks,
            num_tokens=preparation.num_tokens,
            seconds=preparation.seconds + sum(piece.seconds for piece in pieces),
            worker=self.number,
            received_bytes=preparation.received_bytes,
        )

    def pieces(self, group: InputGroup) -> list[RowPiece]:
        """The pieces of rows that a group is solved in."""
        return group_pieces(self.settings.quantizer, group, self.device.type)

    def rows(self, piece: RowPiece) -> dict[str, Tensor]:
        """Weights of a piece, float32, by layer name: no more than these is read."""
        rows = {}
        for part in piece.ranges:
            stored = self.skeleton.tensor_name(f"{part.layer_name}.weight")
            read = self.settings.source.read_rows(stored, part.start, part.stop)
            rows[part.layer_name] = read.to(self.settings.dtype).to(self.device).float()
        return rows

    # Finished blocks

    def store(self, block_index: int, num_groups: int, *parts: object) -> None:
        """Write a block's part of the checkpoint, then its results, which mark it finished.

        Args:
            block_index: The block.
            num_groups: Groups of the block.
            *parts: Results of each group, by layer name; then the receipt of each.
        """
        merged = {n: result.widened() for part in parts[:num_groups] for n, result in part.items()}
        self.export(block_index, merged)
        journal = block_events(block_index, parts[num_groups:])
        self.settings.run.write_block(block_index, merged, journal)

    def export(
        self, block_index: int, results: Mapping[str, QuantizationResult] | None = None
    ) -> None:
        """Write a block's part of the checkpoint.

        Args:
            block_index: The block.
            results: Of its layers; None for those in the run directory, unless an earlier run
                wrote this part already.
        """
        run, writer = self.settings.run, self.settings.writer
        if writer is None or (results is None and writer.has_block(self.skeleton, block_index)):
            return
        if results is None:
            results = run.read_block(block_index) if run.has_block(block_index) else {}
        writer.write_block(self.skeleton, block_index, results)

    def export_outer(self) -> None:
        """Write the part of the checkpoint that lies outside the blocks, if it is not there."""
        writer = self.settings.writer
        if writer is not None and not writer.has_outer(self.skeleton):
            writer.write_outer(self.skeleton)


def _numbers(result: QuantizationResult) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {
        name: value for name, value in result.get_statistics().items() if value is not None
    }
    bits = result.nominal_bits()
    return numbers if bits is None else numbers | {"bits": float(bits)}


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since it began.

    Linux counts in ``ru_maxrss`` what the parent had when it forked; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [line] = [row for row in status.read_text().splitlines() if row.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
