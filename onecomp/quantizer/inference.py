"""Which layer computes with a result: each method registers its own."""

from functools import singledispatch

from torch import nn

from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.result import QuantizationResult


@singledispatch
def inference_layer(
    result: QuantizationResult, linear: nn.Linear, *, pack_weights: bool = True
) -> QuantLinear:
    """The layer that runs and is saved in place of ``linear``, with its bias and on its device.

    Args:
        result: What the layer became.
        linear: The original layer.
        pack_weights: Pack codes as serving engines expect, where the format leaves a choice.

    Raises:
        NotImplementedError: Results of this kind have no layer of their own.
    """
    raise NotImplementedError(f"{type(result).__name__} has no inference layer of its own.")
