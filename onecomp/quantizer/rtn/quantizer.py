"""Round to nearest: every weight on its own, no calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.export.quant_config import LayerFormat, gptq_format, gptq_quant_config
from onecomp.quantizer.checks import group_size_problems, positive_problems, whole_problems
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.grid import SEARCH_COST, GridSearch, fit_grid, round_to_nearest
from onecomp.quantizer.layer_settings import group_problems, stored_bits
from onecomp.quantizer.pieces import even_cuts, row_tile
from onecomp.quantizer.rtn.result import RTNResult


@dataclass
class RTN(WeightQuantizer):
    """Round each weight to the nearest value of its group's grid; saved in GPTQ's layout."""

    row_separable: ClassVar[bool] = True
    wbits: int = 4
    """Bits per weight, 1 to 8."""
    groupsize: int = -1
    """Columns that share a scale, a divisor of ``in_features``; -1 for a whole row."""
    sym: bool = False
    mse: bool = False
    """Search each group's range for the least error."""
    norm: float = 2.4
    """Exponent of the error in the search."""
    grid: int = 100
    """Steps of the search."""

    def default_name(self) -> str:
        """Name from bits and group size."""
        groups = "perchannel" if self.groupsize == -1 else f"gs{self.groupsize}"
        return f"RTN_{self.wbits}bit_{groups}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = whole_problems({"wbits": self.wbits}, 1, 8)
        problems += group_size_problems({"groupsize": self.groupsize})
        problems += whole_problems({"grid": self.grid}, 1)
        return problems + positive_problems({"norm": self.norm})

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Group sizes have to divide ``in_features``."""
        return group_problems("groupsize", self.groupsize, layer_name, in_features)

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """Codes, scales and zero points."""
        return stored_bits(wbits or self.wbits, self.groupsize, in_features)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """The search is all that takes time."""
        return float(num_rows * in_features * (SEARCH_COST if self.mse else 100))

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, RTNResult]:
        """Quantize each layer by itself; needs no Hessian."""
        del factors
        return {name: self._quantize(weight) for name, weight in weights.items()}

    def _quantize(self, weight: Float[Tensor, "out in"]) -> RTNResult:
        cuts = even_cuts(len(weight), row_tile(weight.device, weight.shape[1]))
        return RTNResult.join([self._quantize_rows(weight[a:b]) for a, b in cuts])

    def _quantize_rows(self, weight: Float[Tensor, "out in"]) -> RTNResult:
        out_features, in_features = weight.shape
        size = in_features if self.groupsize == -1 else self.groupsize
        groups = weight.T.reshape(-1, size, out_features)
        search = GridSearch(self.grid, self.norm, stride=4) if self.mse else None
        grid = fit_grid(groups, wbits=self.wbits, sym=self.sym, search=search)
        codes = round_to_nearest(groups, grid).reshape(in_features, out_features)
        return RTNResult(
            wbits=self.wbits,
            groupsize=self.groupsize,
            sym=self.sym,
            quantized_weight=codes.T.cpu().contiguous(),
            scale=grid.scale.T.to("cpu", torch.float16).contiguous(),
            zero=grid.zero_point.T.to("cpu", torch.float16).contiguous(),
        )

    def get_quant_config(self) -> dict:
        """Top level of a GPTQ v1 checkpoint's ``quantization_config``."""
        return gptq_quant_config(
            wbits=self.wbits, groupsize=self.groupsize, actorder=False, sym=self.sym
        )

    def layer_format(self, layer_name: str) -> LayerFormat:
        """GPTQ's layout."""
        return gptq_format(self.wbits, self.groupsize)
