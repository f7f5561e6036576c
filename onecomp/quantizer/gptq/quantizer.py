"""GPTQ's settings, and how it treats layers that share an input."""

import itertools
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.export.quant_config import LayerFormat, gptq_format, gptq_quant_config
from onecomp.linalg import quadratic_form
from onecomp.quantizer.checks import group_size_problems, positive_problems, whole_problems
from onecomp.quantizer.errors_of import RowErrors
from onecomp.quantizer.factors import FactorKey, HessianFactors, percdamp_problems
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.gptq.algorithm import (
    GridRule,
    Solution,
    fit_static_grid,
    gptq_quantize,
    nearest_solution,
)
from onecomp.quantizer.gptq.result import GPTQResult
from onecomp.quantizer.grid import SEARCH_COST, GridSearch
from onecomp.quantizer.layer_settings import (
    fitting_sizes,
    group_problems,
    setting_of,
    stored_bits,
)
from onecomp.quantizer.pieces import even_cuts, row_tile

COLUMN_COST = 3_000_000
"""Multiplications that take as long as the calls a column costs, measured on a CPU."""
WEIGHT_COST = 4000
"""The same for a weight, beside its share in products."""


class LayerBits(NamedTuple):
    """What the grids of a layer are."""

    wbits: int
    groupsize: int


@dataclass
class GPTQ(WeightQuantizer):
    """Second-order layer-wise quantization (Frantar et al., 2023, arXiv:2210.17323).

    ``static_groups`` is an addition: with ``actorder`` the columns are solved in order of
    activation while groups stay those of the layer's own column order, so that the checkpoint
    needs no ``g_idx`` and every serving kernel takes it.

    Example:
        >>> GPTQ(wbits=4, groupsize=128).name
        'GPTQ_4bit_gs128'
    """

    row_separable: ClassVar[bool] = True
    flag_calibration: bool = True
    flag_hessian: bool = True
    blocksize: int = 128
    """Columns corrected at once; a matter of speed only."""
    percdamp: float = 0.01
    """Damping, a fraction of the Hessian's mean diagonal."""
    wbits: int = 4
    """Bits per weight, 1 to 8."""
    groupsize: int = -1
    """Columns that share a scale, a divisor of the layer's ``in_features``; -1 for a whole row."""
    actorder: bool = False
    """Solve columns in order of falling activation."""
    mse: bool = False
    """Search each group's range for the least error."""
    sym: bool = True
    """Zero point fixed in the middle of the codes."""
    q_grid: int = 600
    """Steps of the range search."""
    q_norm: float = 2.4
    """Exponent of the error in the range search."""
    mlp_wbits: int | None = None
    """Bits of layers whose name contains ``mlp``."""
    mlp_groupsize: int | None = None
    """Columns per group of those layers."""
    module_wbits: dict[str, int] | None = None
    """Bits by full layer name; wins over ``mlp_wbits``."""
    _: KW_ONLY
    static_groups: bool = False
    """Fit all grids to the original weights, in the layer's own column order."""
    weighted_mse: bool = False
    """Weigh each column's error in the range search by the root of its mean squared input."""

    def default_name(self) -> str:
        """Name from bits and group size."""
        groups = "perchannel" if self.groupsize == -1 else f"gs{self.groupsize}"
        return f"GPTQ_{self.wbits}bit_{groups}"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        bits, sizes = {"wbits": self.wbits}, {"groupsize": self.groupsize}
        if self.mlp_wbits is not None:
            bits["mlp_wbits"] = self.mlp_wbits
        if self.mlp_groupsize is not None:
            sizes["mlp_groupsize"] = self.mlp_groupsize
        by_layer = self.module_wbits or {}
        if isinstance(by_layer, dict):
            bits |= {f"module_wbits[{name!r}]": value for name, value in by_layer.items()}
        problems = whole_problems(bits, 1, 8) + group_size_problems(sizes)
        if not isinstance(by_layer, dict):
            problems.append(f"module_wbits={by_layer!r}: must be a dict of bits by layer name.")
        return problems + self._solver_problems()

    def _solver_problems(self) -> list[str]:
        problems = whole_problems({"blocksize": self.blocksize}, 1)
        problems += percdamp_problems(self.percdamp)
        if self.mse:
            problems += whole_problems({"q_grid": self.q_grid}, 1)
            problems += positive_problems({"q_norm": self.q_norm})
        return problems

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Group sizes have to divide ``in_features``."""
        size = self.resolve_groupsize(layer_name, self.groupsize, self.mlp_groupsize)
        remedy = fitting_sizes("groupsize", in_features, -1)
        return group_problems("groupsize", size, layer_name, in_features, remedy)

    @staticmethod
    def resolve_bits(
        layer_name: str | None,
        default_bits: int,
        mlp_bits: int | None = None,
        module_bits: dict[str, int] | None = None,
    ) -> int:
        """Bits of a layer: by its name, else for MLPs, else the default.

        >>> GPTQ.resolve_bits("model.layers.0.mlp.up_proj", 4, mlp_bits=3)
        3
        """
        return setting_of(layer_name, default_bits, mlp_bits, module_bits)

    @staticmethod
    def resolve_groupsize(
        layer_name: str | None, default_groupsize: int, mlp_groupsize: int | None = None
    ) -> int:
        """Columns per group of a layer: for MLPs, else the default."""
        return setting_of(layer_name, default_groupsize, mlp_groupsize)

    def layer_bits(self, layer_name: str | None) -> LayerBits:
        """Bits and group size of one layer."""
        return LayerBits(
            wbits=self.resolve_bits(layer_name, self.wbits, self.mlp_wbits, self.module_wbits),
            groupsize=self.resolve_groupsize(layer_name, self.groupsize, self.mlp_groupsize),
        )

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float:
        """Codes, scales and zero points; ``g_idx`` of ``actorder``, 32 / out bits, is left out."""
        bits = self.layer_bits(layer_name)
        return stored_bits(wbits or bits.wbits, bits.groupsize, in_features)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """A single one."""
        return (FactorKey(self.percdamp, self.actorder),)

    def piece_key(self, layer_name: str) -> tuple[int, int]:
        """Bits and group size: layers with the same are solved together."""
        return self.layer_bits(layer_name)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Calls by column, products, and what is done to each weight."""
        by_weight = 2 * in_features + WEIGHT_COST + (SEARCH_COST if self.mse else 0)
        return float(in_features * (COLUMN_COST + num_rows * by_weight))

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, GPTQResult]:
        """Quantize layers that share an input; those with the same bits are solved together."""
        by_bits = itertools.groupby(sorted(weights, key=self.piece_key), key=self.piece_key)
        results: dict[str, GPTQResult] = {}
        for _, names in by_bits:
            results |= self._quantize_alike({name: weights[name] for name in names}, factors)
        return {name: results[name] for name in weights}

    def _quantize_alike(
        self, weights: Mapping[str, Tensor], factors: HessianFactors
    ) -> dict[str, GPTQResult]:
        """Layers with the same bits and group size: their rows are solved together."""
        bits = self.layer_bits(next(iter(weights)))
        rule = GridRule(
            wbits=bits.wbits,
            groupsize=factors.hessian.shape[0] if bits.groupsize == -1 else bits.groupsize,
            sym=self.sym,
            search=GridSearch(self.q_grid, self.q_norm) if self.mse else None,
            static=self.static_groups,
        )
        stacked = torch.cat(list(weights.values()))
        cuts = even_cuts(len(stacked), row_tile(stacked.device, stacked.shape[1]))
        solutions, errors = zip(
            *(self._solve(stacked[a:b], factors, rule) for a, b in cuts), strict=True
        )
        sizes = [len(weight) for weight in weights.values()]
        factors.row_errors |= zip(
            weights, torch.cat(errors, dim=1).split(sizes, dim=1), strict=True
        )
        return {
            name: self._result(bits, part, factors.row_errors[name])
            for name, part in zip(weights, Solution.join(solutions).split(sizes), strict=True)
        }

    def _solve(
        self, weight: Tensor, factors: HessianFactors, rule: GridRule
    ) -> tuple[Solution, Float[Tensor, "2 out"]]:
        """Solution of rows, and each row's output error and output energy."""
        try:
            factor = factors.at(self.percdamp, self.actorder)
        except QuantizationError as error:
            factors.fallbacks.append(f"round to nearest: {error}")
            solution = nearest_solution(weight, fit_static_grid(weight, rule), rule.groupsize)
        else:
            importance = factors.hessian.diagonal().sqrt() if self.weighted_mse else None
            solution = gptq_quantize(
                weight, factor, rule, blocksize=self.blocksize, importance=importance
            )
        return self._no_worse_than_rounding(solution, weight, factors)

    def _no_worse_than_rounding(
        self, solution: Solution, weight: Tensor, factors: HessianFactors
    ) -> tuple[Solution, Float[Tensor, "2 out"]]:
        """Best of solved and rounded rows, and each row's output error and output energy."""
        columns = weight.T.contiguous()
        nearest = solution.nearest(columns)
        solved, rounded, energy = (
            quadratic_form(part, factors.hessian)
            for part in (columns - solution.columns(), columns - nearest.columns(), columns)
        )
        worse = rounded < solved
        if worse.any():
            factors.rounded_rows += int(worse.sum())
            solution = solution.replace_rows(worse, nearest)
        return solution, torch.stack([torch.minimum(solved, rounded), energy])

    def _result(self, bits: LayerBits, solution: Solution, errors: Tensor) -> GPTQResult:
        scales, zeros = solution.grid.scale, solution.grid.zero_point
        if bits.groupsize == -1:
            scales, zeros = scales.T, zeros.T
        result = GPTQResult(
            wbits=bits.wbits,
            groupsize=bits.groupsize,
            actorder=self.actorder,
            sym=self.sym,
            qweight=solution.codes.T.to("cpu", torch.int32).contiguous(),
            scales=scales.to("cpu", torch.float16).contiguous(),
            qzeros=zeros.to("cpu", torch.float16).contiguous(),
            perm=None if solution.order is None else solution.order.cpu(),
        )
        RowErrors(output=errors).fill(result, len(solution.codes))
        return result

    def get_quant_config(self) -> dict:
        """Top level of a GPTQ v1 checkpoint's ``quantization_config``."""
        return gptq_quant_config(
            wbits=self.wbits,
            groupsize=self.groupsize,
            actorder=self.actorder and not self.static_groups and self._has_groups(),
            sym=self.sym,
            mlp_wbits=self.mlp_wbits,
            mlp_groupsize=self.mlp_groupsize,
            module_wbits=self.module_wbits,
        )

    def _has_groups(self) -> bool:
        return any(size not in (None, -1) for size in (self.groupsize, self.mlp_groupsize))

    def layer_format(self, layer_name: str) -> LayerFormat:
        """GPTQ's layout."""
        bits = self.layer_bits(layer_name)
        return gptq_format(bits.wbits, bits.groupsize)
