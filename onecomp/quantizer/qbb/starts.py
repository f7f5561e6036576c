"""First levels, before a Hessian is looked at.

Weights are transposed (``in out``).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.binary_levels import in_float16
from onecomp.quantizer.pieces import step_cuts
from onecomp.quantizer.qbb.fit import refitted
from onecomp.quantizer.qbb.levels import Bases, BasisLevels

START_FITS = 5
"""Rounds of fitting the scales."""
SHRINKS = 16
"""Ranges that an evenly spaced start is tried with."""


def greedy_levels(
    columns: Float[Tensor, "in out"],
    importance: Float[Tensor, "in"],
    *,
    num_bases: int,
    num_groups: int,
) -> BasisLevels:
    """Each base takes the signs of what those before it leave, and their mean magnitude as scale.

    Args:
        columns: Transposed weight.
        importance: Weight of each column in the mean.
        num_bases: Sign matrices.
        num_groups: Groups of neighbouring columns with scales of their own.
    """
    shares = importance.view(num_groups, -1, 1)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(shares.dtype).tiny)
    rest = columns.reshape(num_groups, -1, columns.shape[1]).abs()
    alpha = []
    for _ in range(num_bases):
        alpha.append((rest * shares).sum(dim=1))
        rest = (rest - alpha[-1][:, None]).abs_()
    return BasisLevels(in_float16(torch.stack(alpha, dim=1)))


def even_levels(
    columns: Float[Tensor, "in out"], *, num_bases: int, num_groups: int, shrink: float = 1.0
) -> BasisLevels:
    """Evenly spaced levels from minus to plus the largest magnitude, or a part of it.

    The scales are powers of two times half a step: plain rounding at these bits, with as many
    levels below zero as above. A single base takes the mean magnitude instead of the largest.
    """
    magnitudes = columns.reshape(num_groups, -1, columns.shape[1]).abs()
    reach = magnitudes.amax(dim=1) if num_bases > 1 else magnitudes.mean(dim=1)
    powers = 2.0 ** torch.arange(num_bases - 1, -1, -1, device=columns.device)
    step = reach * (shrink / (2**num_bases - 1))
    return BasisLevels(in_float16(powers[:, None] * step[:, None, :]))


def start_levels(
    columns: Float[Tensor, "in out"],
    importance: Float[Tensor, "in"],
    *,
    num_bases: int,
    num_groups: int,
) -> BasisLevels:
    """Levels of least squared error without compensation, weighted by column.

    The best of the greedy and of evenly spaced ones, then fitted.
    """
    cuts = step_cuts(columns.shape[1], len(columns))
    counts = {"num_bases": num_bases, "num_groups": num_groups}
    alpha = [_start_levels(columns[:, a:b], importance, **counts).alpha for a, b in cuts]
    return BasisLevels(torch.cat(alpha, dim=2))


def _start_levels(
    columns: Tensor, importance: Tensor, *, num_bases: int, num_groups: int
) -> BasisLevels:
    counts = {"num_bases": num_bases, "num_groups": num_groups}
    shrinks = torch.linspace(1, 1 / SHRINKS, SHRINKS).tolist() if num_bases > 1 else [1.0]
    best = greedy_levels(columns, importance, **counts)
    least = _weighted_errors(columns, best.rounded(columns), importance, num_groups)
    for shrink in shrinks:
        levels = even_levels(columns, **counts, shrink=shrink)
        errors = _weighted_errors(columns, levels.rounded(columns), importance, num_groups)
        better = (errors < least)[:, None]
        best = BasisLevels(torch.where(better, levels.alpha, best.alpha))
        least = torch.minimum(least, errors)
    return fitted_levels(columns, best, importance)


def fitted_levels(
    columns: Float[Tensor, "in out"], levels: BasisLevels, importance: Float[Tensor, "in"]
) -> BasisLevels:
    """Scales fitted in turns with the choice of the nearest level, errors weighted by column.

    Lloyd's algorithm for levels that are sums.
    """
    for _ in range(START_FITS):
        levels = refitted(columns, levels.rounded(columns), importance).levels
    return levels


def _weighted_errors(
    columns: Tensor, bases: Bases, importance: Tensor, num_groups: int
) -> Float[Tensor, "groups out"]:
    squares = bases.rest(columns).square_().mul_(importance[:, None])
    return squares.view(num_groups, -1, columns.shape[1]).sum(dim=1)
