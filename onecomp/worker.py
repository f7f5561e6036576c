"""The plain class behind every worker: it holds calibration shards and quantizes input groups."""

import resource
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onecomp.calibration.shards import CalibrationShard
from onecomp.errors import InputError
from onecomp.export.save import CheckpointWriter
from onecomp.jobs import GroupReceipt, quantize_group
from onecomp.models.calls import CallInterner, fill_on_demand, record_calls
from onecomp.models.layout import InputGroup, ModelLayout
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.qep.config import QEPConfig
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.result import QuantizationResult
from onecomp.statistics import Contribution, ShardSums, merge_held, total
from onecomp.store import RunDirectory
from onecomp.stream import HeldShard, MicroBatch, OpenBlock


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


class Worker:
    """Carries its calibration shards through the model and quantizes the groups it owns.

    Nothing here knows where it runs. Per block the driver calls ``begin_block``, then
    ``observe``, ``quantize`` and ``apply`` for groups of layers, then ``finish_block``.
    """

    def __init__(self, number: int, settings: WorkerSettings):
        self.number, self.settings = number, settings
        if not settings.run.exists:
            raise InputError(
                settings.run.path,
                f"is not seen by worker {number} on {socket.gethostname()}. Give a --run-dir on "
                "storage that every node sees.",
            )
        use_cuda = settings.device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda" if use_cuda else settings.device.replace("auto", "cpu"))
        torch.set_num_threads(1)  # products shared by threads differ in the last bit, see executor
        self.skeleton = Skeleton.build(settings.source, settings.dtype)
        self._front: Skeleton | None = Skeleton.build(settings.source, settings.dtype)
        self._shards: list[HeldShard] = []
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
        fill_on_demand(self._front, self.device)
        interner = CallInterner()
        for shard in shards:
            batches = [self._embed(self._front, interner, *b) for b in shard.micro_batches()]
            self._shards.append(HeldShard(shard.index, batches))
        self._front = None  # frees the embedding
        return sum(int(shard.attention_mask.sum()) for shard in shards)

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
            hidden=hidden,
            quantized=None if self.settings.qep is None else hidden,
            valid=mask.reshape(-1).bool().to(self.device) if is_padded else None,
        )

    # One block

    def begin_block(self, block_index: int) -> None:
        """Load a block and start every micro-batch's pass through it."""
        original = self._load_block(block_index)
        quantized = None
        if self.settings.qep is not None:
            quantized = self.skeleton.load_block(block_index, self.device)
        self._block = OpenBlock.of(self.settings.layout.blocks[block_index], original, quantized)
        for batch in self._micro_batches():
            batch.enter(self._block)

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

    def _micro_batches(self) -> list[MicroBatch]:
        return [batch for shard in self._shards for batch in shard.micro_batches]

    def observe(self, group_indices: Sequence[int]) -> list[list[Contribution]]:
        """Carry every pass to the given groups and sum up their inputs.

        Returns:
            For each group, this worker's nodes of the summation tree.
        """
        leaves: list[list[Contribution]] = [[] for _ in group_indices]
        for shard in self._shards:
            sums = [ShardSums(shard.index) for _ in group_indices]
            for batch in shard.micro_batches:
                for group_index, group_sums in zip(group_indices, sums, strict=True):
                    self._observe(batch, group_index, group_sums)
                if self.settings.qep is None:
                    batch.leave(is_last=self._is_last())
            for group_leaves, group_sums in zip(leaves, sums, strict=True):
                if (leaf := group_sums.contribution()) is not None:
                    group_leaves.append(leaf)
        return [merge_held(group_leaves, self.settings.num_shards) for group_leaves in leaves]

    def observe_group(self, group_index: int) -> list[Contribution]:
        """``observe`` for a single group: this worker's nodes of its summation tree."""
        return self.observe([group_index])[0]

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

    def apply(self, group_index: int, results: Mapping[str, QuantizationResult]) -> None:
        """Give the quantized copy of the block the weights of a quantized group."""
        group = self._block.layout.groups[group_index]
        if self._block.quantized is None:
            return
        for short, name in zip(
            self._block.layout.short_names(group), group.layer_names, strict=True
        ):
            weight = results[name].dequantize(self.device).to(self.settings.dtype)
            layer = self._block.quantized.module.get_submodule(short)
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def finish_block(self) -> None:
        """Carry every pass to the end of the block; nothing follows the last one."""
        for batch in self._micro_batches():
            batch.leave(is_last=self._is_last())
        self._block.close()
        self._block = None

    def _is_last(self) -> bool:
        return self._block.layout.index == len(self.settings.layout.blocks) - 1

    def replay_block(self, block_index: int) -> None:
        """Carry the shards through a block that is finished already."""
        self.begin_block(block_index)
        results = self.settings.run.read_block(block_index)
        for group in self._block.layout.groups:
            self.apply(group.index, results)
        self.finish_block()

    # Groups

    def quantize(
        self, group: InputGroup, *contributions: Sequence[Contribution]
    ) -> tuple[dict[str, QuantizationResult], GroupReceipt]:
        """Quantize a group from all workers' contributions to its sums."""
        started = time.monotonic()
        settings = self.settings
        nodes = [node for part in contributions for node in part]
        statistics = total(nodes, settings.num_shards) if nodes else None
        results, fallbacks = quantize_group(
            settings.quantizer, self._weights(group), statistics, settings.qep
        )
        receipt = GroupReceipt(
            layers={name: _numbers(result) for name, result in results.items()},
            fallbacks=fallbacks,
            num_tokens=0 if statistics is None else statistics.num_tokens,
            seconds=time.monotonic() - started,
            worker=self.number,
            received_bytes=sum(node.content.num_bytes for node in nodes),
        )
        return results, receipt

    def _weights(self, group: InputGroup) -> dict[str, Tensor]:
        stored = {n: self.skeleton.tensor_name(f"{n}.weight") for n in group.layer_names}
        tensors = self.settings.source.read(stored.values(), dtype=self.settings.dtype)
        return {name: tensors[key].to(self.device).float() for name, key in stored.items()}

    # Finished blocks

    def store(self, block_index: int, *results: Mapping[str, QuantizationResult]) -> None:
        """Write a block's part of the checkpoint, then its results, which mark it finished."""
        merged = {name: result for part in results for name, result in part.items()}
        self.export(block_index, merged)
        self.settings.run.write_block(block_index, merged)

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
    bits = result.values().get("wbits")
    return numbers | {"bits": float(bits)} if isinstance(bits, int) else numbers


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since it began.

    Linux counts in ``ru_maxrss`` what the parent had when it forked; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [line] = [row for row in status.read_text().splitlines() if row.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
