"""QBB: a weight as a sum of sign matrices, each with a scale per row.

``Ŵ = Σ_i diag(alpha_i) B_i`` with ``B_i`` of +1 and -1: Bulat et al., 2024, "QBB: Quantization with
Binary Bases for LLMs" (NeurIPS 2024). The paper starts from the signs of what is left by the bases
before, and learns from there. Here the output error ``d H dᵀ`` of each row, ``d = w - ŵ``, is
lowered by a search whose every move is exact: given the scales, a weight takes the best of all
``2**bases`` sums of them, so that the signs of all bases turn together; given the signs, the scales
of a row are the solution of least squares.

Weights are transposed (``in out``): one input column of all rows is contiguous in memory, which is
what each step reads. Rows never touch each other.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.binary_levels import in_float16
from onecomp.quantizer.qbb.fit import refitted
from onecomp.quantizer.qbb.levels import Bases, BasisLevels
from onecomp.quantizer.qbb.starts import greedy_levels
from onecomp.quantizer.qbb.walk import moved

ENOUGH = 3e-3
"""The search ends when a round lowers the error by less than this part of it."""


def with_one_more(
    columns: Float[Tensor, "in out"], bases: Bases, importance: Float[Tensor, "in"]
) -> Bases:
    """The same and a base of the signs that are left, with their mean magnitude as scale."""
    alpha, rest = bases.levels.alpha, bases.rest(columns)
    added = greedy_levels(rest, importance, num_bases=1, num_groups=len(alpha)).alpha
    bit = (rest >= 0).to(torch.uint8) << bases.levels.num_bases
    return Bases(bases.codes | bit, BasisLevels(in_float16(torch.cat([alpha, added], dim=1))))


def descend(
    columns: Float[Tensor, "in out"],
    start: Bases,
    hessian: Float[Tensor, "in in"],
    *,
    num_rounds: int,
) -> Bases:
    """Move weights to their best levels and refit the scales in turns.

    No move raises the output error of a row. Ends when a round hardly lowers their sum.
    """
    bases = refitted(columns, start, hessian)
    error = bases.errors(columns, hessian).sum()
    for _ in range(num_rounds):
        bases = refitted(columns, moved(columns, bases, hessian), hessian)
        before, error = error, bases.errors(columns, hessian).sum()
        if not error < (1 - ENOUGH) * before:
            break
    return bases
