"""Trading time for memory: blocks that keep their input only and are run again on the way back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from onecomp.models.calls import StandIn, in_place_of


class _Checkpointed(StandIn):
    """A block that forgets what it computed until the backward pass asks for it."""

    def __init__(self, block: nn.Module):
        super().__init__(block, returns_tuple=False)
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> object:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


@contextmanager
def checkpointed_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Gradient checkpointing of every block inside the context, with the same values.

    Args:
        blocks: The decoder blocks; they lie one level deeper meanwhile.
    """
    with in_place_of(blocks, [_Checkpointed(block) for block in blocks]):
        yield
