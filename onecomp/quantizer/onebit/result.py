"""What OneBit makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.export.bits import unpack_bits
from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class OnebitResult(QuantizationResult):
    """Signs between a scale per row and a scale per column.

    ``weight[r, c] = a[r] * sign[r, c] * b[c]``; the scales are those of the weight itself, whatever
    it was weighed by in between.
    """

    a: Tensor | None = None
    """Scale of each row, float16 ``(out,)``, CPU."""
    b: Tensor | None = None
    """Scale of each column, float16 ``(in,)``, CPU."""
    sign_packed: Tensor | None = None
    """Signs, eight to a byte, row by row, see ``onecomp.export.bits``; uint8, CPU."""

    def signs(self) -> Float[Tensor, "out in"]:
        """+1 and -1 in float32."""
        return unpack_bits(self.sign_packed, (len(self.a), len(self.b)))

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from signs and scales."""
        a, b = self.a.to(device).float(), self.b.to(device).float()
        signs = unpack_bits(self.sign_packed.to(device), (len(a), len(b)))
        return signs.mul_(b).mul_(a[:, None])
