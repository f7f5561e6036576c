"""What there is to quantize: blocks, their target layers, and which layers read the same input."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from onecomp.models.calls import BlockCall, record_calls
from onecomp.models.dependencies import ObservedGroups
from onecomp.models.skeleton import Skeleton

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8


@dataclass(frozen=True)
class InputGroup:
    """Target layers of one block that read the same input tensor."""

    block_index: int
    index: int
    """Position in the order in which the block calls its groups."""
    layer_names: tuple[str, ...]
    """Full names, in the order of their calls."""
    in_features: int
    out_features: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Weights in all its layers."""
        return self.in_features * sum(self.out_features)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` by layer name."""
        named = zip(self.layer_names, self.out_features, strict=True)
        return {name: (rows, self.in_features) for name, rows in named}

    def __str__(self) -> str:
        return ", ".join(self.layer_names)


@dataclass(frozen=True)
class BlockLayout:
    """One decoder block: its name and its input groups in the order of their calls."""

    index: int
    name: str
    groups: tuple[InputGroup, ...]
    dependencies: tuple[frozenset[int], ...] | None = None
    """For each group, those whose quantized weights its input depends on; None: all before it."""

    @cached_property
    def stages(self) -> list[list[InputGroup]]:
        """Groups that do not depend on each other, behind those that they depend on.

        >>> groups = tuple(InputGroup(0, i, (f"layer.{i}",), 8, (8,)) for i in range(3))
        >>> block = BlockLayout(0, "block", groups, (frozenset(), frozenset(), frozenset({0, 1})))
        >>> [[group.index for group in stage] for stage in block.stages]
        [[0, 1], [2]]
        """
        levels: list[int] = []
        for index, _ in enumerate(self.groups):
            behind = range(index) if self.dependencies is None else self.dependencies[index]
            levels.append(1 + max((levels[i] for i in behind), default=-1))
        stages: list[list[InputGroup]] = [[] for _ in range(1 + max(levels, default=-1))]
        for group, level in zip(self.groups, levels, strict=True):
            stages[level].append(group)
        return stages

    def short_names(self, group: InputGroup) -> list[str]:
        """Layer names relative to the block."""
        return [name.removeprefix(self.name + ".") for name in group.layer_names]


@dataclass(frozen=True)
class ModelLayout:
    """All blocks of a model up to the last one that holds a target layer."""

    blocks: tuple[BlockLayout, ...]
    num_blocks: int
    """Blocks the model has, quantized or not."""
    blocks_return_tuples: bool

    @property
    def groups(self) -> list[InputGroup]:
        """Every input group of the model, in order."""
        return [group for block in self.blocks for group in block.groups]

    @property
    def layer_names(self) -> list[str]:
        """Full names of all target layers, in order."""
        return [name for group in self.groups for name in group.layer_names]


def inspect_model(skeleton: Skeleton, targets: Collection[str]) -> ModelLayout:
    """Find the input groups of every block by running it once on the meta device.

    Two layers are in one group when they are called with the same tensor object. No weight is
    read: in front of the blocks the model is run with zeros that take no memory, and the blocks
    themselves compute shapes only.

    Args:
        skeleton: Model without weights.
        targets: Full names of the layers to quantize, all of them inside blocks.
    """
    calls, returns_tuple = _probe_calls(skeleton)
    blocks = tuple(_inspect_block(skeleton, i, call, targets) for i, call in enumerate(calls))
    last = max((b.index for b in blocks if b.groups), default=-1)
    return ModelLayout(blocks[: last + 1], len(blocks), returns_tuple)


def blocks_return_tuples(skeleton: Skeleton) -> bool:
    """Whether the model's blocks return tuples; found before any module of it has weights."""
    return _probe_calls(skeleton)[1]


def _probe_calls(skeleton: Skeleton) -> tuple[list[BlockCall], bool]:
    originals = {}
    for name, module in skeleton.outer_modules():
        for key, parameter in module.named_parameters(recurse=False):
            originals[name, key] = parameter
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
    try:
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
        hidden, [first] = record_calls(skeleton, ids, None, returns_tuple=False, num_blocks=1)
        returns_tuple = _returns_tuple(skeleton.blocks[0], hidden, first)
        _, calls = record_calls(skeleton, ids, None, returns_tuple=returns_tuple)
    finally:
        for (name, key), parameter in originals.items():
            skeleton.model.get_submodule(name)._parameters[key] = parameter
    return [_on_meta(call) for call in calls], returns_tuple


def _on_meta(call: BlockCall) -> BlockCall:
    return call.map_tensors(lambda tensor: tensor.to("meta"))


def _returns_tuple(block: nn.Module, hidden: Tensor, call: BlockCall) -> bool:
    call = _on_meta(call)
    with torch.inference_mode():
        return isinstance(block(hidden.to("meta"), *call.args, **call.kwargs), tuple)


def _inspect_block(
    skeleton: Skeleton, index: int, call: BlockCall, targets: Collection[str]
) -> BlockLayout:
    block, block_name = skeleton.blocks[index], skeleton.block_name(index)
    observed = ObservedGroups()
    modules = {f"{block_name}.{short}": module for short, module in block.named_modules()}
    layers = {name: module for name, module in modules.items() if name in targets}
    hidden = torch.empty(
        1,
        PROBE_TOKENS,
        skeleton.model.get_input_embeddings().embedding_dim,
        device="meta",
        dtype=skeleton.dtype,
    )
    with observed.of(layers), torch.inference_mode(), observed.flow:
        call.run(block, hidden)
    groups = tuple(
        InputGroup(index, position, tuple(names), *_features(skeleton.model, names))
        for position, names in enumerate(observed.names)
    )
    return BlockLayout(index, block_name, groups, observed.dependencies())


def _features(model: nn.Module, names: list[str]) -> tuple[int, tuple[int, ...]]:
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return layers[0].in_features, tuple(layer.out_features for layer in layers)
