"""The quantized model while it is trained: on its device, its quantized layers trainable."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from onecomp.models import ModelConfig
from onecomp.models.skeleton import Skeleton
from onecomp.post_process.base import keeps_zero_points, quantization_config
from onecomp.post_process.checkpointing import checkpointed_blocks
from onecomp.post_process.engine import ParameterGroup
from onecomp.post_process.latents import SCALES_ALONE, LatentRates, references
from onecomp.quantizer.checks import positive_problems
from onecomp.quantizer.gptq.trainable import TrainableCodes
from onecomp.quantizer.quant_linear import trainable_layers
from onecomp.quantizer.trainable import TrainableLinear

ZERO_POINT_TRAVEL = 2.0
"""Code steps that a zero point could travel in all steps of a course at the peak rate."""


@dataclass(frozen=True, kw_only=True)
class StudentRates:
    """Learning rates of a whole model."""

    codes_scale: float | int
    """Of scales of integer codes, absolute."""
    signs_scale: float | int
    """Of scales of signs, likewise."""
    latents: LatentRates = SCALES_ALONE


@dataclass(kw_only=True)
class TrainsDecisions:
    """Settings of processes that may train codes and signs of the whole model, beside scales."""

    gptq_optimize_intweight: bool = False
    gptq_intweight_lr: float = 4e-5
    optimize_binary: bool = False
    binary_lr: float = 3e-5

    @property
    def latents(self) -> LatentRates:
        """Rates of what is trained of codes and signs."""
        return LatentRates(
            codes=self.gptq_intweight_lr if self.gptq_optimize_intweight else 0.0,
            signs=self.binary_lr if self.optimize_binary else 0.0,
        )

    def latent_problems(self) -> list[str]:
        """What is wrong with the rates."""
        return positive_problems(
            {"gptq_intweight_lr": self.gptq_intweight_lr, "binary_lr": self.binary_lr}
        )


@dataclass(frozen=True, eq=False)
class Student:
    """A quantized model whose layers can be trained."""

    model: nn.Module
    layers: Mapping[str, TrainableLinear]
    """By full name."""
    uses_bf16: bool
    """Compute in bfloat16 where torch's autocast does; what is trained stays float32."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def logits(
        self, input_ids: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples length vocabulary"]:
        """The model's answer, with a gradient where one is asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bf16):
            return self.model(input_ids=input_ids, use_cache=False).logits

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name."""
        return {
            f"{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters()
            if parameter.requires_grad
        }

    def groups(self, rates: StudentRates, num_steps: int) -> list[ParameterGroup]:
        """One optimizer group for each kind of parameter.

        Args:
            rates: Learning rates.
            num_steps: Steps of the course, in which zero points may travel ``ZERO_POINT_TRAVEL``.
        """
        zero_rate = ZERO_POINT_TRAVEL / num_steps
        by_rate: dict[tuple[str, float], list[nn.Parameter]] = defaultdict(list)
        for layer in self.layers.values():
            has_codes = isinstance(layer, TrainableCodes)
            scale_rate = rates.codes_scale if has_codes else rates.signs_scale
            by_rate["scale", float(scale_rate)] += layer.scales()
            by_rate["zero point", zero_rate] += layer.zero_points()
            by_rate["latent", rates.latents.of(layer)] += layer.decisions()
        return [ParameterGroup(tuple(p), lr) for (_, lr), p in by_rate.items() if p]


@contextmanager
def student_of(
    model: PreTrainedModel,
    model_config: ModelConfig,
    *,
    latents: LatentRates = SCALES_ALONE,
    uses_bf16: bool,
    gradient_checkpointing: bool,
) -> Iterator[Student]:
    """Make a quantized model trainable inside the context, on the device of ``model_config``.

    Afterwards it is on the CPU again, in evaluation mode, its layers as they were trained; after
    an error, as they were.
    """
    trained = latents.trained(zero_points=keeps_zero_points(quantization_config(model)))
    skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
    blocks = model.get_submodule(skeleton.blocks_name)
    model.eval()
    with ExitStack() as stack:
        stack.callback(model.to, "cpu")
        stack.enter_context(frozen_parameters(model))
        reference = references(skeleton, latents)
        layers = stack.enter_context(trainable_layers(model, trained, reference))
        model.to(model_config.get_device())
        stack.enter_context(wide_parameters(model))
        if gradient_checkpointing:
            stack.enter_context(checkpointed_blocks(blocks))
        yield Student(model, layers, uses_bf16)


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter that the model has now ask for a gradient inside the context."""
    required = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_()


@contextmanager
def wide_parameters(model: nn.Module) -> Iterator[None]:
    """Hold float16 parameters in float32 inside the context: their gradients would vanish."""
    narrow = {p: p.data for p in model.parameters() if p.dtype == torch.float16}
    try:
        for parameter, values in narrow.items():
            parameter.data = values.float()
        yield
    finally:
        for parameter, values in narrow.items():
            parameter.data = values
