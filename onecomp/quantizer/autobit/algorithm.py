"""Which candidate each layer gets: an integer programme over whole numbers of bits.

There is a binary variable for every tied set ``s`` and candidate ``c``: minimize the sum of
``error[s, c] x[s, c]`` subject to one candidate a set and ``sum of bits[s, c] x[s, c] <= budget``.
It is a multiple-choice knapsack problem; HiGHS solves it through ``scipy.optimize.milp``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from onecomp.errors import ConfigError

ROUNDING = 1e-9
"""Part of a budget that it may be short of because its target is a rounded number."""
OPTIONS = {"mip_rel_gap": 1e-5, "node_limit": 200_000}
"""No limit in seconds: the same programme has the same solution on any machine."""
ATTEMPTS = 20


@dataclass(frozen=True)
class TiedSet:
    """Layers that get the same candidate, and what each candidate means for all of them."""

    layer_names: tuple[str, ...]
    num_weights: int
    bits: tuple[int | None, ...]
    """Stored with each candidate, scales included; None where it is not for these layers."""
    errors: tuple[float, ...]

    @property
    def allowed(self) -> list[int]:
        """Numbers of the candidates that are for these layers."""
        return [index for index, bits in enumerate(self.bits) if bits is not None]


def tie(layer_names: Iterable[str], fused_groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Sets of layers that inference engines join in one: equal parent, names of one fused group.

    >>> tie(["0.q", "0.k", "0.o", "1.q"], [["q", "k", "v"]])
    [('0.q', '0.k'), ('0.o',), ('1.q',)]
    """
    number = {name: index for index, group in enumerate(fused_groups) for name in group}
    sets: dict[tuple, list[str]] = {}
    for name in layer_names:
        parent, _, short = name.rpartition(".")
        key = (parent, number[short]) if short in number else (name,)
        sets.setdefault(key, []).append(name)
    return [tuple(names) for names in sets.values()]


def allocate(sets: Sequence[TiedSet], target_bits: float) -> list[int]:
    """The candidate of each set: least error, and no more than ``target_bits`` a weight on average.

    Args:
        sets: All layers, each in one set.
        target_bits: Largest average of stored bits a weight.

    Raises:
        ConfigError: Even the smallest candidates take more.
    """
    num_weights = sum(part.num_weights for part in sets)
    budget = math.floor(target_bits * num_weights * (1 + ROUNDING))
    least, most = reach(sets)
    if least > budget:
        raise ConfigError(
            "AutoBitQuantizer",
            [
                f"no assignment takes {target_bits:.4f} bits a weight, scales included: with these "
                f"candidates the average is from {least / num_weights:.4f} to "
                f"{most / num_weights:.4f}. Raise target_bit or give a smaller candidate."
            ],
        )
    return _solve(sets, budget)


def reach(sets: Sequence[TiedSet]) -> tuple[int, int]:
    """Least and most bits that all sets together can take."""
    bits = [[part.bits[index] or 0 for index in part.allowed] for part in sets]
    return sum(map(min, bits)), sum(map(max, bits))


def _solve(sets: Sequence[TiedSet], budget: int) -> list[int]:
    """The optimum within a budget that is not below the cheapest assignment's.

    HiGHS keeps to a constraint within a tolerance; sums are whole numbers, so the budget is lowered
    by what it was overdrawn by until it holds exactly.
    """
    limit = budget
    for _ in range(ATTEMPTS):
        chosen = _solve_once(sets, limit)
        taken = sum(part.bits[index] or 0 for part, index in zip(sets, chosen, strict=True))
        if taken <= budget:
            return chosen
        limit = max(limit - (taken - budget), reach(sets)[0])
    return _cheapest(sets)


def _solve_once(sets: Sequence[TiedSet], budget: int) -> list[int]:
    variables = [(row, index) for row, part in enumerate(sets) for index in part.allowed]
    rows = np.array([row for row, _ in variables])
    bits = np.array([sets[row].bits[index] for row, index in variables], dtype=float)
    errors = np.array([sets[row].errors[index] for row, index in variables])
    per_weight = 1 / sum(part.num_weights for part in sets)
    one_each = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    total = csr_array((bits * per_weight)[None, :])
    found = milp(
        errors / _scale(sets),
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(total, -np.inf, budget * per_weight),
        ],
        options=OPTIONS,
    )
    if found.x is None:
        return _cheapest(sets)
    by_set = groupby(zip(variables, found.x, strict=True), key=lambda pair: pair[0][0])
    return [max(options, key=lambda pair: pair[1])[0][1] for _, options in by_set]


def _scale(sets: Sequence[TiedSet]) -> float:
    """What errors are divided by, so that the solver's tolerances are small beside the optimum."""
    least = sum(min(part.errors[index] for index in part.allowed) for part in sets)
    most = max(part.errors[index] for part in sets for index in part.allowed)
    return least or most or 1.0


def _cheapest(sets: Sequence[TiedSet]) -> list[int]:
    return [min(part.allowed, key=lambda index, p=part: (p.bits[index], index)) for part in sets]
