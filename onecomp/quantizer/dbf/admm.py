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
from onecomp.quantizer.dbf.factors import SMALLEST, rank_one, signs

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

    def project(self, point: Float[Tensor, "layers rows columns"]) -> None:
        """Take the value nearest to ``point``, or nearly so: its signs times rank one."""
        magnitudes = point.abs()
        num_steps = START_STEPS if self.row is None else PROJECTION_STEPS
        column, self.row = rank_one(magnitudes, num_steps, self.row)
        self.value = signs(point) * column[..., None] * self.row[..., None, :]

    def adapt(self, rho: Tensor | float, gap: Tensor, move: Tensor) -> None:
        """Double or halve the penalty of layers whose residuals are far apart.

        Args:
            rho: The step's penalty.
            gap: Solution minus projection.
            move: Projection minus the one before.
        """
        primal, dual = (t.norm(dim=(-2, -1), keepdim=True) for t in (gap, move))
        dual = rho * dual
        change = torch.where(primal > UNBALANCED * dual, 2.0, 1.0)
        change = torch.where(dual > UNBALANCED * primal, 0.5, change)
        factor = (self.rho_factor * change).clamp(*FACTOR_LIMITS)
        self.dual = self.dual * (self.rho_factor / factor)
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
    scaled = weight * coordinates.row_scale[..., None] * coordinates.column_scale
    row_weight = coordinates.row_scale.square().reciprocal()
    row_weight = (row_weight / row_weight.mean(dim=-1, keepdim=True))[..., None]
    left, right = _start(scaled, rank)
    target = (scaled @ coordinates.basis).mul_(coordinates.levels)
    rotated, unit = right.value @ coordinates.basis, left.value
    for step in range(search.num_steps):
        rho = search.rho(step)
        unit = rotated / rotated.norm(dim=-1, keepdim=True).clamp_min(SMALLEST)
        gram = _regularised((unit * coordinates.levels) @ unit.mT, search.reg)
        _step_left(left, gram, target @ unit.mT, rho, search.adapt_rho)
        unit = left.value / left.value.norm(dim=-2, keepdim=True).clamp_min(SMALLEST)
        weighted = (unit * row_weight).mT
        gram = _regularised(weighted @ unit, search.reg)
        linear = weighted @ target
        rotated = _step_right(right, rotated, gram, linear, coordinates, rho, search.adapt_rho)
    return unit / coordinates.row_scale[..., None], right.value / coordinates.column_scale


def _start(scaled: Float[Tensor, "layers out in"], rank: int) -> tuple[Side, Side]:
    """Leading singular vectors, with magnitudes of rank one; each side has the matrix's norm."""
    is_tall = scaled.shape[-2] > scaled.shape[-1]
    matrix = scaled.mT if is_tall else scaled
    squares, vectors = eigen(matrix @ matrix.mT)
    vectors = vectors[..., -rank:].flip(-1)
    root = squares[..., -rank:].flip(-1).clamp_min(SMALLEST).sqrt().sqrt()
    near, far = vectors * root[..., None, :], vectors.mT @ matrix / root[..., None]
    norm = scaled.norm(dim=(-2, -1), keepdim=True)
    sides = []
    for value in (far.mT, near.mT) if is_tall else (near, far):
        side = Side(value, torch.zeros_like(value))
        side.project(value)
        length = side.value.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST)
        side.value = side.value * (norm / length)
        sides.append(side)
    return sides[0], sides[1]


def _regularised(gram: Float[Tensor, "layers rank rank"], reg: float) -> Tensor:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += (reg + STEADYING) * diagonal.mean(dim=-1, keepdim=True)
    return gram


def _step_left(left: Side, gram: Tensor, linear: Tensor, rho: float, adapt: bool) -> None:
    """Solve for the left factor with the right one fixed, and project."""
    penalty = rho * left.rho_factor
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(gram + penalty * eye)[0]
    inverse = torch.cholesky_inverse(lower)
    solved = linear.addcmul_(left.value - left.dual, torch.as_tensor(penalty)) @ inverse
    before = left.value
    left.project(solved + left.dual)
    gap = solved.sub_(left.value)
    left.dual += gap
    if adapt:
        left.adapt(penalty, gap, left.value - before)


def _step_right(
    right: Side,
    rotated: Float[Tensor, "layers rank in"],
    gram: Float[Tensor, "layers rank rank"],
    linear: Float[Tensor, "layers rank in"],
    coordinates: Coordinates,
    rho: float,
    adapt: bool,
) -> Float[Tensor, "layers rank in"]:
    """Solve for the right factor with the left one fixed, and project.

    The dual variable stays in the basis of the eigenvectors.

    Args:
        right: The factor, changed.
        rotated: Its value in that basis.
        gram: Of the left factor.
        linear: Left factor times the weights under the Hessian, in that basis.
        coordinates: Basis and levels.
        rho: Penalty before the factor's own multiple.
        adapt: Change that multiple.

    Returns:
        The new value in that basis.
    """
    penalty = rho * right.rho_factor
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved = linear.add_((rotated - right.dual).mul_(penalty))
    for first, last in coordinates.runs:
        lower = torch.linalg.cholesky_ex(gram * coordinates.levels[first] + penalty * eye)[0]
        solved[..., first:last] = torch.cholesky_solve(solved[..., first:last], lower)
    right.project((solved + right.dual) @ coordinates.basis.T)
    projected = right.value @ coordinates.basis
    gap = solved.sub_(projected)
    right.dual += gap
    if adapt:
        right.adapt(penalty, gap, projected - rotated)
    return projected
