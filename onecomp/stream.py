"""Calibration samples on their way through the blocks, as one worker holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onecomp.models.calls import BlockCall
from onecomp.models.layout import BlockLayout
from onecomp.models.suspended import StoppingBlock, SuspendedForward


@dataclass
class OpenBlock:
    """The block that is being worked on: its original and, with propagation, its quantized copy."""

    layout: BlockLayout
    original: StoppingBlock
    quantized: StoppingBlock | None

    @classmethod
    def of(
        cls, layout: BlockLayout, original: nn.Module, quantized: nn.Module | None
    ) -> "OpenBlock":
        """A block whose passes stop in front of its input groups."""
        groups: Sequence[Sequence[str]] = [layout.short_names(group) for group in layout.groups]
        copy = None if quantized is None else StoppingBlock(quantized, groups)
        return cls(layout, StoppingBlock(original, groups), copy)

    def close(self) -> None:
        """Let go of the modules, so that their memory is free at once."""
        self.original.release()
        if self.quantized is not None:
            self.quantized.release()


class Streams(NamedTuple):
    """Hidden states of some samples in front of one block."""

    hidden: Tensor
    """Full-precision stream."""
    quantized: Tensor | None
    """The same in the model quantized so far; None where errors are not propagated."""


@dataclass
class MicroBatch:
    """Samples that go through a block together."""

    calls: list[BlockCall]
    streams: Streams
    """In front of the block that comes next."""
    valid: Tensor | None
    """Which rows are tokens and not padding; None when all are."""
    original_pass: SuspendedForward | None = None
    quantized_pass: SuspendedForward | None = None

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as rows, padding left out."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows if self.valid is None else rows[self.valid]

    def enter(self, block: OpenBlock) -> None:
        """Start the passes through a block; they stop in front of its first group."""
        call = self.calls[block.layout.index]
        self.original_pass = SuspendedForward(block.original, call, self.streams.hidden)
        if block.quantized is not None:
            self.quantized_pass = SuspendedForward(block.quantized, call, self.streams.quantized)

    def leave(self, *, is_last: bool) -> None:
        """Carry the passes to the end of the block; behind the last one nothing is wanted."""
        if self.original_pass is None:
            return
        if not is_last:
            quantized = None if self.quantized_pass is None else self.quantized_pass.finish()
            self.streams = Streams(self.original_pass.finish(), quantized)
        self.give_up()

    def give_up(self) -> None:
        """Leave the passes where they are; the streams stay in front of the block."""
        for forward in (self.original_pass, self.quantized_pass):
            if forward is not None:
                forward.close()
        self.original_pass = self.quantized_pass = None


@dataclass
class HeldShard:
    """A calibration shard in the hands of its worker."""

    index: int
    micro_batches: list[MicroBatch] = field(default_factory=list)
    position: int = 0
    """The block in front of which the streams are."""
    entries: dict[int, list[Streams]] = field(default_factory=dict)
    """Streams in front of blocks that may have to be made again, by block."""

    def enter(self, block: OpenBlock, oldest: int) -> None:
        """Start the passes through the block; no one goes back further than to ``oldest``.

        Args:
            block: The block at ``position``.
            oldest: First block that is not safely stored.
        """
        self.entries = {b: streams for b, streams in self.entries.items() if b >= oldest}
        self.entries[self.position] = [batch.streams for batch in self.micro_batches]
        for batch in self.micro_batches:
            batch.enter(block)

    def leave(self, *, is_last: bool) -> None:
        """Carry the passes to the end of the block."""
        for batch in self.micro_batches:
            batch.leave(is_last=is_last)
        self.position += 1

    def rewind(self, block_index: int) -> bool:
        """Give up open passes and go back in front of a block; stays where it is if before it.

        Returns:
            Whether the streams there are known.
        """
        for batch in self.micro_batches:
            batch.give_up()
        if self.position <= block_index:
            return True
        if block_index not in self.entries:
            return False
        for batch, streams in zip(self.micro_batches, self.entries[block_index], strict=True):
            batch.streams = streams
        self.position = block_index
        self.entries = {b: streams for b, streams in self.entries.items() if b < block_index}
        return True

    def to(self, device: torch.device) -> "HeldShard":
        """A copy of everything on a device; what is shared here is shared there."""
        copies: dict[int, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(device, copy=True)
            return copies[id(tensor)]

        def copied_streams(streams: Streams) -> Streams:
            quantized = None if streams.quantized is None else copied(streams.quantized)
            return Streams(copied(streams.hidden), quantized)

        batches = [
            replace(
                batch,
                calls=[call.map_tensors(copied) for call in batch.calls],
                streams=copied_streams(batch.streams),
                valid=None if batch.valid is None else copied(batch.valid),
            )
            for batch in self.micro_batches
        ]
        entries = {block: [copied_streams(s) for s in kept] for block, kept in self.entries.items()}
        return HeldShard(self.index, batches, self.position, entries)
