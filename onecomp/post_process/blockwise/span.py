"""Consecutive blocks that are trained together: their parameters as one vector, their loss."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onecomp.models.calls import BlockCall
from onecomp.post_process.blockwise.goals import Goal
from onecomp.post_process.latents import LatentRates
from onecomp.quantizer.gptq.trainable import TrainableCodes
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, and what is trained."""

    codes_scale: float
    """Of scales of integer codes, as a share of a layer's mean scale."""
    signs_scale: float
    """Of scales of signs, likewise."""
    latents: LatentRates
    zero_points: float
    """Of zero points, in code steps; 0: they stay."""

    def at(self, lr: float) -> "Rates":
        """The same things trained at one rate."""
        return Rates(
            codes_scale=lr,
            signs_scale=lr,
            latents=replace(
                self.latents,
                codes=lr if self.latents.codes else 0.0,
                signs=lr if self.latents.signs else 0.0,
            ),
            zero_points=lr if self.zero_points else 0.0,
        )


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter of a span."""

    parameter: nn.Parameter
    lr: float


class Span:
    """Quantized blocks whose layers are trainable, on one device.

    Args:
        blocks: In the order of the model; their quantized layers are replaced in place.
        originals: The same blocks of the original model, for close calls among codes and signs.
        rates: What is trained, and how fast.
        uses_bf16: Compute in bfloat16 where torch's autocast does; parameters stay float32.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        originals: Sequence[nn.Module],
        rates: Rates,
        *,
        uses_bf16: bool,
    ):
        self.blocks, self.uses_bf16 = list(blocks), uses_bf16
        trained = rates.latents.trained(zero_points=rates.zero_points > 0)
        self._layers: list[tuple[nn.Module, str, QuantLinear, TrainableLinear]] = []
        for block, original in zip(blocks, originals, strict=True):
            for name, layer in _quantized(block).items():
                learning = layer.trainable(trained, original.get_submodule(name).weight)
                self._layers.append((block, name, layer, learning))
                block.set_submodule(name, learning)
        self.slots = [slot for *_, learning in self._layers for slot in _slots(learning, rates)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, in a fixed order."""
        return [slot.parameter for slot in self.slots]

    def vector(self) -> Float[Tensor, "numbers"]:
        """Copies of all parameters, one behind the other."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def load(self, vector: Float[Tensor, "numbers"]) -> None:
        """The inverse of ``vector``."""
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            for parameter, values in zip(self.parameters, vector.split(sizes), strict=True):
                parameter.copy_(values.view_as(parameter))

    @contextmanager
    def held_weights(self) -> Iterator[None]:
        """Compute every weight once for all samples inside the context."""
        with ExitStack() as stack:
            for *_, learning in self._layers:
                stack.enter_context(learning.held_weight())
            yield

    def loss(self, calls: Sequence[BlockCall], hidden: Tensor, goal: Goal) -> Float[Tensor, ""]:
        """How far the span is from the goal for one sample."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.uses_bf16):
            for block, call in zip(self.blocks, calls, strict=True):
                hidden = call.run(block, hidden)
            return goal.loss(hidden)

    def gradient(
        self, calls: Sequence[BlockCall], hidden: Tensor, goal: Goal
    ) -> tuple[Float[Tensor, "numbers"], float]:
        """Gradient of the loss of one sample by the vector, and the loss; weights are held."""
        loss = self.loss(calls, hidden, goal)
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in gradients]), float(loss.detach())

    def close(self) -> None:
        """Put the quantized layers back, with what was learned."""
        for block, name, layer, learning in self._layers:
            layer.adopt(learning)
            block.set_submodule(name, layer)

    def decisions(self) -> Float[Tensor, "decisions"]:
        """Codes and signs as they are now, for counting changes; empty where none are trained."""
        found = [decision for *_, learning in self._layers for decision in learning.decided()]
        return torch.cat([d.detach().flatten() for d in found]) if found else torch.empty(0)


def _quantized(block: nn.Module) -> Mapping[str, QuantLinear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, QuantLinear)}


def _slots(layer: TrainableLinear, rates: Rates) -> Iterator[Slot]:
    has_codes = isinstance(layer, TrainableCodes)
    scale_rate = rates.codes_scale if has_codes else rates.signs_scale
    for scale in layer.scales():
        yield Slot(scale, scale_rate * float(scale.detach().abs().mean()))
    for zero in layer.zero_points():
        yield Slot(zero, rates.zero_points)
    for latent in layer.decisions():
        yield Slot(latent, rates.latents.of(layer))
