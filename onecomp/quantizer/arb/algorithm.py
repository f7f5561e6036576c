"""ARB: mean, scale and signs of a row, each in turn the best for the other two.

Li et al., 2024, "ARB-LLM: Alternating Refined Binarizations for Large Language Models"
(arXiv:2410.03129), section 3.2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.binary_levels import Levels, by_group

START_ITERATIONS = 15
WEIGHTS_CHUNK = 1 << 16
"""Weights alternated on at once: bounds the temporaries, and they stay in a cache."""


def alternate(groups: Float[Tensor, "groups size out"], weights: Tensor, levels: Levels) -> Levels:
    """One round: signs for the levels, then ``half`` for the signs, then ``centre`` for both.

    No step raises the sum of ``weights * (w - centre - half * sign) ** 2``.

    Args:
        groups: Transposed weight by groups of columns.
        weights: Weight of each square, shape of ``groups`` or broadcast to it.
        levels: Those so far.
    """
    centre, half = levels.centre[:, None], levels.half[:, None]
    signs = torch.where(groups >= centre, 1.0, -1.0)
    total = weights.expand_as(groups).sum(dim=1, keepdim=True)
    half = (weights * signs * (groups - centre)).sum(dim=1, keepdim=True) / total
    centre = (weights * (groups - half * signs)).sum(dim=1, keepdim=True) / total
    return Levels(centre[:, 0], half[:, 0])


def staged_levels(
    columns: Float[Tensor, "in out"],
    importance: Float[Tensor, "in"],
    num_groups: int,
    *,
    split_points: int,
) -> list[Levels]:
    """Levels of every stage: of all weights, then of fewer and fewer small ones.

    Stage ``k`` alternates on the ``k / split_points`` of each group's weights that are nearest to
    its mean. Large weights pull levels outwards, away from the many small ones. Under a Hessian
    either may be the better start, so that each stage is one.

    Args:
        columns: Transposed weight.
        importance: Weight of each column.
        num_groups: Of the columns.
        split_points: Number of stages.

    Returns:
        ``split_points`` of them, float32.
    """
    weights = importance.reshape(num_groups, -1, 1)
    rows = max(1, WEIGHTS_CHUNK // len(columns))
    chunks = [by_group(part, num_groups) for part in columns.split(rows, dim=1)]
    stages = []
    for stage in range(split_points, 0, -1):
        size = -(-chunks[0].shape[1] * stage // split_points)
        parts = [_of_nearest(groups, weights, size) for groups in chunks]
        stages.append(Levels.join(parts).in_float16())
    return stages


def _of_nearest(groups: Tensor, weights: Tensor, size: int) -> Levels:
    """Levels of the ``size`` weights of each group that are nearest to its mean."""
    mean = (weights * groups).sum(dim=1) / weights.sum(dim=1)
    distance = (groups - mean[:, None]).abs_()
    weights = weights * (distance <= distance.kthvalue(size, dim=1, keepdim=True).values)
    levels = Levels(mean, torch.zeros_like(mean))
    for _ in range(START_ITERATIONS):
        levels = alternate(groups, weights, levels)
    return levels
