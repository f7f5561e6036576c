"""What JointQ makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class JointQResult(QuantizationResult):
    """Integer codes on one grid per group of columns of each row.

    ``weight[r, perm[t * size + i]] = scale[r, t] * (assignment[r, t, i] - zero_point[r, t])``
    for groups of ``size`` columns; without ``perm`` columns keep their own order.
    """

    bits: int | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    """Columns per group; None for one group a row."""
    scale: Tensor | None = None
    """float64 ``(out, groups)`` with values that float16 holds, CPU; of any sign."""
    zero_point: Tensor | None = None
    """int8 ``(out, groups)``, CPU; zeros when symmetric."""
    assignment: Tensor | None = None
    """Codes, int8 ``(out, groups, columns)``, CPU: 0..2**bits - 1, or when symmetric
    -2**(bits - 1)..2**(bits - 1) - 1."""
    perm: Tensor | None = None
    """int64 ``(in,)``: columns in the order in which they form groups; None for their own."""
    accepted_lambda: Tensor | None = None
    """Strength of regularization that each row was solved with, float32 ``(out,)``, CPU."""

    def row_dims(self) -> dict[str, int]:
        """Rows come first everywhere."""
        rows = dict.fromkeys(("scale", "zero_point", "assignment", "accepted_lambda"), 0)
        return {**super().row_dims(), **rows}

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from the codes."""
        codes = self.assignment.to(device).float()
        zero_point, scale = self.zero_point.to(device).float(), self.scale.to(device).float()
        weight = ((codes - zero_point[..., None]) * scale[..., None]).flatten(1)
        return weight if self.perm is None else weight[:, torch.argsort(self.perm).to(device)]
