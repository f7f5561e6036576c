"""What one pass through a block costs, found by running the block on the meta device.

No weight and no activation exists there: operators compute shapes only. Counting the operations,
and the storages that are still referred to where a layer is called, needs no knowledge of the
architecture.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from onecomp.models.calls import BlockCall
from onecomp.models.dependencies import ObservedGroups
from onecomp.planning.amounts import Amount


@dataclass(frozen=True)
class Stop:
    """A pass in front of an input group."""

    layer_names: tuple[str, ...]
    """Target layers that are called with the same tensor, relative to the block."""
    operations: Amount
    """Multiplications and additions of products since the previous stop."""
    held_bytes: Amount
    """What the pass refers to while it waits here, the block's own input left out."""


@dataclass(frozen=True)
class Trace:
    """One pass of some tokens through a block."""

    stops: tuple[Stop, ...]
    last_operations: Amount
    """Behind the last stop."""
    peak_bytes: Amount
    """Most that exists at any moment, the block's own input left out."""
    dependencies: tuple[frozenset[int], ...]
    """For each stop, those in front of layers that its input depends on."""


class _LiveStorages(TorchDispatchMode):
    """Knows every storage that an operator made and that something still refers to.

    Args:
        given: Tensors that were there before; views of them are nothing new.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._made: list[weakref.ref[Tensor]] = []
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable,
        types: Collection[type],
        args: Sequence = (),
        kwargs: dict | None = None,
    ) -> object:
        """Run an operator and note what it made."""
        output = func(*args, **(kwargs or {}))
        parts = output if isinstance(output, tuple | list) else [output]
        self._made += [weakref.ref(part) for part in parts if isinstance(part, Tensor)]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return output

    def live_bytes(self) -> int:
        """Size of the storages that are still referred to; views of one count once."""
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = [tensor.untyped_storage() for tensor in alive]
        sizes = {storage._cdata: storage.nbytes() for storage in storages}
        return sum(size for key, size in sizes.items() if key not in self._given)


def _grouped_product(rows: Size, weights: Size, *_args: object, **_kwargs: object) -> int:
    """Operations of the product of experts, which the counter does not know: one expert a row."""
    return 2 * rows[0] * rows[-1] * weights[-1]


def trace_block(
    block: nn.Module, call: BlockCall, hidden: Tensor, targets: Collection[str]
) -> Trace:
    """Run a block once and note what happens in front of each input group.

    Args:
        block: All of it on the meta device.
        call: Its arguments, on the meta device.
        hidden: Hidden states in front of it, on the meta device.
        targets: Names of the layers to quantize, relative to the block.
    """
    live = _LiveStorages([*block.parameters(), *block.buffers(), hidden])
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_product}
    )
    observed = ObservedGroups()
    counted: list[Amount] = []
    held_bytes: list[int] = []

    def note() -> None:
        counted.append(counter.get_total_flops())
        held_bytes.append(live.live_bytes())

    layers = {name: module for name, module in block.named_modules() if name in targets}
    with observed.of(layers, note), torch.inference_mode(), counter, live, observed.flow:
        call.run(block, hidden)
    ends = [*counted, counter.get_total_flops()]
    parts = [after - before for before, after in zip([0, *ends], ends, strict=False)]
    stops = zip(map(tuple, observed.names), parts, held_bytes, strict=False)
    return Trace(
        tuple(Stop(*stop) for stop in stops),
        parts[-1],
        live.peak_bytes,
        observed.dependencies(),
    )
