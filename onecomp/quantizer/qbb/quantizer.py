"""QBB's settings, and how it treats layers that share an input."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import HessianFactor, damped_hessian, quadratic_form
from onecomp.quantizer.baseline import nearest_weight
from onecomp.quantizer.checks import (
    group_size_problems,
    is_whole,
    positive_problems,
    whole_problems,
)
from onecomp.quantizer.drift import add_drift, drift_problems
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.layer_settings import group_problems, stored_bits
from onecomp.quantizer.qbb.algorithm import descend, with_one_more
from onecomp.quantizer.qbb.levels import Bases
from onecomp.quantizer.qbb.result import QBBResult
from onecomp.quantizer.qbb.starts import even_levels, fitted_levels, start_levels
from onecomp.quantizer.qbb.walk import compensated

STE_TYPES = ("clipped", "identity", "tanh")
COLUMN_COST = 7_000_000
"""Multiplications that take as long as the calls a column costs in all rounds, on a CPU."""
WEIGHT_COST = 22_000
"""The same for a weight, beside its share in products: starts, and the nearest of its levels."""
BASIS_COST = 4500
"""What each sign matrix adds to that."""
USUAL_ROUNDS = 6
"""Rounds until the search ends by itself."""


@dataclass
class QBB(WeightQuantizer):
    """A sum of sign matrices with a scale each for every row (Bulat et al., 2024, NeurIPS 2024).

    The paper learns signs by gradients through a straight-through estimator. Here they are found by
    exact moves under the Hessian, see ``algorithm``: at the documented rate of learning a gradient
    moves no sign at all (1000 steps of Adam at 1e-4 add up to 0.1, a sign is 1 away from turning),
    while one round of the search gives every weight the best of all its levels. ``lr`` and
    ``ste_type`` are therefore kept and checked, and have no effect.

    There is no checkpoint format of its own: save the dequantized model.

    Example:
        >>> QBB(wbits=2).name
        'QBB_2bit'
    """

    row_separable: ClassVar[bool] = True
    flag_calibration: bool = True
    flag_hessian: bool = True
    wbits: int = 4
    """Sign matrices, 1 to 8: the bits of a weight."""
    iters_per_basis: int = 1000
    """Most rounds of the search for each sign matrix; it ends by itself after some five."""
    lr: float = 1e-4
    """Without effect."""
    ste_type: str = "clipped"
    """Without effect: ``clipped``, ``identity`` or ``tanh``."""
    use_progressive_quantization: bool = False
    """Search with ``progressive_bits`` sign matrices first, and add the others one by one to what
    is left; otherwise all are searched together from the start."""
    progressive_bits: int = 2
    """Sign matrices to begin with, up to ``wbits``."""
    _: KW_ONLY
    groupsize: int = -1
    """Columns that share scales, a divisor of ``in_features``; -1 for a whole row."""
    percdamp: float = 0.1
    """Damping of the Hessian that the search lowers the error under, a fraction of its mean
    diagonal: keeps signs from being fitted to the chance of the calibration tokens."""
    drift_ratio: float = 0.0
    """Energy of what other quantized layers do to each input, relative to the input's own: the
    search takes inputs to carry as much noise."""

    def default_name(self) -> str:
        """Name from bits and group size."""
        groups = "" if self.groupsize == -1 else f"_gs{self.groupsize}"
        return f"QBB_{self.wbits}bit{groups}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = whole_problems({"wbits": self.wbits}, 1, 8)
        problems += whole_problems({"iters_per_basis": self.iters_per_basis}, 1)
        problems += positive_problems({"lr": self.lr})
        if self.ste_type not in STE_TYPES:
            problems.append(f"ste_type={self.ste_type!r}: must be {', '.join(STE_TYPES)}.")
        if self.use_progressive_quantization and not is_whole(
            self.progressive_bits, 1, self.wbits if is_whole(self.wbits, 1) else None
        ):
            problems.append(
                f"progressive_bits={self.progressive_bits!r}: must be a whole number from 1 to "
                f"wbits={self.wbits!r}."
            )
        problems += group_size_problems({"groupsize": self.groupsize})
        problems += positive_problems({"percdamp": self.percdamp})
        return problems + drift_problems(self.drift_ratio)

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
        """Sign matrices, and a scale of each for every group."""
        bits = wbits or self.wbits
        return stored_bits(bits, self.groupsize, in_features, group_bits=16 * bits)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """A single one: columns that matter most are decided first."""
        return (FactorKey(self.percdamp, by_activation=True),)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Calls by column, the products of each round, and what is done to each weight."""
        products = min(USUAL_ROUNDS, self.iters_per_basis) * (self.wbits + 3)
        by_weight = products * in_features + WEIGHT_COST + BASIS_COST * self.wbits
        return float(in_features * (COLUMN_COST + num_rows * by_weight))

    def baseline(
        self, layer_name: str, weight: Float[Tensor, "_ in"]
    ) -> Float[Tensor, "_ in"] | None:
        """Rounding with zero points; one sign matrix is compared with signs times means anyway."""
        if self.wbits == 1:
            return None
        return nearest_weight(weight, wbits=self.wbits, groupsize=self.groupsize)

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, QBBResult]:
        """Quantize layers that share an input; their rows are solved together."""
        columns = torch.cat(list(weights.values())).T.contiguous()
        bases, errors = self._no_worse(columns, self._solve(columns, factors), factors)
        sizes = [len(weight) for weight in weights.values()]
        codes = bases.codes.T.cpu().split(sizes)
        alpha = bases.levels.alpha.permute(2, 0, 1).to("cpu", torch.float16).split(sizes)
        factors.row_errors.update(zip(weights, errors.split(sizes, dim=1), strict=True))
        return {
            name: QBBResult(
                wbits=self.wbits,
                groupsize=self.groupsize,
                codes=codes[i].contiguous(),
                alpha=alpha[i].contiguous(),
            )
            for i, name in enumerate(weights)
        }

    def _counts(self, columns: Float[Tensor, "in out"]) -> dict[str, int]:
        groups = 1 if self.groupsize == -1 else len(columns) // self.groupsize
        return {"num_bases": self.wbits, "num_groups": groups}

    def _plain(self, columns: Float[Tensor, "in out"]) -> Bases:
        return even_levels(columns, **self._counts(columns)).rounded(columns)

    def _solve(self, columns: Float[Tensor, "in out"], factors: HessianFactors) -> Bases:
        try:
            factor = factors.at(self.percdamp, by_activation=True)
        except QuantizationError as error:
            factors.fallbacks.append(f"round to nearest: {error}")
            return self._plain(columns)
        hessian = add_drift(damped_hessian(factors.hessian, self.percdamp), self.drift_ratio)
        return self._search(columns, hessian, factor)

    def _search(
        self,
        columns: Float[Tensor, "in out"],
        hessian: Float[Tensor, "in in"],
        factor: HessianFactor,
    ) -> Bases:
        importance, counts = hessian.diagonal(), self._counts(columns)
        first = self.progressive_bits if self.use_progressive_quantization else self.wbits
        levels = start_levels(columns, importance, **{**counts, "num_bases": first})
        bases = descend(
            columns,
            compensated(columns, levels, factor),
            hessian,
            num_rounds=self.iters_per_basis * first,
        )
        for _ in range(self.wbits - first):
            added = with_one_more(columns, bases, importance)
            levels = fitted_levels(columns, added.levels, importance)
            afresh = compensated(columns, levels, factor)
            better = afresh.errors(columns, hessian) < added.errors(columns, hessian)
            bases = added.replace_rows(better, afresh)
            bases = descend(columns, bases, hessian, num_rounds=self.iters_per_basis)
        return bases

    def _no_worse(
        self, columns: Float[Tensor, "in out"], found: Bases, factors: HessianFactors
    ) -> tuple[Bases, Float[Tensor, "2 out"]]:
        """Best of solved rows and plain ones, and each row's output error and output energy."""
        plain = self._plain(columns)
        solved, rounded = (part.errors(columns, factors.hessian) for part in (found, plain))
        worse = rounded < solved
        if worse.any():
            factors.rounded_rows += int(worse.sum())
            found = found.replace_rows(worse, plain)
        energy = quadratic_form(columns, factors.hessian)
        return found, torch.stack([torch.minimum(solved, rounded), energy])
