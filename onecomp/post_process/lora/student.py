"""The quantized model while its adapters are trained."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from onecomp.models import ModelConfig
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.layers import set_dropout
from onecomp.post_process.lora.outputs import Outputs, blocks_of, outputs_of
from onecomp.post_process.lora.tokens import Batch
from onecomp.post_process.student import wide_parameters
from onecomp.quantizer.quant_linear import QuantLinear, dense_layers
from onecomp.resources import free_host_memory

logger = logging.getLogger(__name__)

DENSE_SHARE = 0.5
"""Of the free memory, what dequantized weights may take; activations need the other half."""
LOCAL_RANKS = "LOCAL_WORLD_SIZE"
"""Variable in which Ray Train, as torchrun, tells a worker how many there are on its machine."""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A quantized model whose adapters are trained."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    uses_bf16: bool
    """Compute in bfloat16 where torch's autocast does; adapters stay float32."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def outputs(self, batch: Batch, indices: tuple[int, ...]) -> Outputs:
        """What the model says of a batch; hidden states of the blocks in ``indices``."""
        device = self.device.type
        with torch.autocast(device, torch.bfloat16) if self.uses_bf16 else nullcontext():
            return outputs_of(self.model, self.blocks, batch, indices)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Without gradients and dropout inside the context."""
        set_dropout(self.model, active=False)
        try:
            with torch.no_grad():
                yield
        finally:
            set_dropout(self.model, active=True)


@contextmanager
def adapted_model(
    model: PreTrainedModel, model_config: ModelConfig, *, uses_bf16: bool | None, seed: int
) -> Iterator[AdaptedModel]:
    """Make a model with adapters ready for training, on the device of ``model_config``.

    Afterwards it is on the CPU and in evaluation mode again. What is frozen does not change, so
    that its weights are dequantized once for all steps where memory has room for them; otherwise
    in every forward pass.

    Args:
        model: On the CPU, with adapters.
        model_config: Where to compute.
        uses_bf16: Compute in bfloat16; None for where the device is fast at it.
        seed: Of dropout; torch's own random state is as it was afterwards.
    """
    model.eval().requires_grad_(requires_grad=False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad = True
    device = model_config.get_device()
    uses_bf16 = prefers_bf16(device) if uses_bf16 is None else uses_bf16
    blocks = blocks_of(model, model_config)
    with ExitStack() as stack:
        stack.callback(model.to, "cpu")
        stack.callback(set_dropout, model, active=False)
        model.to(device)
        dtype = torch.bfloat16 if uses_bf16 else training_dtype(model.dtype)
        if dense_weights_fit(model, dtype, device):
            stack.enter_context(dense_layers(model, dtype))
        stack.enter_context(wide_parameters(model))
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(seed)
        set_dropout(model, active=True)
        yield AdaptedModel(model, blocks, uses_bf16)


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of activations in training: float16 has too little range for gradients."""
    return torch.float32 if dtype == torch.float16 else dtype


def dense_weights_fit(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the dequantized weights of all quantized layers fit the memory that is free.

    Ranks on one machine share its memory evenly; GPUs they have for themselves.
    """
    needed = dtype.itemsize * sum(
        layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_host_memory() // ranks_on_machine()
    fits = needed <= DENSE_SHARE * free
    logger.info(
        "frozen weights are dequantized %s (%.2f GB, %.2f GB free)",
        "once" if fits else "in every pass", needed / 1e9, free / 1e9,
    )  # fmt: skip
    return fits


def ranks_on_machine() -> int:
    """How many ranks of a gang are on this machine, all where nothing tells; 1 without a gang."""
    if not distributed.is_initialized():
        return 1
    return int(os.environ.get(LOCAL_RANKS, distributed.get_world_size()))


def prefers_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
