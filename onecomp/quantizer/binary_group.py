"""The layers of an input group in one bit: what methods share around their own first levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import HessianFactor, quadratic_form
from onecomp.quantizer.binary import (
    Binary,
    Levels,
    Storable,
    best_rows,
    compensated,
    descend,
    refitted,
    sign_mean,
)
from onecomp.quantizer.checks import group_size_problems
from onecomp.quantizer.drift import drift_problems, drifted
from onecomp.quantizer.factors import FactorKey, HessianFactors, percdamp_problems
from onecomp.quantizer.pieces import even_cuts, row_tile

NUM_COMPENSATIONS = 2
"""Each time the levels are fitted after it; the first levels know nothing of the corrections that
the weights will carry."""
PRODUCTS = 3
"""Products with the Hessian that a pass takes, about."""
COLUMN_COST = 300_000
"""Multiplications that take as long as the calls a column costs in one pass, measured on a CPU."""
WEIGHT_COST = 500
"""The same for a weight, beside its share in products."""

LEAST_TILE = 256
"""Fewer rows would not outweigh the calls of kernels that a column costs."""
SMALLEST_IMPORTANCE = 1e-6
"""Of a column in first levels, relative to the mean: unused columns only break ties."""

Starts = Callable[[Float[Tensor, "in out"], Float[Tensor, "in"], int], list[Levels]]
"""First levels to search from, for transposed rows, the importance of each column, and a number of
groups."""


@dataclass(frozen=True)
class BinarySearch:
    """How signs and levels are found, from whatever levels a method begins with."""

    groupsize: int
    """Columns that share levels; -1 for a whole row."""
    num_rounds: int
    """Most rounds of turning signs and fitting levels; 0 for first levels and nearest signs."""
    percdamp: float
    """Damping of the factor that compensation walks through."""
    drift_ratio: float
    """Energy of what other quantized layers do to each input, relative to the input's own."""
    storable: Storable = Levels.in_float16
    """Rounds levels to numbers that the result can hold."""
    tied: bool = False
    """All rows have the same levels."""

    @property
    def factor_key(self) -> FactorKey:
        """Columns of large inputs first: the others make up for their errors."""
        return FactorKey(self.percdamp, by_activation=True)

    def group(
        self,
        weights: Mapping[str, Float[Tensor, "out in"]],
        factors: HessianFactors,
        starts: Starts,
    ) -> dict[str, Binary]:
        """Binarize layers that share an input.

        Rows that ``sign(w) * mean |w|`` serves better become that, and are counted in ``factors``,
        where the errors of all rows are noted, too.

        Args:
            weights: Float32 weights by layer name.
            factors: The Hessian and its factors.
            starts: Levels to begin from; the best outcome of each row is kept.
        """
        if self.tied:
            each = [self._stack({name: weights[name]}, factors, starts) for name in weights]
            return {name: binary for layer in each for name, binary in layer.items()}
        return self._stack(weights, factors, starts)

    def _stack(
        self, weights: Mapping[str, Tensor], factors: HessianFactors, starts: Starts
    ) -> dict[str, Binary]:
        """Layers on top of each other, in as few tiles of rows as they need."""
        stacked = next(iter(weights.values()))
        if len(weights) > 1:
            stacked = torch.cat(list(weights.values()))
        cuts = even_cuts(len(stacked), _tile(stacked))
        cuts = [(0, len(stacked))] if self.tied else cuts
        parts, errors = zip(
            *(self._solve(stacked[a:b].T.contiguous(), factors, starts) for a, b in cuts),
            strict=True,
        )
        sizes = [len(weight) for weight in weights.values()]
        factors.row_errors |= zip(
            weights, torch.cat(errors, dim=1).split(sizes, dim=1), strict=True
        )
        return dict(zip(weights, Binary.join(parts).split(sizes), strict=True))

    def _solve(
        self, columns: Tensor, factors: HessianFactors, starts: Starts
    ) -> tuple[Binary, Float[Tensor, "2 out"]]:
        """The best of each row, and its output error and output energy."""
        hessian, factor = factors.hessian, self._factor(factors)
        noisy = drifted(hessian, self.drift_ratio)
        num_groups = 1 if self.groupsize == -1 else len(columns) // self.groupsize
        first = starts(columns, importance_of(hessian), num_groups)
        found = [self._search(columns, levels, factor, noisy) for levels in first]
        best, _, _ = best_rows(columns, found, noisy, tied=self.tied)
        plain = sign_mean(columns, num_groups, tied=self.tied)
        best, errors, chosen = best_rows(columns, [best, plain], hessian, tied=self.tied)
        factors.rounded_rows += int(chosen.sum())
        return best, torch.stack([errors, quadratic_form(columns, hessian)])

    def _factor(self, factors: HessianFactors) -> HessianFactor | None:
        key = self.factor_key
        try:
            return factors.at(key.percdamp, key.by_activation)
        except QuantizationError as error:
            factors.fallbacks.append(f"signs not compensated: {error}")
            return None

    def _search(
        self, columns: Tensor, levels: Levels, factor: HessianFactor | None, hessian: Tensor
    ) -> Binary:
        start, settings = levels.nearest(columns), {"storable": self.storable, "tied": self.tied}
        if self.num_rounds == 0:
            return start
        for _ in range(NUM_COMPENSATIONS if factor is not None else 0):
            start = compensated(columns, start.levels, factor)
            start = refitted(columns, start, hessian, **settings)
        return descend(columns, start, hessian, num_rounds=self.num_rounds, **settings)

    def cost(self, num_rows: int, in_features: int, num_starts: int) -> float:
        """Multiplications that take as long as the search on a CPU, as ``solve_cost``."""
        passes = num_starts * (NUM_COMPENSATIONS + self.num_rounds)
        by_weight = PRODUCTS * in_features + WEIGHT_COST
        return float(passes * in_features * (COLUMN_COST + num_rows * by_weight))


def _tile(weight: Tensor) -> int:
    """Most rows searched at once: so few that the Hessian outweighs what is kept of them."""
    in_features = weight.shape[1]
    return min(row_tile(weight.device, in_features), max(LEAST_TILE, in_features // 2))


def importance_of(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in"]:
    """Mean squared input of each column relative to the mean over columns, and above zero."""
    diagonal = hessian.diagonal()
    return (diagonal / diagonal.mean().clamp(min=torch.finfo().tiny)).clamp(min=SMALLEST_IMPORTANCE)


def search_problems(groupsize: object, percdamp: object, drift_ratio: object) -> list[str]:
    """What is wrong with settings that methods share, one sentence each."""
    return [
        *group_size_problems({"groupsize": groupsize}),
        *percdamp_problems(percdamp),
        *drift_problems(drift_ratio),
    ]
