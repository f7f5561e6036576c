"""What round-to-nearest makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class RTNResult(QuantizationResult):
    """Integer codes on one grid per group of columns of each row."""

    wbits: int | None = None
    groupsize: int | None = None
    sym: bool | None = None
    quantized_weight: Tensor | None = None
    """Codes 0..2**wbits - 1, int32 ``(out, in)``, CPU."""
    scale: Tensor | None = None
    """float16 ``(out, groups)``, CPU."""
    zero: Tensor | None = None
    """Zero points, float16 with whole values ``(out, groups)``, CPU."""

    def row_dims(self) -> dict[str, int]:
        """Rows come first everywhere."""
        return {**super().row_dims(), "quantized_weight": 0, "scale": 0, "zero": 0}

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from the codes."""
        codes = self.quantized_weight.to(device).float()
        per_group = codes.reshape(*self.scale.shape, -1)
        zero, scale = self.zero.to(device).float(), self.scale.to(device).float()
        return ((per_group - zero[..., None]) * scale[..., None]).reshape(codes.shape)
