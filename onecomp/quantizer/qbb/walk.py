"""Weights chosen column by column, each in the light of those before it.

Weights are transposed (``in out``): one input column of all rows is contiguous in memory.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import HessianFactor
from onecomp.quantizer.pieces import step_cuts
from onecomp.quantizer.qbb.levels import Bases, BasisLevels

COLUMN_BLOCK = 128
"""Columns after which all later ones are brought up to date in one product."""
PANEL_COLUMNS = 16
"""Columns after which those of the column block are."""


def compensated(
    columns: Float[Tensor, "in out"], levels: BasisLevels, factor: HessianFactor
) -> Bases:
    """Nearest levels column by column, the columns to come making up for each error.

    Frantar et al., 2023 (arXiv:2210.17323), algorithm 1, on levels that are not a uniform grid.
    """
    with torch.inference_mode():  # many calls of little work, as in GPTQ's solver
        live = factor.permuted(columns.T).T.clone(memory_format=torch.contiguous_format)
        codes = torch.empty_like(live, dtype=torch.uint8)
        size = len(columns) // len(levels.alpha)
        places = torch.arange(len(columns)) if factor.order is None else factor.order
        groups = (places // size).tolist()

        def choose(column: int, weight: Tensor, error: Tensor) -> None:
            values, chosen = levels.nearest(groups[column], weight[None])
            codes[column] = chosen[0]
            torch.sub(weight, values[0], out=error)

        _walk(live, factor.unit_upper, choose)
    in_order = codes if factor.order is None else codes[factor.inverse_order]
    return Bases(in_order.clone(), levels)


def moved(columns: Float[Tensor, "in out"], bases: Bases, hessian: Float[Tensor, "in in"]) -> Bases:
    """Go through the columns once and give each weight the best level, all others held fixed.

    Coordinate descent: every decision sees those before it, none raises the error of its row.
    """
    levels, size = bases.levels, len(columns) // len(bases.levels.alpha)
    diagonal = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)
    with torch.inference_mode():
        values, live = bases.columns(), torch.empty_like(columns)
        for a, b in step_cuts(columns.shape[1], len(columns)):
            live[:, a:b] = hessian @ (columns[:, a:b] - values[:, a:b])
        live.div_(diagonal[:, None]).add_(values)  # what each weight would best be, alone
        codes = torch.empty_like(bases.codes)

        def choose(column: int, wish: Tensor, change: Tensor) -> None:
            best, chosen = levels.nearest(column // size, wish[None])
            codes[column] = chosen[0]
            torch.sub(best[0], values[column], out=change)

        _walk(live, hessian / diagonal, choose)
    return Bases(codes.clone(), levels)


def _walk(
    live: Float[Tensor, "in out"],
    coupling: Float[Tensor, "in in"],
    choose: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Let ``choose`` decide column by column, and each decision act on all columns behind it.

    Args:
        live: Columns as the decisions so far leave them; changed in place.
        coupling: By how much a step of the row's column moves the column's column, downwards.
        choose: Called with a column's number, its values and where to write its step.
    """
    steps = torch.zeros_like(live[:COLUMN_BLOCK])
    for start in range(0, len(live), COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, len(live))
        for first in range(start, end, PANEL_COLUMNS):
            last = min(first + PANEL_COLUMNS, end)
            taken = steps[first - start : last - start]
            for column in range(first, last):
                if column > first:
                    before, effect = taken[: column - first], coupling[first:column, column]
                    live[column].addmv_(before.T, effect, alpha=-1)
                choose(column, live[column], taken[column - first])
            live[last:end].addmm_(coupling[first:last, last:end].T, taken, alpha=-1)
        live[end:].addmm_(coupling[start:end, end:].T, steps[: end - start], alpha=-1)
