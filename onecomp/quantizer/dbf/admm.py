"""Two real factors whose magnitudes have rank one, by alternating ADMM under the whole Hessian.

Boža and Macko, 2025 (arXiv:2505.11076), section 3, solve for one factor at a time with weights on
rows and columns. Here the objective is the Hessian's: in the basis of its eigenvectors the problem
of the right factor falls apart by level, and one Cholesky factor serves all directions of a level.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.dbf.coordinates import Coordinates, eigen
from onecomp.quantizer.dbf.factors import SMALLEST, parts, rank_one

FIRST_RHO, LAST_RHO = 0.15, 0.7
RHO_POWER = 2
STEADYING = 0.1
"""Added to ``reg``: few steps need more than many."""
LAST_STEPS = 3
"""Steps at the end that keep the last penalty."""
START_STEPS, PROJECTION_STEPS = 4, 1
"""Power iterations of a projection; later ones start where the one before ended."""
UNBALANCED = 10.0
"""How many times one residual exceeds the other before the penalty changes, by a factor of two."""
FACTOR_LIMITS = (0.125, 8.0)
"""Of what the penalty is multiplied by."""


@dataclass(frozen=True)
class Search:
    """Settings of the alternation."""

    num_steps: int
    reg: float
    """Added to the Gram matrices, a fraction of their mean diagonal."""
    adapt_rho: bool
    """Change the penalty where primal and dual residual are far apart."""

    def rho(self, step: int) -> float:
        """Penalty of a step, rising."""
        progress = min(1.0, step / max(1, self.num_steps - LAST_STEPS))
        return FIRST_RHO + (LAST_RHO - FIRST_RHO) * progress**RHO_POWER


@dataclass
class Side:
    """One factor with what its steps hand on."""

    value: Float[Tensor, "layers rows columns"]
    """Magnitudes have rank one."""
    dual: Float[Tensor, "layers rows columns"]
    row: Float[Tensor, "layers columns"] | None = None
    """Row of the magnitudes: where the next projection starts."""
    rho_factor: Float[Tensor, "layers 1 1"] | float = 1.0
    """What the penalty is multiplied by."""

    def project(self, point: Float[Tensor, "layers rows columns"]) -> Float[Tensor, "layers 1 1"]:
        """Take the value nearest to ``point``, or nearly so: its signs times rank one.

        Returns:
            Norm of the change.
        """
        num_steps = START_STEPS if self.row is None else PROJECTION_STEPS
        column, self.row = rank_one(point, num_steps, self.row)
        moved = torch.zeros_like(point[..., :1, :1])
        pieces = zip(parts(point), parts(self.value), parts(column[..., None]), strict=True)
        for piece, value, some in pieces:
            new = (some * self.row[..., None, :]).copysign_(piece)
            moved += value.sub_(new).square().sum(dim=(-2, -1), keepdim=True)
            value.copy_(new)
        return moved.sqrt()

    def adapt(self, rho: Tensor | float, gap: Tensor, moved: Float[Tensor, "layers 1 1"]) -> None:
        """Double or halve the penalty of layers whose residuals are far apart.

        Args:
            rho: The step's penalty.
            gap: Solution minus projection.
            moved: Norm of what the projection changed.
        """
        primal, dual = gap.norm(dim=(-2, -1), keepdim=True), rho * moved
        change = torch.where(primal > UNBALANCED * dual, 2.0, 1.0)
        change = torch.where(dual > UNBALANCED * primal, 0.5, change)
        factor = (self.rho_factor * change).clamp(*FACTOR_LIMITS)
        self.dual.mul_(self.rho_factor / factor)
        self.rho_factor = factor


def factorise(
    weight: Float[Tensor, "layers out in"], coordinates: Coordinates, rank: int, search: Search
) -> tuple[Float[Tensor, "layers out rank"], Float[Tensor, "layers rank in"]]:
    """Factors of ``weight`` with magnitudes of rank one, in the weight's own coordinates.

    Args:
        weight: Layers of equal shape with the same input.
        coordinates: Scales and spectrum.
        rank: 1 to the smaller side of a layer.
        search: Steps and penalties.
    """
    row_weight = coordinates.row_scale.square().reciprocal()
    row_weight = (row_weight / row_weight.mean(dim=-1, keepdim=True))[..., None]
    scaled = coordinates.scaled(weight)
    left, right = _start(scaled, rank)
    target = (scaled @ coordinates.basis).mul_(coordinates.levels)
    del scaled  # before more of its size are made
    rotated = right.value @ coordinates.basis
    for step in range(search.num_steps):
        rho = search.rho(step)
        _step_left(left, rotated, target, coordinates.levels, rho, search)
        _step_right(right, rotated, *_fit_of(left, row_weight, target), coordinates, rho, search)
    del target
    unit = left.value.div_(_lengths(left.value, dim=-2))
    return (
        unit.div_(coordinates.row_scale[..., None]),
        right.value.div_(coordinates.column_scale),
    )


def _lengths(value: Float[Tensor, "layers rows columns"], dim: int) -> Tensor:
    return value.norm(dim=dim, keepdim=True).clamp_min(SMALLEST)


def _start(scaled: Float[Tensor, "layers out in"], rank: int) -> tuple[Side, Side]:
    """Leading singular vectors, with magnitudes of rank one; each side has the matrix's norm."""
    is_tall = scaled.shape[-2] > scaled.shape[-1]
    matrix = scaled.mT if is_tall else scaled
    squares, vectors = eigen(matrix @ matrix.mT)
    near = vectors[..., -rank:].flip(-1)
    del vectors  # before more of its size are made
    root = squares[..., -rank:].flip(-1).clamp_min(SMALLEST).sqrt().sqrt()
    far = (near.mT @ matrix).div_(root[..., None])
    near.mul_(root[..., None, :])
    norm = scaled.norm(dim=(-2, -1), keepdim=True)
    sides = []
    for value in (far.mT, near.mT) if is_tall else (near, far):
        side = Side(
            value.contiguous(), torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        )
        side.project(side.value)
        length = side.value.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST)
        side.value.mul_(norm / length)
        sides.append(side)
    return sides[0], sides[1]


def _regularised(gram: Float[Tensor, "layers rank rank"], reg: float) -> Tensor:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += (reg + STEADYING) * diagonal.mean(dim=-1, keepdim=True)
    return gram


def _with_penalty(gram: Float[Tensor, "layers rank rank"], penalty: Tensor | float) -> Tensor:
    """Lower Cholesky factor of ``gram`` with ``penalty`` on its diagonal; ``gram`` is changed."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += penalty if isinstance(penalty, float) else penalty[..., 0]
    return torch.linalg.cholesky_ex(gram)[0]


def _step_left(
    left: Side,
    rotated: Float[Tensor, "layers rank in"],
    target: Float[Tensor, "layers out in"],
    levels: Float[Tensor, "in"],
    rho: float,
    search: Search,
) -> None:
    """Solve for the left factor with the right one fixed, and project.

    Args:
        left: The factor, changed.
        rotated: The right factor in the basis of the eigenvectors.
        target: Weights under the Hessian, in that basis.
        levels: Of the directions.
        rho: Penalty before the factor's own multiple.
        search: Settings.
    """
    penalty = rho * left.rho_factor
    unit = rotated / _lengths(rotated, dim=-1)
    gram = _regularised((unit * levels) @ unit.mT, search.reg)
    solved = target @ unit.mT
    del unit
    inverse = torch.cholesky_inverse(_with_penalty(gram, penalty))
    del gram
    for piece, value, dual in zip(parts(solved), parts(left.value), parts(left.dual), strict=True):
        piece.add_((value - dual).mul_(penalty))
        piece.copy_(piece @ inverse)
    del inverse
    moved = left.project(left.dual.add_(solved))
    left.dual.sub_(left.value)
    if search.adapt_rho:
        left.adapt(penalty, solved.sub_(left.value), moved)


def _fit_of(
    left: Side, row_weight: Float[Tensor, "layers out 1"], target: Float[Tensor, "layers out in"]
) -> tuple[Float[Tensor, "layers rank rank"], Float[Tensor, "layers rank in"]]:
    """Gram matrix of the left factor with columns of length 1, and its product with the target."""
    lengths = _lengths(left.value, dim=-2)
    num_layers, _, rank = left.value.shape
    gram = target.new_zeros(num_layers, rank, rank)
    linear = target.new_zeros(num_layers, rank, target.shape[-1])
    pieces = zip(parts(left.value), parts(row_weight), parts(target), strict=True)
    for value, weight, some in pieces:
        unit = value / lengths
        weighted = (unit * weight).mT
        gram.baddbmm_(weighted, unit)
        linear.baddbmm_(weighted, some)
    return gram, linear


def _step_right(
    right: Side,
    rotated: Float[Tensor, "layers rank in"],
    gram: Float[Tensor, "layers rank rank"],
    linear: Float[Tensor, "layers rank in"],
    coordinates: Coordinates,
    rho: float,
    search: Search,
) -> None:
    """Solve for the right factor with the left one fixed, and project.

    The dual variable stays in the basis of the eigenvectors.

    Args:
        right: The factor, changed.
        rotated: Its value in that basis, changed.
        gram: Of the left factor; changed.
        linear: Left factor times the weights under the Hessian, in that basis; changed.
        coordinates: Basis and levels.
        rho: Penalty before the factor's own multiple.
        search: Settings.
    """
    penalty = rho * right.rho_factor
    gram = _regularised(gram, search.reg)
    solved = linear.add_(rotated.sub_(right.dual).mul_(penalty))
    for first, last in coordinates.runs:
        lower = _with_penalty(gram * coordinates.levels[first], penalty)
        solved[..., first:last] = torch.cholesky_solve(solved[..., first:last], lower)
    torch.matmul(right.dual.add_(solved), coordinates.basis.T, out=rotated)
    moved = right.project(rotated)
    torch.matmul(right.value, coordinates.basis, out=rotated)
    right.dual.sub_(rotated)
    if search.adapt_rho:
        right.adapt(penalty, solved.sub_(rotated), moved)
