"""QuIP's rounding: column by column with feedback, then greedily a few times over.

Chee et al., 2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees"
(arXiv:2307.13304). Inside this module weights are transposed (``in out``), as in GPTQ's: one input
column of all rows is contiguous in memory, which is what each step reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import HessianFactor

LEAF_COLUMNS = 16
"""Columns rounded one by one before those behind them are corrected in one product."""
NORMAL_STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
"""Step of the best uniform grid of ``2**wbits`` values for a normal variable, in its standard
deviations (Max, 1960, "Quantizing for minimum distortion"); rotated weights are close to normal."""
SMALLEST_SCALE = 2.0**-100
"""The scale of a row of zeros."""


@dataclass(frozen=True)
class Rounding:
    """A transposed weight ``scale * levels``."""

    levels: Float[Tensor, "in out"]
    """Odd multiples of one half, ``codes - maxq / 2``: the grid is symmetric and has no zero."""
    scale: Float[Tensor, "_"]
    """One, or one for every row of the weight."""
    wbits: int

    @property
    def largest(self) -> float:
        """Largest level, ``maxq / 2``."""
        return (2**self.wbits - 1) / 2

    def columns(self) -> Float[Tensor, "in out"]:
        """The weight, transposed."""
        return self.levels * self.scale


def normal_scale(
    columns: Float[Tensor, "in out"], *, wbits: int, row_scale: bool
) -> Float[Tensor, "_"]:
    """Step of the grid that suits normal weights of the same mean square.

    Args:
        columns: Transposed weight.
        wbits: Bits per weight, 1 to 8.
        row_scale: One for every row of the weight, or one for all.
    """
    squares = columns.square().mean(dim=0)
    deviation = squares.sqrt() if row_scale else squares.mean(dim=0, keepdim=True).sqrt()
    return (deviation * NORMAL_STEPS[wbits - 1]).clamp_(min=SMALLEST_SCALE)


def ldlq(
    columns: Float[Tensor, "in out"],
    factor: HessianFactor,
    scale: Float[Tensor, "_"],
    wbits: int,
) -> Rounding:
    """Round each column after the correction that the errors of those before it ask for.

    With feedback from the LDL decomposition of the Hessian no linear feedback does better
    (section 3, theorem 1). GPTQ finds the same (theorem 6), so the factor of the inverse serves.

    Args:
        columns: Transposed weight.
        factor: Factor of its damped Hessian, in the order of the columns.
        scale: One, or one for every row of the weight.
        wbits: Bits per weight, 1 to 8.
    """
    targets = columns / scale
    rounding = Rounding(torch.empty_like(targets), scale, wbits)
    levels, largest = rounding.levels, rounding.largest

    def round_column(i: int) -> None:
        torch.floor(targets[i], out=levels[i]).add_(0.5).clamp_(-largest, largest)
        targets[i] -= levels[i]

    _in_turn(targets, factor.unit_upper, round_column)
    return rounding


def greedy(
    columns: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
    rounding: Rounding,
    *,
    num_passes: int,
    percdamp: float,
) -> Rounding:
    """Set every level in turn to its best value while the others stay (the paper's greedy updates).

    Before each pass and after the last one the scales are set to their best for the levels. The
    output error under the damped Hessian never rises.

    Args:
        columns: Transposed weight.
        hessian: Its Hessian without damping; no zero on the diagonal.
        rounding: Where to start.
        num_passes: Passes over all columns.
        percdamp: Damping, a fraction of the mean diagonal.
    """
    damping = percdamp * hessian.diagonal().mean().item()
    diagonal = hessian.diagonal() + damping
    coupling, levels = hessian / diagonal, rounding.levels.clone()
    wanted = torch.addmm(columns, hessian, columns, beta=damping)
    scale = rounding.scale
    for _ in range(num_passes):
        given = torch.addmm(levels, hessian, levels, beta=damping)
        scale = _best_scale(levels, wanted, given, scale)
        targets = given.neg_().addcdiv_(wanted, scale).div_(diagonal[:, None]).add_(levels)
        _move_in_turn(levels, targets, coupling, rounding.largest)
        del given, targets  # the next pass makes its own
    given = torch.addmm(levels, hessian, levels, beta=damping)
    return replace(rounding, levels=levels, scale=_best_scale(levels, wanted, given, scale))


def _move_in_turn(levels: Tensor, targets: Tensor, coupling: Tensor, largest: float) -> None:
    """Move every level to the nearest of its target, in place; ``targets`` is used up."""

    def move_column(i: int) -> None:
        targets[i].floor_().add_(0.5).clamp_(-largest, largest).sub_(levels[i])
        levels[i] += targets[i]

    _in_turn(targets, coupling, move_column)


def _best_scale(levels: Tensor, wanted: Tensor, given: Tensor, scale: Tensor) -> Tensor:
    """Least squares; ``wanted`` and ``given`` are the Hessian times weight and levels.

    Where that is not above zero, ``scale`` stays.
    """
    agreement, energy = (levels * wanted).sum(dim=0), (levels * given).sum(dim=0)
    if len(scale) == 1:
        agreement, energy = agreement.sum(dim=0, keepdim=True), energy.sum(dim=0, keepdim=True)
    best = agreement / energy
    return torch.where(best > SMALLEST_SCALE, best, scale)


def _in_turn(targets: Tensor, coupling: Tensor, settle: Callable[[int], None]) -> None:
    """Settle column after column, each corrected by what those before it carry.

    ``settle(i)`` reads ``targets[i]``, corrected, and leaves there what the column carries: column
    ``j`` behind it is corrected by ``-coupling[i, j]`` times that. Columns are halved again and
    again, so that nearly all of the work is in products of matrices.
    """
    with torch.inference_mode():  # many calls of little work: bookkeeping for autograd would show
        _settle_range(targets, coupling, settle, 0, len(targets))


def _settle_range(
    targets: Tensor, coupling: Tensor, settle: Callable[[int], None], start: int, end: int
) -> None:
    if end - start > LEAF_COLUMNS:
        middle = (start + end) // 2
        _settle_range(targets, coupling, settle, start, middle)
        weights = coupling[start:middle, middle:end].T
        targets[middle:end].addmm_(weights, targets[start:middle], alpha=-1)
        _settle_range(targets, coupling, settle, middle, end)
        return
    for i in range(start, end):
        if i > start:
            targets[i].addmv_(targets[start:i].T, coupling[start:i, i], alpha=-1)
        settle(i)
