"""Scales of least output error for signs that are given.

Weights are transposed (``in out``).
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from onecomp.quantizer.binary_levels import in_float16
from onecomp.quantizer.pieces import step_cuts
from onecomp.quantizer.qbb.levels import Bases, BasisLevels, sign_of

RIDGE = 1e-6
"""Of the mean diagonal: keeps the equations of the scales solvable where bases are equal."""


def refitted(
    columns: Float[Tensor, "in out"],
    bases: Bases,
    hessian: Float[Tensor, "in in"] | Float[Tensor, "in"],
) -> Bases:
    """The scales of least output error for the signs as they are, in numbers that float16 holds.

    Least squares under the Hessian, group after group. Rows keep their scales where rounding them
    costs more than the fit gains. Where a scale comes out negative its signs are turned instead.

    Args:
        columns: Transposed weight.
        bases: Signs and scales so far.
        hessian: Symmetric and positive semi-definite; its diagonal where it has nothing else.

    Raises:
        QuantizationError: A scale above 65504, float16's largest number.
    """
    cuts = step_cuts(columns.shape[1], len(columns))
    return Bases.join([_refitted(columns[:, a:b], bases.rows(a, b), hessian) for a, b in cuts])


def _refitted(columns: Tensor, bases: Bases, hessian: Tensor) -> Bases:
    alpha, size = bases.levels.alpha.clone(), len(columns) // len(bases.levels.alpha)
    rest = bases.rest(columns)
    for group in range(len(alpha)):
        part = slice(group * size, (group + 1) * size)
        if hessian.ndim == 1:
            gradient, within = hessian[part, None] * rest[part], hessian[part]
        else:
            gradient, within = hessian[part] @ rest, hessian[part, part]
        step = _best_step(alpha[group], bases.codes[part], within, gradient)
        alpha[group] += step
        for base, scale in enumerate(step):
            rest[part].addcmul_(sign_of(bases.codes[part], base), scale, value=-1)
    return _with_positive(bases, alpha)


def _best_step(
    alpha: Float[Tensor, "bases out"],
    codes: UInt8[Tensor, "_ out"],
    hessian: Float[Tensor, "_ _"] | Float[Tensor, "_"],
    gradient: Float[Tensor, "_ out"],
) -> Float[Tensor, "bases out"]:
    """By how much the scales of a group change; nothing where that would not lower the error.

    Args:
        alpha: Scales so far.
        codes: Signs of the group.
        hessian: The group's own part of the Hessian.
        gradient: The group's part of ``H d``.
    """
    matrix, right = _normal_equations(codes, len(alpha), hessian, gradient)
    ridge = matrix.diagonal(dim1=1, dim2=2).mean(dim=1).mul(RIDGE)
    ridge = ridge.add_(torch.finfo(torch.float64).tiny)[:, None].expand_as(right)
    wish = alpha.T + torch.linalg.solve(matrix + torch.diag_embed(ridge), right)
    step = in_float16(wish.float()).double() - alpha.T
    gain = 2 * (step * right).sum(dim=1) - torch.einsum("ri,rij,rj->r", step, matrix, step)
    return torch.where((gain > 0)[:, None], step, 0.0).T.float()


def _normal_equations(
    codes: Tensor, num_bases: int, hessian: Tensor, gradient: Tensor
) -> tuple[Float[Tensor, "out bases bases"], Float[Tensor, "out bases"]]:
    """``S H Sᵀ`` and ``S H d`` of every row in float64.

    Signs are made again for each product: kept, those of all bases would be the largest tensor.
    """
    num_rows = codes.shape[1]
    matrix = gradient.new_empty(num_rows, num_bases, num_bases, dtype=torch.float64)
    right = gradient.new_empty(num_rows, num_bases, dtype=torch.float64)
    for i in range(num_bases):
        signs = sign_of(codes, i)
        right[:, i] = (signs * gradient).sum(dim=0)
        product = hessian[:, None] * signs if hessian.ndim == 1 else hessian @ signs
        for j in range(i, num_bases):
            sums = sign_of(codes, j).mul_(product).sum(dim=0)
            matrix[:, i, j] = matrix[:, j, i] = sums
    return matrix, right


def _with_positive(bases: Bases, alpha: Float[Tensor, "groups bases out"]) -> Bases:
    negative = (alpha < 0).to(torch.uint8)
    bits = torch.arange(alpha.shape[1], device=alpha.device, dtype=torch.uint8)
    turn = (negative << bits[:, None]).sum(dim=1, dtype=torch.uint8)
    turn = turn.repeat_interleave(len(bases.codes) // len(alpha), dim=0)
    return Bases(bases.codes ^ turn, BasisLevels(alpha.abs()))
