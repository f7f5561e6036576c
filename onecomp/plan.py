"""Which worker does what: pure functions of shapes."""

from collections.abc import Sequence
from itertools import pairwise

from onecomp.models.layout import InputGroup


def assign_shards(num_shards: int, num_workers: int) -> list[range]:
    """Contiguous runs of shard numbers, one a worker: they hold the largest subtrees of the sum.

    >>> assign_shards(5, 2)
    [range(0, 2), range(2, 5)]
    """
    edges = [num_shards * i // num_workers for i in range(num_workers + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def quantization_cost(group: InputGroup) -> float:
    """Multiplications to factor a group's Hessian and solve its layers."""
    size = group.in_features
    return 2 / 3 * size**3 + sum(group.out_features) * size**2


def assign_owners(groups: Sequence[InputGroup], num_workers: int) -> list[int]:
    """Owner of each group: the most expensive first, to the worker with the least to do so far."""
    load = [0.0] * num_workers
    owners = [0] * len(groups)
    for position in sorted(range(len(groups)), key=lambda i: -quantization_cost(groups[i])):
        owner = load.index(min(load))
        owners[position] = owner
        load[owner] += quantization_cost(groups[position])
    return owners
