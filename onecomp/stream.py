"""Calibration samples on their way through the blocks, as one worker holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class MicroBatch:
    """Samples that go through a block together."""

    calls: list[BlockCall]
    hidden: Tensor
    """Full-precision stream, in front of the block that comes next."""
    quantized: Tensor | None
    """The same in the model quantized so far; None where errors are not propagated."""
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
        self.original_pass = SuspendedForward(block.original, call, self.hidden)
        if block.quantized is not None:
            self.quantized_pass = SuspendedForward(block.quantized, call, self.quantized)

    def leave(self, *, is_last: bool) -> None:
        """Carry the passes to the end of the block; behind the last one nothing is wanted."""
        if self.original_pass is None:
            return
        if not is_last:
            self.hidden = self.original_pass.finish()
        self.original_pass.close()
        if self.quantized_pass is not None:
            if not is_last:
                self.quantized = self.quantized_pass.finish()
            self.quantized_pass.close()
        self.original_pass = self.quantized_pass = None


@dataclass
class HeldShard:
    """A calibration shard in the hands of its worker."""

    index: int
    micro_batches: list[MicroBatch] = field(default_factory=list)
