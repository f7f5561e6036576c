"""The interface of a linear layer that is stored in quantized form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onecomp.export.quant_config import LayerFormat
from onecomp.quantizer.trainable import TrainableLinear, Trained


class QuantLinear(nn.Module, ABC):
    """A linear layer stored in quantized form; its ``forward`` is that of ``nn.Linear``.

    The forward pass uses ``dequantize()`` rounded to the type of its input. Training works on what
    ``trainable()`` gives.
    """

    code_tensors: ClassVar[frozenset[str]]
    """Names of tensors that only such layers have in a checkpoint."""
    in_features: int
    out_features: int
    bias: Tensor | None

    @classmethod
    @abstractmethod
    def from_checkpoint(
        cls, state: Mapping[str, Tensor], stored: LayerFormat, name: str
    ) -> "QuantLinear":
        """Layer around the tensors of a checkpoint, which are not copied.

        Args:
            state: The layer's tensors by their name inside it.
            stored: What the checkpoint's configuration says of them.
            name: What errors call the layer.

        Raises:
            InputError: A tensor is missing, unexpected or does not fit.
        """

    @abstractmethod
    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight in float32, on the device of the layer."""

    @abstractmethod
    def trainable(
        self, trained: Trained, reference: Float[Tensor, "out in"] | None = None
    ) -> TrainableLinear:
        """What stands in for this layer while it is trained; it starts with the same weight.

        Args:
            trained: What may change beside the scales.
            reference: The original weight, which tells close calls among codes and signs.
        """

    @abstractmethod
    def adopt(self, learned: TrainableLinear) -> None:
        """Take over, in place, what ``trainable()``'s layer has become."""

    @abstractmethod
    def packed_state(self) -> dict[str, Tensor]:
        """What the checkpoint keeps; names are relative to the layer."""


@contextmanager
def dense_layers(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let ``nn.Linear`` stand in for every quantized layer of ``model`` inside the context.

    Each weight is dequantized once instead of in every call; outputs have the same bits. Use it
    around many forward passes, one block at a time where memory is short.

    Args:
        model: Module whose descendants are replaced, and restored afterwards.
        dtype: Type of the weights, that of the activations.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _dense(layer, dtype))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


@contextmanager
def trainable_layers(
    model: nn.Module,
    trained: Trained,
    reference: Callable[[str], Tensor | None] = lambda _name: None,
) -> Iterator[dict[str, TrainableLinear]]:
    """Let trainable layers stand in for the quantized ones of ``model`` inside the context.

    At its end the quantized layers are back and have adopted what was learned; after an error they
    are back as they were.

    Args:
        model: Module whose descendants are replaced.
        trained: What may change beside the scales.
        reference: The original weight of a layer, from its name in ``model``, where it is known.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    learning: dict[str, TrainableLinear] = {}
    try:
        for name, layer in layers.items():
            learning[name] = layer.trainable(trained, reference(name))
            model.set_submodule(name, learning[name])
        yield learning
        for name, learned in learning.items():
            layers[name].adopt(learned)
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(layer.dequantize().detach().to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear
