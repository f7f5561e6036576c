"""What ARB makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class ARBResult(QuantizationResult):
    """A sign for each weight: ``weight[r, c] = mu[r, g] + alpha[r, g] * sign[r, c]``.

    ``g`` is the group of column ``c``.
    """

    groupsize: int | None = None
    """Columns that share scale and mean; -1 for a whole row."""
    sign: Tensor | None = None
    """+1 and -1, int8 ``(out, in)``, CPU."""
    alpha: Tensor | None = None
    """Scale, float16 ``(out, groups)``, not negative; CPU."""
    mu: Tensor | None = None
    """Mean, float16 ``(out, groups)``, CPU."""

    def row_dims(self) -> dict[str, int]:
        """Rows come first everywhere."""
        return {**super().row_dims(), "sign": 0, "alpha": 0, "mu": 0}

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from signs, scales and means."""
        signs = self.sign.to(device).float()
        by_group = signs.reshape(*self.alpha.shape, -1)
        alpha, mu = self.alpha.to(device).float(), self.mu.to(device).float()
        return (mu[..., None] + alpha[..., None] * by_group).reshape(signs.shape)
