"""CQ: the best two clusters of numbers on a line, found exactly."""

import torch
from jaxtyping import Float
from torch import Tensor

SETS_CHUNK = 1 << 16
"""Numbers that are sorted at once, and bins of a larger set: bounds the temporaries."""


def two_clusters(
    sets: Float[Tensor, "sets size"], importance: Float[Tensor, "sets size"]
) -> tuple[Float[Tensor, "sets"], Float[Tensor, "sets"]]:
    """The split of every set with the least sum of weighted squared distances to the means.

    In one dimension the best clusters are neighbours in sorted order (Fisher, 1958, "On grouping
    for maximum homogeneity"), so that all splits are compared by prefix sums, all sets at once.
    The squares within the clusters are least where those between them are largest. Numbers of a
    large set that are all but the same (2**16 bins) are not told apart.

    Args:
        sets: Numbers; sets are independent.
        importance: Weight of each number, positive.

    Returns:
        Mean of the smaller and of the larger numbers in float32, the same where all are alike. The
        clusters meet in the middle between them.
    """
    is_large = sets.shape[1] > SETS_CHUNK
    rows = 1 if is_large else SETS_CHUNK // sets.shape[1]
    parts = [
        _split(*(_in_bins(values[0], weights[0]) if is_large else (values, weights)))
        for values, weights in zip(sets.split(rows), importance.split(rows), strict=True)
    ]
    left, right = (torch.cat(means).to(sets) for means in zip(*parts, strict=True))
    return left, right


def _in_bins(values: Float[Tensor, "size"], weights: Float[Tensor, "size"]) -> tuple[Tensor, ...]:
    """Means and weights of evenly spaced bins, as a set of its own; without empty ones.

    Summed up on the CPU, where the order is always the same.
    """
    low, high = (edge.double().item() for edge in values.aminmax())
    width = max((high - low) / SETS_CHUNK, torch.finfo(torch.float64).tiny)
    total = torch.zeros(SETS_CHUNK, dtype=torch.float64)
    moment = torch.zeros(SETS_CHUNK, dtype=torch.float64)
    for pair in zip(values.split(SETS_CHUNK), weights.split(SETS_CHUNK), strict=True):
        value, weight = (part.double().cpu() for part in pair)
        number = ((value - low) / width).long().clamp_(max=SETS_CHUNK - 1)
        total += torch.bincount(number, weight, SETS_CHUNK)
        moment += torch.bincount(number, weight * value, SETS_CHUNK)
    used = total > 0
    return (moment[used] / total[used])[None], total[used][None]


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
