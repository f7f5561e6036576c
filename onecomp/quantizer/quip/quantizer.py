"""QuIP's settings, and how it treats a layer."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import quadratic_form
from onecomp.quantizer.checks import as_number, is_whole, whole_problems
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.grid import fit_grid, round_to_nearest
from onecomp.quantizer.quip.algorithm import greedy, ldlq, normal_scale
from onecomp.quantizer.quip.incoherence import (
    MATRICES,
    Incoherence,
    factor_sizes,
    is_power_of_two,
)
from onecomp.quantizer.quip.result import QUIPResult

LARGEST_SEED = 2**62
LARGEST_FACTOR = 8192
"""Rows of a transform's larger matrix: sizes with a large prime in them have one as large."""

SCALE_BITS, ZERO_BITS, SIGN_BITS, COLUMN_BITS = 32, 16, 8, 16
"""Of a result's tensors beside the codes: of each scale, the zero, each row and each column."""
PRODUCT_COST, GREEDY_COST, FACTOR_COST = 3.5, 2.7, 1.7
"""Products of the Hessian's size that take as long as rounding with feedback and the comparison
with plain rounding, as a greedy pass, and as the factor; measured on a CPU."""
COLUMN_COST = 800_000
"""Multiplications that take as long as the calls that a column costs in each pass."""
WEIGHT_COST = 2000
"""The same for a weight: transforms and packing."""


@dataclass
class QUIP(WeightQuantizer):
    """Incoherence processing and LDLQ (Chee et al., 2023, arXiv:2307.13304).

    Weight and Hessian are rescaled and rotated so that no entry stands out, the weight is rounded
    column by column with feedback, and the result keeps what undoes the rotations. There is no
    checkpoint format: models are saved dequantized.

    Example:
        >>> QUIP(wbits=2).name
        'QUIP_2bit_kron'
    """

    flag_calibration: bool = True
    flag_hessian: bool = True
    wbits: int = 4
    """Bits per weight, 1 to 8."""
    percdamp: float = 0.01
    """Damping of the rotated Hessian, a fraction of its mean diagonal."""
    incoh_mode: str = "kron"
    """Rotations: ``kron`` for any size, ``had`` (Hadamard) where both sizes are powers of two."""
    _: KW_ONLY
    seed: int = 0
    """Of the random signs in the rotations; nothing else is random."""
    greedy_passes: int = 2
    """How many times all codes are improved one after the other when all are there."""
    row_scale: bool = True
    """A scale for every row of the rotated weight; the paper has one for all."""

    def default_name(self) -> str:
        """Name from bits and rotation."""
        return f"QUIP_{self.wbits}bit_{self.incoh_mode}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = whole_problems({"wbits": self.wbits}, 1, 8)
        if not as_number(self.percdamp) > 0:
            problems.append(f"percdamp={self.percdamp!r}: must be above 0; 0.01 is usual.")
        if self.incoh_mode not in MATRICES:
            known = " or ".join(repr(mode) for mode in MATRICES)
            problems.append(f"incoh_mode={self.incoh_mode!r}: must be {known}.")
        if not is_whole(self.seed, 0, LARGEST_SEED):
            problems.append(f"seed={self.seed!r}: must be a whole number from 0 to 2**62.")
        return problems + whole_problems({"greedy_passes": self.greedy_passes}, 0)

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Sizes without a Hadamard matrix, and sizes whose rotation would be too large."""
        sizes = {"in_features": in_features, "out_features": out_features}
        return [
            f"{problem}, but {layer_name} has {key}={size}. "
            f"{remedy} exclude the layer with exclude_layer_names."
            for key, size in sizes.items()
            for problem, remedy in self._size_problems(size)
        ]

    def _size_problems(self, size: int) -> list[tuple[str, str]]:
        if self.incoh_mode == "had" and not is_power_of_two(size):
            return [('incoh_mode="had" needs sizes that are powers of two', 'Use "kron", or')]
        if (largest := factor_sizes(size)[1]) > LARGEST_FACTOR:
            return [(f"a rotation by a matrix of {largest} columns is too large", "You can only")]
        return []

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """All that a result keeps: codes, scales, and what undoes the transforms."""
        per_layer = SCALE_BITS * (out_features if self.row_scale else 1) + ZERO_BITS
        transforms = SIGN_BITS * out_features + COLUMN_BITS * in_features
        return (wbits or self.wbits) + (per_layer + transforms) / (in_features * out_features)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Products, the factor, the calls of a column, and what is done to each weight."""
        products = (PRODUCT_COST + GREEDY_COST * self.greedy_passes) * num_rows * in_features**2
        columns = in_features * (1 + self.greedy_passes) * COLUMN_COST
        weights = num_rows * in_features * WEIGHT_COST
        return products + FACTOR_COST * in_features**3 + columns + weights

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, QUIPResult]:
        """Quantize each layer by itself: its columns' norms have a share in the transform."""
        return {name: self._quantize(name, weight, factors) for name, weight in weights.items()}

    def _quantize(self, name: str, weight: Tensor, factors: HessianFactors) -> QUIPResult:
        """The best of the solved and the plainly rounded layer, by output error."""
        results = []
        try:
            results.append(self._solved(weight, factors))
        except QuantizationError as error:
            factors.fallbacks.append(f"round to nearest: {error}")
        results += [_rounded(weight, self.wbits, sym) for sym in (True, False)]
        errors = [
            quadratic_form((weight - result.dequantize(weight.device)).T, factors.hessian)
            for result in results
        ]
        totals = [rows.double().sum().item() for rows in errors]
        best = totals.index(min(totals))
        if results[best].incoh_mode is None:
            factors.rounded_rows += len(weight)
        energy = quadratic_form(weight.T, factors.hessian)
        factors.row_errors[name] = torch.stack([errors[best], energy])
        return results[best]

    def _solved(self, weight: Tensor, factors: HessianFactors) -> QUIPResult:
        hessian = _without_dead_columns(factors.hessian)
        transforms = Incoherence.draw(weight, hessian.diagonal(), self.incoh_mode, self.seed)
        rotated = transforms.hessian(hessian)
        factor = HessianFactors(rotated, fallbacks=factors.fallbacks).at(self.percdamp)
        columns = transforms.weight(weight)
        scale = normal_scale(columns, wbits=self.wbits, row_scale=self.row_scale)
        rounding = ldlq(columns, factor, scale, self.wbits)
        percdamp = factor.percdamp
        del factor  # as large as the Hessian, twice
        if self.greedy_passes:
            rounding = greedy(
                columns, rotated, rounding, num_passes=self.greedy_passes, percdamp=percdamp
            )
        return QUIPResult.of(rounding, transforms)


def _without_dead_columns(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Columns that no token used (zero diagonal) get the mean of the others.

    With less, the errors of all columns would end up in their weights.
    """
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    if alive.all():
        return hessian
    mean = diagonal[alive].mean() if alive.any() else diagonal.new_ones(())
    hessian = hessian.clone()
    hessian.diagonal()[~alive] = mean
    return hessian


def _rounded(weight: Float[Tensor, "out in"], wbits: int, sym: bool) -> QUIPResult:
    """Every weight rounded to the nearest value of its row's plain grid."""
    columns = weight.T.contiguous()[None]
    grid = fit_grid(columns, wbits=wbits, sym=sym)
    codes = round_to_nearest(columns, grid)[0].T
    return QUIPResult.from_codes(codes, grid.scale.T, grid.zero_point.T, wbits)
