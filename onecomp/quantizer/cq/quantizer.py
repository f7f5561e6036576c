"""CQ's settings, and how it treats layers that share an input."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.baseline import sign_mean_weight
from onecomp.quantizer.binary import Binary, Levels
from onecomp.quantizer.binary_group import BinarySearch, search_problems
from onecomp.quantizer.binary_levels import by_group
from onecomp.quantizer.checks import whole_problems
from onecomp.quantizer.cq.algorithm import two_clusters
from onecomp.quantizer.cq.result import CQResult
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.layer_settings import group_problems, stored_bits


@dataclass
class CQ(WeightQuantizer):
    """One bit a weight by clustering: every weight becomes one of two means.

    The means begin as the best two clusters of each row, columns weighted by their mean squared
    input; then codes and means are improved under the Hessian, as ``onecomp.quantizer.binary``
    says.

    Example:
        >>> CQ(each_row=False).name
        'CQ_whole'
    """

    flag_calibration: bool = True
    flag_hessian: bool = True
    each_row: bool = True
    """Two means for each row; otherwise two for the whole layer."""
    _: KW_ONLY
    groupsize: int = -1
    """Columns that share a pair of means, a divisor of ``in_features``; -1 for a whole row."""
    refine_iters: int = 6
    """Most rounds of turning codes and fitting means under the Hessian; 0 leaves the clusters."""
    percdamp: float = 0.05
    """Damping of the factor that errors are compensated with, a fraction of the mean diagonal."""
    drift_ratio: float = 0.3
    """Energy of what other quantized layers do to each input, relative to the input's own."""

    @property
    def row_separable(self) -> bool:  # pyrefly: ignore[bad-override]  # it depends on a setting
        """Rows share nothing but where one pair of means serves the whole layer."""
        return self.each_row

    def default_name(self) -> str:
        """Name from what shares a pair of means."""
        if not self.each_row:
            return "CQ_whole"
        return "CQ_perchannel" if self.groupsize == -1 else f"CQ_gs{self.groupsize}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = search_problems(self.groupsize, self.percdamp, self.drift_ratio)
        problems += whole_problems({"refine_iters": self.refine_iters}, 0)
        if not self.each_row and self.groupsize != -1:
            problems.append(
                f"each_row=False, groupsize={self.groupsize!r}: one pair of means for the whole "
                "layer has no groups. Use groupsize=-1."
            )
        return problems

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
        """Codes, and both means of every group, or of the layer."""
        # A layer with a single pair of means counts as one long row.
        row = in_features if self.each_row else in_features * out_features
        return stored_bits(wbits or 1, self.groupsize, row, group_bits=32)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """A single one."""
        return (self._search().factor_key,)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Passes over the columns."""
        return self._search().cost(num_rows, in_features, num_starts=1)

    def _search(self) -> BinarySearch:
        return BinarySearch(
            self.groupsize,
            self.refine_iters,
            self.percdamp,
            self.drift_ratio,
            storable=Levels.ends_in_float16,
            tied=not self.each_row,
        )

    def baseline(
        self, layer_name: str, weight: Float[Tensor, "_ in"]
    ) -> Float[Tensor, "_ in"] | None:
        """Signs times their rows' means, where one pair of means has to serve all rows."""
        return None if self.each_row else sign_mean_weight(weight)

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, CQResult]:
        """Quantize layers that share an input."""
        binaries = self._search().group(weights, factors, self._starts)
        return {name: self._result(binary) for name, binary in binaries.items()}

    def _starts(self, columns: Tensor, importance: Tensor, num_groups: int) -> list[Levels]:
        """The best two clusters of what shares a pair of means."""
        num_rows = columns.shape[1]
        sets = (num_groups * num_rows, -1) if self.each_row else (1, -1)
        groups = by_group(columns, num_groups).transpose(1, 2)
        weights = importance.reshape(num_groups, 1, -1).expand_as(groups)
        means = two_clusters(groups.reshape(sets), weights.reshape(sets))
        low, high = (mean.reshape(num_groups, -1).expand(num_groups, num_rows) for mean in means)
        levels = Levels((low + high) / 2, (high - low) / 2)
        return [levels.ends_in_float16()]

    def _result(self, binary: Binary) -> CQResult:
        pairs = slice(None) if self.each_row else slice(0, 1)
        left, right = (means.T[pairs].cpu().contiguous() for means in binary.levels.ends())
        return CQResult(
            each_row=self.each_row,
            groupsize=self.groupsize,
            quantized_weight=(binary.signs.T > 0).to("cpu", torch.int8).contiguous(),
            threshold=(left + right) / 2,
            left_mean=left.half(),
            right_mean=right.half(),
        )
