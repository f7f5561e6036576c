"""A model without weights: its modules on the meta device, its blocks found by structure."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from onecomp.errors import InputError
from onecomp.models.source import CONFIG_ERRORS, ModelSource, reason

TEXT_PARTS = ("language_model", "text_model")


@dataclass(frozen=True)
class Skeleton:
    """Modules of a model whose parameters are on the meta device and whose buffers are real."""

    source: ModelSource
    model: PreTrainedModel
    blocks_name: str
    """Full name of the list of decoder blocks, e.g. ``model.layers``."""
    dtype: torch.dtype

    @classmethod
    def build(cls, source: ModelSource, dtype: torch.dtype) -> "Skeleton":
        """Modules from the configuration alone; reads no weight.

        Raises:
            InputError: The configuration gives no causal language model, or nothing in the
                architecture looks like a list of decoder blocks.
        """
        config = copy.deepcopy(source.config)
        try:
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=source.trust_remote_code
                )
        except CONFIG_ERRORS as error:
            raise InputError(
                source.directory / "config.json",
                f"describes no causal language model that can be built ({reason(error)}). "
                "Correct it, or give a decoder-only model.",
            ) from error
        return cls(source, model.eval(), find_blocks(model, source), dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self.model.get_submodule(self.blocks_name)

    def block_name(self, index: int) -> str:
        """Full name of one block, e.g. ``model.layers.3``."""
        return f"{self.blocks_name}.{index}"

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """A fresh copy of one block with its weights on ``device``."""
        block = self.fresh_block(index)
        fill(block, self.block_name(index), self, device)
        return block

    def fresh_block(self, index: int) -> nn.Module:
        """A copy of one block without weights."""
        return copy.deepcopy(self.blocks[index])

    def outer_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules outside the blocks that hold parameters of their own, by full name."""
        prefix = self.blocks_name + "."
        for name, module in self.model.named_modules():
            if not name.startswith(prefix) and any(True for _ in module.parameters(recurse=False)):
                yield name, module

    def tensor_name(self, name: str) -> str:
        """Name under which a checkpoint of this model keeps the parameter ``name``.

        Checkpoints written from the bare model lack the prefix of the causal-LM class.
        """
        base = self.model.base_model_prefix + "."
        candidates = (name, name.removeprefix(base), base + name)
        return next((c for c in candidates if c in self.source.tensor_files), name)


def find_blocks(model: nn.Module, source: ModelSource) -> str:
    """Full name of the largest module list whose every entry contains linear layers.

    In a model of several parts (vision and language) only the language part is searched.

    Raises:
        InputError: There is no such list.
    """
    candidates = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_has_linear, module))
    }
    text = {n: size for n, size in candidates.items() if any(part in n for part in TEXT_PARTS)}
    if not candidates:
        raise InputError(
            source.directory,
            f"the architecture {type(model).__name__} has no list of blocks with linear layers, "
            "so it cannot be quantized block by block. Decoder-only transformers are supported.",
        )
    return max(text or candidates, key=(text or candidates).__getitem__)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def fill(module: nn.Module, name: str, skeleton: Skeleton, device: torch.device) -> None:
    """Give a module on the meta device its weights from the checkpoint.

    Args:
        module: Its parameters are replaced, recursively.
        name: The module's full name in the model.
        skeleton: Model and checkpoint.
        device: Where parameters and buffers go.
    """
    wanted = {key: skeleton.tensor_name(f"{name}.{key}") for key, _ in module.named_parameters()}
    tensors = skeleton.source.read(wanted.values(), dtype=skeleton.dtype)
    persistent = {
        key: stored
        for key in module.state_dict()
        if key not in wanted
        and (stored := skeleton.tensor_name(f"{name}.{key}")) in skeleton.source.tensor_files
    }
    tensors |= skeleton.source.read(persistent.values())
    state = {key: tensors[stored].to(device) for key, stored in (wanted | persistent).items()}
    module.load_state_dict(state, assign=True, strict=False)
    module.requires_grad_(requires_grad=False)
    for child in module.modules():
        for key, buffer in child.named_buffers(recurse=False):
            child._buffers[key] = buffer.to(device)


def fill_outside(skeleton: Skeleton, device: torch.device) -> None:
    """Read everything outside the blocks; an output head that is tied gets the embedding's weight.

    Args:
        skeleton: Its modules are filled in place.
        device: Where they go.
    """
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    modules = dict(skeleton.outer_modules())
    names = {id(module): name for name, module in modules.items()}
    for name, module in modules.items():
        stored = skeleton.tensor_name(f"{name}.weight")
        is_tied = module is head and stored not in skeleton.source.tensor_files
        fill(module, names[id(embedding)] if is_tied else name, skeleton, device)
    for module in skeleton.model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
