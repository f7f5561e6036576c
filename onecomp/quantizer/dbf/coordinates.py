"""The coordinates in which factors are searched: balanced weights, the Hessian by its spectrum.

Scaling rows and columns changes where the search starts and what its penalty counts as near. The
objective is that of the Hessian in any coordinates, so that balancing and importance add up.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import all_finite
from onecomp.quantizer.drift import drifted

BALANCE_MODES = ("l1", "l2")
DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to it: columns that few tokens used count a little."""
TEMPER = 0.8
"""Exponent of the spectrum while factors are searched. The search of signs that follows has the
whole Hessian; measured, a search with a flatter one ends lower."""
FLOOR = 0.01
"""Least level, of the mean one."""
LEVEL_RATIO = 2.0
"""The spectrum is rounded to levels so far apart: all directions of one level need one factor."""
ROW_SHARE, COLUMN_SHARE = 0.5, 0.25
"""Exponents of the balancing scales on top of importance. Measured, columns that are balanced in
full cost more than they bring: their penalty then no longer fits the Hessian's diagonal."""
RESIDUAL = 1e-3
CALM_SWEEPS = 3
SMALLEST = 1e-12
TINIEST = 1e-30


@dataclass(frozen=True)
class Balancing:
    """How rows and columns are brought to equal norms (Sinkhorn and Knopp, 1967)."""

    num_sweeps: int
    target: float
    """Norm of every row."""
    mode: str
    """One of ``BALANCE_MODES``."""


@dataclass(frozen=True)
class Coordinates:
    """Scales of rows and columns, and the Hessian's eigenvectors in scaled columns."""

    size: Float[Tensor, "layers 1"]
    """Root mean square of each layer: the unit in which its weights are measured."""
    row_scale: Float[Tensor, "layers out"]
    column_scale: Float[Tensor, "in"]
    basis: Float[Tensor, "in in"]
    """Eigenvectors as columns, by rising level."""
    levels: Float[Tensor, "in"]
    """Their weights; mean 1."""
    runs: tuple[tuple[int, int], ...]
    """First and last + 1 direction of each level."""

    @staticmethod
    def of(
        weight: Float[Tensor, "layers out in"],
        hessian: Float[Tensor, "in in"],
        balancing: Balancing | None,
    ) -> "Coordinates":
        """Coordinates of layers that share an input.

        Args:
            weight: Their weights, stacked.
            hessian: Positive definite.
            balancing: None leaves rows alone and scales columns by their importance only.
        """
        size = weight.square().mean(dim=(-2, -1)).sqrt().clamp_min(TINIEST)[:, None]
        importance = hessian.diagonal().sqrt()
        column_scale = importance / importance.mean()
        row_scale = weight.new_ones(weight.shape[:2])
        if balancing is not None:
            stacked = weight * (column_scale / size)[:, None]
            rows, columns = balance(stacked.flatten(0, 1), balancing)
            del stacked  # before more of its size is made
            column_scale = column_scale * columns**COLUMN_SHARE
            row_scale = rows.view_as(row_scale) ** ROW_SHARE
        scaled = (hessian / column_scale[:, None]).div_(column_scale)
        levels, basis = eigen(scaled)
        levels = levels.clamp_min(0).pow(TEMPER)
        levels = (levels / levels.mean()).clamp_min(FLOOR)
        rounded = (levels.log() / torch.tensor(LEVEL_RATIO).log()).round()
        levels = LEVEL_RATIO**rounded
        edges = (rounded.diff() != 0).nonzero()[:, 0] + 1
        runs = tuple(pairwise([0, *edges.tolist(), len(levels)]))
        return Coordinates(size, row_scale, column_scale, basis, levels, runs)

    def scaled(self, weight: Float[Tensor, "layers out in"]) -> Float[Tensor, "layers out in"]:
        """Weights in these coordinates."""
        return (weight * (self.row_scale / self.size)[..., None]).mul_(self.column_scale)


def damped(hessian: Float[Tensor, "in in"], drift_ratio: float) -> Float[Tensor, "in in"]:
    """A copy of the drifted Hessian, a hundredth of its mean diagonal added; of zeros the identity.

    Args:
        hessian: ``2 / tokens * XᵀX``.
        drift_ratio: See ``drifted``.
    """
    damped = drifted(hessian, drift_ratio)
    mean = hessian.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return damped


def eigen(
    matrix: Float[Tensor, "*layers size size"],
) -> tuple[Float[Tensor, "*layers size"], Float[Tensor, "*layers size size"]]:
    """Rising eigenvalues and eigenvectors in float32; computed in float64 where that does not do.

    Raises:
        QuantizationError: Not even then were there any.
    """
    for dtype in (torch.float32, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if all_finite(values) and all_finite(vectors):
            return values.float(), vectors.float()
    raise QuantizationError(f"No eigenvectors of a matrix of {matrix.shape[-1]} were found.")


def balance(
    weight: Float[Tensor, "rows columns"], balancing: Balancing
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "columns"]]:
    """Positive scales with which all rows of ``rows[:, None] * weight * columns`` have one norm.

    Columns get the norm that follows from the rows'. Rows and columns of zeros keep finite scales.
    Stops early once no norm is off by more than a thousandth in three sweeps.

    Args:
        weight: Any matrix.
        balancing: Sweeps, norm of a row, and which norm: L1 or L2.
    """
    power = 1 if balancing.mode == "l1" else 2
    mass = weight.abs().pow_(power)
    num_rows, num_columns = mass.shape
    row_target = balancing.target**power
    column_target = num_rows * row_target / num_columns
    rows, columns = mass.new_ones(num_rows), mass.new_ones(num_columns)
    calm = 0
    for _ in range(balancing.num_sweeps):
        rows = row_target / (mass @ columns).clamp_min(SMALLEST)
        columns = column_target / (rows @ mass).clamp_min(SMALLEST)
        gauge = (columns.mean() / rows.mean()).sqrt()
        rows, columns = rows * gauge, columns / gauge
        off = (rows * (mass @ columns) / row_target - 1).abs().max()
        calm = calm + 1 if off < RESIDUAL else 0
        if calm == CALM_SWEEPS:
            break
    return rows ** (1 / power), columns ** (1 / power)
