"""The student of a gang: read from its checkpoint block by block, each sharded before the next."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onecomp.models import ModelConfig, Skeleton
from onecomp.models.skeleton import fill_outside
from onecomp.post_process.base import keeps_zero_points
from onecomp.post_process.blockwise.student_blocks import Patches, QuantizedBlocks
from onecomp.post_process.checkpointing import checkpointed_blocks
from onecomp.post_process.latents import LatentRates, references
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear, Trained

Partition = Callable[[nn.Module], None]
"""Leaves a rank its part of a module's parameters."""
NOTHING_LEARNED = "none"


@dataclass(frozen=True, eq=False)
class Learning:
    """How layers are made trainable."""

    trained: Trained
    reference: Callable[[str], Tensor | None]
    """The original weight of a layer, where it is needed."""


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """A model of which this rank holds its part."""

    model: nn.Module
    layers: Mapping[str, TrainableLinear]
    """By full name."""
    blocks: nn.ModuleList

    @contextmanager
    def checkpointed(self, *, enabled: bool) -> Iterator[None]:
        """Gradient checkpointing of every block inside the context."""
        with checkpointed_blocks(self.blocks) if enabled else nullcontext():
            yield


def quantized_blocks(checkpoint: Path, model_config: ModelConfig) -> QuantizedBlocks:
    """The blocks of a checkpoint, to be read one by one."""
    skeleton = Skeleton.build(model_config.source, model_config.training_dtype)
    return QuantizedBlocks(checkpoint, skeleton, Patches(checkpoint / NOTHING_LEARNED))


def trained_parts(blocks: QuantizedBlocks, latents: LatentRates) -> Trained:
    """What is trained of a checkpoint's layers."""
    return latents.trained(zero_points=keeps_zero_points(blocks.config))


def load_student(
    checkpoint: Path,
    model_config: ModelConfig,
    latents: LatentRates,
    device: torch.device,
    partition: Partition,
) -> ShardedModel:
    """Read a quantized model, its layers trainable; no more than a block is held unsharded.

    Args:
        checkpoint: Its directory.
        model_config: The original model.
        latents: Whether codes and signs are trained.
        device: Where it goes.
        partition: Called for each part as soon as it is complete.
    """
    blocks = quantized_blocks(checkpoint, model_config)
    skeleton = blocks.skeleton
    original = replace(skeleton, source=model_config.source)
    learning = Learning(trained_parts(blocks, latents), references(original, latents))
    layers = _load_outside(blocks, learning, device)
    for _, module in skeleton.outer_modules():
        partition(module)
    for index in range(len(skeleton.blocks)):
        block = blocks.load(index, device)
        layers |= _made_trainable(block, skeleton.block_name(index) + ".", learning)
        partition(block)
        skeleton.blocks[index] = block
    return ShardedModel(skeleton.model, layers, skeleton.blocks)


def _load_outside(
    blocks: QuantizedBlocks, learning: Learning, device: torch.device
) -> dict[str, TrainableLinear]:
    """Read what lies outside the blocks, which wait on the meta device."""
    model, quantized = blocks.skeleton.model, dict(outer_layers(blocks))
    for name in quantized:
        model.set_submodule(name, nn.Identity())
    fill_outside(blocks.skeleton, device)
    if not quantized:
        model.tie_weights()
    for name, layer in quantized.items():
        model.set_submodule(name, layer.to(device))
    return _made_trainable(model, "", learning)


def outer_layers(blocks: QuantizedBlocks) -> Iterator[tuple[str, QuantLinear]]:
    """Quantized layers outside the blocks, such as an output head, by full name."""
    inside = blocks.skeleton.blocks_name + "."
    for name in blocks.formats:
        if not name.startswith(inside):
            yield name, blocks.load_layer(name)


def _made_trainable(
    module: nn.Module, prefix: str, learning: Learning
) -> dict[str, TrainableLinear]:
    quantized = {n: m for n, m in module.named_modules() if isinstance(m, QuantLinear)}
    layers = {}
    for name, layer in quantized.items():
        made = layer.trainable(learning.trained, learning.reference(prefix + name))
        layers[prefix + name] = made
        _codes_as_parameters(made)
        module.set_submodule(name, made)
    return layers


def _codes_as_parameters(layer: TrainableLinear) -> None:
    """Make matrices of codes or signs parameters, which ZeRO shards, other than buffers."""
    for name, codes in list(layer.named_buffers(recurse=False)):
        if codes.dim() > 1:
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(codes, requires_grad=False))


def load_original(
    model_config: ModelConfig, device: torch.device, partition: Partition
) -> ShardedModel:
    """Read the original model in the same way."""
    skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
    fill_outside(skeleton, device)
    skeleton.model.tie_weights()
    for _, module in skeleton.outer_modules():
        partition(module)
    for index in range(len(skeleton.blocks)):
        block = skeleton.load_block(index, device)
        partition(block)
        skeleton.blocks[index] = block
    return ShardedModel(skeleton.model, {}, skeleton.blocks)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers that this rank holds at the moment."""
    tensors = [*module.parameters(), *module.buffers()]
    # DeepSpeed marks the parameters that it has partitioned with attributes of this name.
    tensors += [p.ds_tensor for p in module.parameters() if "ds_tensor" in vars(p)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
