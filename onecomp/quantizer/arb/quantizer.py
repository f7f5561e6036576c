"""ARB's settings, and how it treats layers that share an input."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.arb.algorithm import staged_levels
from onecomp.quantizer.arb.result import ARBResult
from onecomp.quantizer.binary import Binary
from onecomp.quantizer.binary_group import BinarySearch, search_problems
from onecomp.quantizer.checks import whole_problems
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.layer_settings import group_problems, stored_bits


@dataclass
class ARB(WeightQuantizer):
    """Alternating refined binarization (Li et al., 2024, arXiv:2410.03129).

    A sign for each weight, a scale and a mean for each row: refined in turns under the Hessian
    (section 3.3, ARB-X), beginning from signs chosen column by column with error compensation.

    Example:
        >>> ARB(groupsize=128).name
        'ARB_gs128'
    """

    row_separable: ClassVar[bool] = True
    flag_calibration: bool = True
    flag_hessian: bool = True
    arb_iters: int = 15
    """Most rounds of turning signs and fitting scale and mean."""
    split_points: int = 2
    """Starts for every row, by quantiles of magnitude; the best outcome is kept."""
    _: KW_ONLY
    groupsize: int = -1
    """Columns that share scale and mean, a divisor of ``in_features``; -1 for a whole row."""
    percdamp: float = 0.05
    """Damping of the factor that errors are compensated with, a fraction of the mean diagonal."""
    drift_ratio: float = 0.3
    """Energy of what other quantized layers do to each input, relative to the input's own."""

    def default_name(self) -> str:
        """Name from the group size."""
        return "ARB_perchannel" if self.groupsize == -1 else f"ARB_gs{self.groupsize}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        counts = {"arb_iters": self.arb_iters, "split_points": self.split_points}
        return whole_problems(counts, 1) + search_problems(
            self.groupsize, self.percdamp, self.drift_ratio
        )

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
        """Signs, and scale and mean of every group."""
        return stored_bits(wbits or 1, self.groupsize, in_features, group_bits=32)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """A single one."""
        return (self._search().factor_key,)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Passes over the columns, for every start."""
        return self._search().cost(num_rows, in_features, num_starts=self.split_points)

    def _search(self) -> BinarySearch:
        return BinarySearch(self.groupsize, self.arb_iters, self.percdamp, self.drift_ratio)

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, ARBResult]:
        """Quantize layers that share an input."""
        starts = partial(staged_levels, split_points=self.split_points)
        binaries = self._search().group(weights, factors, starts)
        return {name: self._result(binary) for name, binary in binaries.items()}

    def _result(self, binary: Binary) -> ARBResult:
        return ARBResult(
            groupsize=self.groupsize,
            sign=binary.signs.T.to("cpu", torch.int8).contiguous(),
            alpha=binary.levels.half.T.to("cpu", torch.float16).contiguous(),
            mu=binary.levels.centre.T.to("cpu", torch.float16).contiguous(),
        )
