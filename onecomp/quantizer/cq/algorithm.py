"""CQ: the best two clusters of numbers on a line, found exactly."""

import torch
from jaxtyping import Float
from torch import Tensor

SETS_CHUNK = 1 << 16
"""Numbers that are sorted at once, where a set is not larger: bounds the temporaries."""


def two_clusters(
    sets: Float[Tensor, "sets size"], importance: Float[Tensor, "sets size"]
) -> tuple[Float[Tensor, "sets"], Float[Tensor, "sets"]]:
    """The split of every set with the least sum of weighted squared distances to the means.

    In one dimension the best clusters are neighbours in sorted order (Fisher, 1958, "On grouping
    for maximum homogeneity"), so that all splits are compared by prefix sums, all sets at once.
    The squares within the clusters are least where those between them are largest.

    Args:
        sets: Numbers; sets are independent.
        importance: Weight of each number, positive.

    Returns:
        Mean of the smaller and of the larger numbers in float32, the same where all are alike. The
        clusters meet in the middle between them.
    """
    rows = max(1, SETS_CHUNK // sets.shape[1])
    parts = [
        _split(values, weights)
        for values, weights in zip(sets.split(rows), importance.split(rows), strict=True)
    ]
    left, right = (torch.cat(means).float() for means in zip(*parts, strict=True))
    return left, right


def _split(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means on both sides of the best split, float64."""
    values, order = values.sort(dim=1)
    weights = weights.gather(1, order).double()
    left_weight = weights.cumsum(dim=1)
    left_sum = weights.mul_(values).cumsum_(dim=1)
    right_weight = left_weight[:, -1:] - left_weight
    right_sum = left_sum[:, -1:] - left_sum
    # The last candidate has an empty right side, and is all that there is for equal numbers.
    right_weight[:, -1], right_sum[:, -1] = left_weight[:, -1], left_sum[:, -1]
    between = left_sum.square().div_(left_weight).add_(right_sum.square().div_(right_weight))
    between[:, -1] /= 2
    between[:, :-1].masked_fill_(values[:, :-1] == values[:, 1:], -torch.inf)
    best = between.argmax(dim=1, keepdim=True)
    left, right = (
        sums.gather(1, best).div_(weight.gather(1, best))[:, 0]
        for sums, weight in ((left_sum, left_weight), (right_sum, right_weight))
    )
    return left, right
