"""What GPTQ makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class GPTQResult(QuantizationResult):
    """Integer codes on one grid per group of columns.

    ``weight[r, c] = scales[g, r] * (qweight[r, c] - qzeros[g, r])`` where ``g`` is the group of
    column ``c``. With ``groupsize=-1`` there is one group and ``scales`` and ``qzeros`` are
    ``(out, 1)``, otherwise they are ``(groups, out)``.
    """

    wbits: int | None = None
    groupsize: int | None = None
    """Columns per group; -1 for one group a row."""
    actorder: bool | None = None
    """Columns were solved in order of falling activation."""
    sym: bool | None = None
    qweight: Tensor | None = None
    """Codes 0..2**wbits - 1, int32 ``(out, in)`` in the layer's own column order, CPU."""
    scales: Tensor | None = None
    """float16, CPU."""
    qzeros: Tensor | None = None
    """Zero points, float16 with whole values, CPU."""
    perm: Tensor | None = None
    """int64 ``(in,)``: order of the columns with ``actorder``, column ``perm[i]`` belongs to group
    ``i // groupsize``. None when groups keep the layer's own order: without ``actorder``, with
    ``static_groups``, and where the layer was rounded to nearest."""

    def row_dims(self) -> dict[str, int]:
        """Rows of the codes, and of the grids as their layout has them."""
        grids = 0 if self.groupsize == -1 else 1
        return {**super().row_dims(), "qweight": 0, "scales": grids, "qzeros": grids}

    @property
    def group_index(self) -> Int[Tensor, "in"]:
        """Group of each column (``g_idx`` of checkpoints), int32."""
        return group_index(self.qweight.shape[1], self.groupsize, self.perm)

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from the codes."""
        codes = self.qweight.to(device)
        scales, zeros = self.scales.to(device).float(), self.qzeros.to(device).float()
        if self.groupsize == -1:
            return scales * (codes.float() - zeros)
        columns = self.group_index.to(device)
        return scales[columns].T * (codes.float() - zeros[columns].T)


def group_index(in_features: int, groupsize: int, perm: Tensor | None) -> Int[Tensor, "in"]:
    """Group of each column, int32; zeros when there is one group a row."""
    if groupsize == -1:
        return torch.zeros(in_features, dtype=torch.int32)
    position = torch.arange(in_features) if perm is None else torch.argsort(perm)
    return (position // groupsize).to(torch.int32)
