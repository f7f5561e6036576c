"""Scales and signs of binary factors, improved under the whole Hessian: the error never rises.

Scales are least-squares solutions. Signs flip where that lowers the error (local search): rows of
``A`` are independent of each other; entries of ``B`` are not, and flip in sets of which no two
share a column.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.dbf.factors import SMALLEST, BinaryFactors, parts

NEARNESS = 1e-4
"""Weight of staying where it is in a least-squares fit, of each unknown's own curvature: it makes
every fit solvable, also for columns that no token used."""
COLUMN_BLOCK = 64
"""Columns of ``A`` whose effect on the others is added up before it is applied."""
MAX_ROUNDS = 2
SMALLEST_FALL = 0.02
"""Rounds end when the error falls by less than this share."""


def refine(
    weight: Float[Tensor, "layers out in"],
    hessian: Float[Tensor, "in in"],
    factors: BinaryFactors,
    max_rounds: int = MAX_ROUNDS,
) -> BinaryFactors:
    """Fit scales and flip signs in turn, until the error hardly falls.

    Args:
        weight: What the factors stand for.
        hessian: Of the input that all layers share, symmetric.
        factors: Where to start; its signs are written to.
        max_rounds: Most rounds.
    """
    factors = fit_scales(weight, hessian, factors)
    error = output_error(weight, hessian, factors)
    for _ in range(max_rounds):
        flip_row_signs(weight, hessian, factors)
        flip_column_signs(weight, hessian, factors)
        factors = fit_scales(weight, hessian, factors)
        before, error = error, output_error(weight, hessian, factors)
        if (error >= (1 - SMALLEST_FALL) * before).all():
            break
    return factors


def output_error(
    weight: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> Float[Tensor, "layers"]:
    """``tr(ΔW H ΔWᵀ)`` of each layer."""
    difference = factors.weight().sub_(weight)
    return (difference @ hessian).mul_(difference).sum(dim=(-2, -1))


def fit_scales(
    weight: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> BinaryFactors:
    """Fit the middle, the columns' and the rows' scales, one after the other."""
    pulled = weight @ hessian
    factors = _fit_middle(pulled, hessian, factors)
    factors = _fit_columns(pulled, hessian, factors)
    product = factors.weight()
    gain = (pulled * product).sum(dim=-1)
    del pulled
    curvature = (product @ hessian).mul_(product).sum(dim=-1)
    gain = gain / curvature.clamp_min(SMALLEST)
    gain = torch.where(curvature > SMALLEST, gain, 1.0)
    return replace(factors, row_scale=factors.row_scale * gain)


def _fit_middle(
    pulled: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> BinaryFactors:
    num_layers, rank, num_columns = factors.column_signs.shape
    curvature = pulled.new_zeros(num_layers, rank, rank)
    linear = pulled.new_zeros(num_layers, rank, num_columns)
    of_rows = (factors.row_signs, factors.row_scale[..., None], pulled)
    for some_signs, scale, rows in zip(*map(parts, of_rows), strict=True):
        left = (some_signs * scale).mT
        curvature.baddbmm_(left, left.mT)
        linear.baddbmm_(left, rows)
    right = factors.column_signs * factors.column_scale[..., None, :]
    linear = linear.mul_(right).sum(dim=-1)
    curvature *= right @ hessian @ right.mT
    del right
    return replace(factors, middle=_solve(curvature, linear, factors.middle))


def _fit_columns(
    pulled: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> BinaryFactors:
    product = factors.left() @ factors.column_signs
    linear = (product * pulled).sum(dim=-2)
    curvature = (product.mT @ product).mul_(hessian)
    del product
    return replace(factors, column_scale=_solve(curvature, linear, factors.column_scale))


def _solve(
    curvature: Float[Tensor, "layers size size"],
    linear: Float[Tensor, "layers size"],
    present: Float[Tensor, "layers size"],
) -> Float[Tensor, "layers size"]:
    """Least-squares solution, drawn a little to the present one; that where there is none.

    ``curvature`` is written to.
    """
    diagonal = curvature.diagonal(dim1=-2, dim2=-1)
    pull = NEARNESS * (diagonal + diagonal.mean(dim=-1, keepdim=True) * NEARNESS) + SMALLEST
    residual = linear - (curvature @ present[..., None])[..., 0]
    diagonal += pull
    lower, failed = torch.linalg.cholesky_ex(curvature)
    solution = present + torch.cholesky_solve(residual[..., None], lower)[..., 0]
    usable = (failed == 0)[..., None] & solution.isfinite().all(dim=-1, keepdim=True)
    return torch.where(usable, solution, present)


def flip_row_signs(
    weight: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> None:
    """One pass over the columns of ``A``, in place: each sign flips that lowers its row's error.

    Row by row the error is a quadratic form in the signs, with the Gram matrix of what stands right
    of ``A``. Columns go one after the other, all rows at once.
    """
    right = factors.right()
    pulled = right @ hessian
    gram = pulled @ right.mT
    del right
    of_rows = (factors.row_signs, weight, factors.row_scale[..., None])
    for some_signs, rows, scale in zip(*map(parts, of_rows), strict=True):
        slope = torch.baddbmm(rows @ pulled.mT, scale * some_signs, gram, beta=-1)
        for first in range(0, gram.shape[-1], COLUMN_BLOCK):
            block = slice(first, first + COLUMN_BLOCK)
            change = _flips_of_block(
                some_signs[..., block], slope[..., block], gram[..., block, block], scale
            )
            some_signs[..., block] += change
            rest = slice(first + COLUMN_BLOCK, None)
            slope[..., rest] += (scale * change) @ gram[..., block, rest]


def _flips_of_block(
    block_signs: Float[Tensor, "layers out block"],
    slope: Float[Tensor, "layers out block"],
    gram: Float[Tensor, "layers block block"],
    scale: Float[Tensor, "layers out 1"],
) -> Float[Tensor, "layers out block"]:
    """What is added to the signs: -2, 0 or 2.

    A sign ``a`` with scale ``d`` flips where that changes its row's error, by ``-4 a d`` times the
    slope plus ``4 d²`` times the curvature, to the better.
    """
    slope, change = slope.clone(), torch.zeros_like(block_signs)
    threshold = scale.square() * gram.diagonal(dim1=-2, dim2=-1)[..., None, :]
    for j in range(block_signs.shape[-1]):
        own = block_signs[..., j : j + 1]
        flips = own * scale * slope[..., j : j + 1] > threshold[..., j : j + 1]
        change[..., j : j + 1] = torch.where(flips, -2 * own, 0.0)
        slope += (scale * change[..., j : j + 1]) * gram[..., j : j + 1, :]
    return change


def flip_column_signs(
    weight: Float[Tensor, "layers out in"], hessian: Float[Tensor, "in in"], factors: BinaryFactors
) -> None:
    """One pass over the entries of ``B``, by wrapped diagonals: signs flip that lower the error.

    They flip in place.
    """
    left, scale = factors.left(), factors.column_scale
    grams = left.mT @ left
    difference = factors.weight().sub_(weight)
    slopes = (left.mT @ difference @ hessian).mul_(scale[..., None, :])
    del left, difference
    for i in range(len(weight)):
        _flip_diagonals(factors.column_signs[i], slopes[i], grams[i], hessian, scale[i])


def _flip_diagonals(
    block_signs: Float[Tensor, "rank in"],
    slope: Float[Tensor, "rank in"],
    gram: Float[Tensor, "rank rank"],
    hessian: Float[Tensor, "in in"],
    scale: Float[Tensor, "in"],
) -> None:
    """Flip signs in place.

    The entries of a wrapped diagonal share no column and hardly a row, so that flips of two of them
    change the error by little more than the two alone. Of those that would lower it alone, taken by
    falling gain, as many flip as lower it most together.
    """
    rank, num_columns = block_signs.shape
    along = torch.arange(num_columns, device=block_signs.device)
    own, own_column = gram.diagonal(), hessian.diagonal() * scale.square()
    for shift in range(rank):
        rows, columns = (along + shift) % rank, along
        gain = block_signs[rows, columns] * slope[rows, columns] - own[rows] * own_column
        helps = (gain > 0).nonzero()[:, 0]
        if not len(helps):
            continue
        order = helps[gain[helps].argsort(descending=True)]
        rows, columns, gain = rows[order], columns[order], gain[order]
        change = -2 * block_signs[rows, columns]
        grams, curvatures = gram[rows], hessian[columns].mul_(scale).mul_(scale[columns, None])
        coupling = grams[:, rows].mul_(curvatures[:, columns])
        coupling.mul_(change[:, None]).mul_(change)
        together = (2 * coupling.tril_(-1).sum(dim=1) - 4 * gain).cumsum(dim=0)
        best = int(together.argmin()) + 1
        change = change[:best]
        block_signs[rows[:best], columns[:best]] += change
        slope.addmm_((grams[:best] * change[:, None]).T, curvatures[:best])
