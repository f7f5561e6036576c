"""How each block is called: recorded by running the model with its blocks replaced."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from onecomp.models.skeleton import Skeleton, fill


@dataclass(frozen=True)
class BlockCall:
    """Arguments of one block's call other than the hidden states."""

    args: tuple = ()
    kwargs: dict[str, object] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: Float[Tensor, "*batch hidden"]) -> Tensor:
        """Hidden states behind the block."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "BlockCall":
        """The same call with every tensor replaced by ``change(tensor)``."""
        return BlockCall(_map(self.args, change), _map(self.kwargs, change))


class LastBlockReachedError(Exception):
    """Ends the recording; nothing behind the blocks is computed."""


class StandIn(nn.Module):
    """Stands in for a block, with the attributes that models read of their blocks."""

    def __init__(self, block: nn.Module, returns_tuple: bool):
        super().__init__()
        self.attributes = {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)


class _Recorder(StandIn):
    """Notes the block's call and hands the hidden states on."""

    hidden: Tensor

    def __init__(self, block: nn.Module, returns_tuple: bool, is_last: bool):
        super().__init__(block, returns_tuple)
        self.is_last = is_last
        self.call = BlockCall()

    def forward(self, *args: object, **kwargs: object) -> object:
        if args:
            self.hidden, args = args[0], args[1:]
        else:
            self.hidden = kwargs.pop("hidden_states")
        self.call = BlockCall(args, kwargs)
        if self.is_last:
            raise LastBlockReachedError
        return (self.hidden,) if self.returns_tuple else self.hidden


def record_calls(
    skeleton: Skeleton,
    input_ids: Int[Tensor, "samples length"],
    attention_mask: Int[Tensor, "samples length"] | None,
    *,
    returns_tuple: bool,
    num_blocks: int | None = None,
) -> tuple[Float[Tensor, "samples length hidden"], list[BlockCall]]:
    """Hidden states in front of the first block, and the call of every block.

    Args:
        skeleton: Model whose modules in front of the blocks can be run, see ``fill_on_demand``.
        input_ids: Tokens.
        attention_mask: 0 where a token is padding; None when there is none.
        returns_tuple: Whether the model's blocks return tuples.
        num_blocks: Record only the first blocks.
    """
    blocks = skeleton.blocks
    count = len(blocks) if num_blocks is None else num_blocks
    recorders = [_Recorder(b, returns_tuple, i == count - 1) for i, b in enumerate(blocks)]
    with in_place_of(blocks, recorders), suppress(LastBlockReachedError), torch.inference_mode():
        skeleton.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return recorders[0].hidden, [recorder.call for recorder in recorders[:count]]


class _Source(StandIn):
    """Hands on hidden states that are known, whatever comes in."""

    def __init__(self, block: nn.Module, returns_tuple: bool, hidden: Tensor):
        super().__init__(block, returns_tuple)
        self.hidden = hidden

    def forward(self, *_args: object, **_kwargs: object) -> object:
        return (self.hidden,) if self.returns_tuple else self.hidden


def logits_behind(
    skeleton: Skeleton,
    hidden: Float[Tensor, "samples length hidden"],
    input_ids: Int[Tensor, "samples length"],
    attention_mask: Int[Tensor, "samples length"] | None,
    *,
    returns_tuple: bool,
) -> Float[Tensor, "samples length vocabulary"]:
    """What the model makes of the hidden states behind its last block, by its own code.

    Args:
        skeleton: Model whose modules outside the blocks can be run.
        hidden: Hidden states behind the last block.
        input_ids: Tokens that they are of.
        attention_mask: 0 where a token is padding; None when there is none.
        returns_tuple: Whether the model's blocks return tuples.
    """
    blocks = skeleton.blocks
    with in_place_of(blocks, [_Source(block, returns_tuple, hidden) for block in blocks]):
        output = skeleton.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.logits


@contextmanager
def in_place_of(blocks: nn.ModuleList, others: Sequence[nn.Module]) -> Iterator[None]:
    """Let other modules be the first blocks of a model inside the context."""
    originals = list(blocks)
    for index, other in enumerate(others):
        blocks[index] = other
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


def fill_on_demand(skeleton: Skeleton, device: torch.device) -> None:
    """Read the weights of a module outside the blocks when it is first called, and only then.

    So the embedding is read, and the output head, which is never reached, is not.
    """
    for name, module in skeleton.outer_modules():
        _fill_at_first_call(module, name, skeleton, device)
    for module in skeleton.model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)


def _fill_at_first_call(
    module: nn.Module, name: str, skeleton: Skeleton, device: torch.device
) -> None:
    def read_weights(module: nn.Module, _args: object) -> None:
        handle.remove()
        fill(module, name, skeleton, device)

    handle = module.register_forward_pre_hook(read_weights)


class CallInterner:
    """Keeps one copy of equal tensors, so that masks and rotary tables of all batches cost one.

    Args:
        keep: What is kept of a tensor when it is first seen; ``torch.clone`` where autograd runs,
            which takes no tensors that were made for inference.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._keep = keep
        self._known: dict[tuple, Tensor] = {}

    def intern(self, call: BlockCall) -> BlockCall:
        """The same call, its tensors shared with earlier calls of equal content."""
        return call.map_tensors(self._intern_tensor)

    def _intern_tensor(self, tensor: Tensor) -> Tensor:
        plain = tensor.detach().cpu().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        key = (tuple(tensor.shape), tensor.dtype, hashlib.sha256(content).digest())
        if key not in self._known:
            self._known[key] = self._keep(tensor)
        return self._known[key]


def _map(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value
