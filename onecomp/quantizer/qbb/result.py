"""What QBB makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class QBBResult(QuantizationResult):
    """Sign matrices, and the scale of each for every row.

    ``weight[r, c] = Σ_i alpha[r, g, i] * sign_i[r, c]`` where ``g`` is the group of column ``c``
    and ``sign_i[r, c]`` is +1 where bit i of ``codes[r, c]`` is 1, else -1.
    """

    wbits: int | None = None
    """Sign matrices."""
    groupsize: int | None = None
    """Columns that share scales; -1 for a whole row."""
    codes: Tensor | None = None
    """uint8 ``(out, in)``, CPU."""
    alpha: Tensor | None = None
    """Scales, float16 and not negative, ``(out, groups, wbits)``, CPU."""

    def row_dims(self) -> dict[str, int]:
        """Rows come first everywhere."""
        return {**super().row_dims(), "codes": 0, "alpha": 0}

    def signs(self, base: int) -> Float[Tensor, "out in"]:
        """One sign matrix in float32; bases are counted from 0."""
        return ((self.codes >> base) & 1).float().mul_(2).sub_(1)

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from signs and scales."""
        codes, alpha = self.codes.to(device), self.alpha.to(device).float()
        total = torch.zeros_like(codes, dtype=torch.float32)
        by_group = total.view(len(codes), alpha.shape[1], -1)
        for base, scale in enumerate(alpha.unbind(dim=2)):
            sign = ((codes >> base) & 1).float().mul_(2).sub_(1)
            by_group.addcmul_(sign.view_as(by_group), scale[..., None])
        return total
