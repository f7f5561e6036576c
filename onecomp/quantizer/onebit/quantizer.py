"""OneBit's settings, and how it treats layers that share an input."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.export.bits import pack_bits
from onecomp.export.quant_config import LayerFormat
from onecomp.linalg import HessianFactor, damped_hessian, quadratic_form
from onecomp.quantizer.binary_levels import sign_mean
from onecomp.quantizer.checks import positive_problems, whole_problems
from onecomp.quantizer.drift import add_drift, drift_problems
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.onebit.algorithm import (
    OneBit,
    ScaleStart,
    in_storable_scales,
    search,
    sign_start,
    with_compensated_signs,
)
from onecomp.quantizer.onebit.result import OnebitResult

COLUMN_COST = 1_200_000
"""Multiplications that take as long as the calls a column costs in a round, on a CPU."""
PRODUCTS = 7
"""Products of the weight and the Hessian in a round."""
USUAL_ROUNDS = 8
"""Rounds until the search ends by itself."""


@dataclass
class Onebit(WeightQuantizer):
    """Signs between a scale per row and one per column (Xu et al., 2024, arXiv:2402.11295).

    The paper's start, then a search under the Hessian, see ``algorithm``. Column scales are shared
    by all rows, so layers are solved whole.

    Example:
        >>> Onebit().name
        'Onebit'
    """

    flag_calibration: bool = True
    flag_hessian: bool = True
    iters: int = 10
    """Most rounds of the search, which may end earlier by itself."""
    use_importance_scaling: bool = True
    """Weigh columns by the root of the Hessian's diagonal in the start."""
    use_balancing: bool = True
    """Bring rows and columns to equal sums in the start; undone on the scales."""
    balance_iters: int = 40
    """Rounds of balancing."""
    balance_alpha: float = 1.0
    """Sum of a balanced row; any value gives the same scales."""
    _: KW_ONLY
    percdamp: float = 0.1
    """Damping of the Hessian that the search lowers the error under, a fraction of its mean
    diagonal: keeps signs from being fitted to the chance of the calibration tokens."""
    drift_ratio: float = 0.0
    """Energy of what other quantized layers do to each input, relative to the input's own: the
    search takes inputs to carry as much noise."""

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = whole_problems({"iters": self.iters}, 1)
        if self.use_balancing:
            problems += whole_problems({"balance_iters": self.balance_iters}, 1)
            problems += positive_problems({"balance_alpha": self.balance_alpha})
        problems += positive_problems({"percdamp": self.percdamp})
        return problems + drift_problems(self.drift_ratio)

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """Signs, and the scales of rows and columns; there are no other bits than one."""
        return (wbits or 1) + 16 / in_features + 16 / out_features

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """A single one: columns that matter most are decided first."""
        return (FactorKey(self.percdamp, by_activation=True),)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Calls by column, products, and the equations of the column scales."""
        by_round = COLUMN_COST + in_features * (PRODUCTS * num_rows + in_features)
        return float(in_features * by_round * min(self.iters, USUAL_ROUNDS))

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, OnebitResult]:
        """Quantize layers that share an input, each on its own."""
        return {name: self._quantize(name, weight, factors) for name, weight in weights.items()}

    def _quantize(
        self, name: str, weight: Float[Tensor, "out in"], factors: HessianFactors
    ) -> OnebitResult:
        columns = weight.T.contiguous()
        found, errors = self._no_worse(columns, self._solve(columns, factors), factors)
        energy = quadratic_form(columns, factors.hessian)
        factors.row_errors[name] = torch.stack([errors, energy])
        return OnebitResult(
            a=found.row_scale.to("cpu", torch.float16),
            b=found.column_scale.to("cpu", torch.float16),
            sign_packed=pack_bits(found.signs.T >= 0).cpu(),
        )

    def _solve(self, columns: Float[Tensor, "in out"], factors: HessianFactors) -> OneBit:
        try:
            factor = factors.at(self.percdamp, by_activation=True)
        except QuantizationError as error:
            factors.fallbacks.append(f"sign times mean: {error}")
            return OneBit.of(sign_mean(columns))
        # The start takes much memory: it is made before the Hessian is damped, and not kept.
        found = search(
            columns,
            self._start(columns, factors.hessian, factor),
            self._drifted(factors.hessian),
            num_rounds=self.iters,
        )
        return in_storable_scales(columns, found, self._drifted(factors.hessian))

    def _start(
        self,
        columns: Float[Tensor, "in out"],
        hessian: Float[Tensor, "in in"],
        factor: HessianFactor,
    ) -> OneBit:
        scales = ScaleStart(
            use_importance_scaling=self.use_importance_scaling,
            use_balancing=self.use_balancing,
            balance_iters=self.balance_iters,
            balance_alpha=self.balance_alpha,
        ).scales(columns.T, self._drifted(hessian).diagonal().clone())
        return with_compensated_signs(columns, sign_start(columns.T, scales), factor)

    def _drifted(self, hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        return add_drift(damped_hessian(hessian, self.percdamp), self.drift_ratio)

    def _no_worse(
        self, columns: Float[Tensor, "in out"], found: OneBit, factors: HessianFactors
    ) -> tuple[OneBit, Float[Tensor, "out"]]:
        """What was found or signs times means, whichever is better, and the errors of its rows."""
        errors, plain = found.errors(columns, factors.hessian), OneBit.of(sign_mean(columns))
        plain_errors = plain.errors(columns, factors.hessian)
        if not plain_errors.sum() < errors.sum():
            return found, errors
        factors.rounded_rows += columns.shape[1]
        return plain, plain_errors

    def layer_format(self, layer_name: str) -> LayerFormat:
        """One bit; the tensors say everything else."""
        return LayerFormat("onebit", 1)

    def get_quant_config(self) -> dict:
        """Top level of a OneBit checkpoint's ``quantization_config``."""
        return {
            "quant_method": "onebit",
            "bits": 1,
            "iters": self.iters,
            "use_importance_scaling": self.use_importance_scaling,
            "use_balancing": self.use_balancing,
            "balance_iters": self.balance_iters,
            "balance_alpha": self.balance_alpha,
        }
