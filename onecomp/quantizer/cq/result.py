"""What CQ makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class CQResult(QuantizationResult):
    """A code for each weight that chooses between two means.

    ``weight[r, c] = right_mean[r, g] if quantized_weight[r, c] else left_mean[r, g]``, with ``g``
    the group of column ``c``. With ``each_row=False`` there is one pair for the whole layer.
    """

    each_row: bool | None = None
    groupsize: int | None = None
    """Columns that share a pair of means; -1 for all."""
    quantized_weight: Tensor | None = None
    """0 and 1, int8 ``(out, in)``, CPU."""
    threshold: Tensor | None = None
    """In the middle between the means, float32: codes differ from ``weight >= threshold`` where the
    Hessian made them."""
    left_mean: Tensor | None = None
    """float16 ``(out, groups)``, or ``(1, 1)`` for the whole layer; CPU."""
    right_mean: Tensor | None = None
    """The same, not below ``left_mean``."""

    def row_dims(self) -> dict[str, int]:
        """Rows come first; means of a whole layer have none."""
        dims = {**super().row_dims(), "quantized_weight": 0}
        if self.each_row:
            dims |= dict.fromkeys(("threshold", "left_mean", "right_mean"), 0)
        return dims

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from the codes."""
        codes = self.quantized_weight.to(device).bool()
        size = codes.shape[1] // self.left_mean.shape[1]
        left, right = (
            means.to(device).float().repeat_interleave(size, dim=1)
            for means in (self.left_mean, self.right_mean)
        )
        return torch.where(codes, right, left)
