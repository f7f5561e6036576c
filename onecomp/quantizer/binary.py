"""One bit a weight: two levels in each group of columns of a row, and a sign that chooses.

What methods of one bit share. The objective is the row's output error ``d H dᵀ`` with
``d = w - ŵ``, as in BiLLM (Huang et al., 2024, arXiv:2402.04291) and ARB-LLM (Li et al., 2024,
arXiv:2410.03129), which round column by column and fit the levels in turns. Here those are two of
three moves: ``compensated`` chooses signs column by column and lets the columns to come make up
for each error, ``refitted`` solves for the levels exactly, and ``turned`` turns single signs
wherever that lowers the error. ``descend`` takes the last two in turns.

Weights are transposed (``in out``): one input column of all rows is contiguous in memory, which is
what each step reads. Rows never touch each other. A scale of each column, ``ŵ = a sᵀ diag(b)``, is
the same problem for ``columns / b[:, None]`` under ``b[:, None] * hessian * b``.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import HessianFactor
from onecomp.quantizer.binary_levels import Binary as Binary
from onecomp.quantizer.binary_levels import Levels as Levels
from onecomp.quantizer.binary_levels import Storable as Storable
from onecomp.quantizer.binary_levels import best_rows as best_rows
from onecomp.quantizer.binary_levels import by_group
from onecomp.quantizer.binary_levels import in_float16 as in_float16
from onecomp.quantizer.binary_levels import sign_mean as sign_mean
from onecomp.quantizer.gptq.algorithm import GridRule, gptq_quantize
from onecomp.quantizer.grid import SMALLEST_SCALE, Grid

COLUMN_BLOCK = 128
"""Columns after which the gradient of all later columns is brought up to date in one product."""
PANEL_COLUMNS = 16
"""Columns after which that of the column block is."""
STILL = 1e-3
"""Share of signs that turn in a round, below which more rounds are not worth their time."""
RIDGE = 1e-6
"""Of the diagonal, above float32's last bits: keeps the equations of levels solvable where all
signs of a group agree."""


def compensated(columns: Float[Tensor, "in out"], levels: Levels, factor: HessianFactor) -> Binary:
    """Signs chosen column by column, the columns to come making up for each error.

    GPTQ's solver (Frantar et al., 2023, arXiv:2210.17323, algorithm 1) on a grid of two values, in
    the order of ``factor``; groups are those of the layer's own column order.
    """
    grid = Grid((2 * levels.half).clamp_(min=SMALLEST_SCALE), torch.zeros_like(levels.half), 1)
    rule = GridRule(wbits=1, groupsize=len(columns) // len(levels.half), sym=False, static=True)
    above = by_group(columns, len(levels.half)) - levels.ends()[0][:, None]
    solution = gptq_quantize(above.flatten(0, 1).T, factor, rule, grid=grid)
    return Binary(solution.codes.mul_(2).sub_(1), levels)


def refitted(
    columns: Float[Tensor, "in out"],
    binary: Binary,
    hessian: Float[Tensor, "in in"],
    *,
    storable: Storable = Levels.in_float16,
    fit_centre: bool = True,
    tied: bool = False,
    product: Float[Tensor, "in out"] | None = None,
) -> Binary:
    """The levels of least output error for the signs as they are.

    Least squares under the Hessian, all groups of a row together: two unknowns a group. Rows keep
    their levels where rounding to storable numbers costs more than the fit gains. Where the fit
    finds ``half`` negative, the group's signs are turned instead.

    Args:
        columns: Transposed weight.
        binary: Signs and levels so far.
        hessian: Symmetric and positive semi-definite.
        storable: Rounds levels to numbers that can be stored.
        fit_centre: Fit centres, too; otherwise they are zero and stay so.
        tied: All rows have the same levels, and share the fit.
        product: ``hessian @ columns`` where it is known.
    """
    num_groups, num_rows = binary.levels.half.shape
    product = hessian @ columns if product is None else product
    matrix, right = _normal_equations(product, binary.signs, hessian, num_groups)
    if tied:
        matrix, right = matrix.sum(dim=0, keepdim=True), right.sum(dim=0, keepdim=True)
    first = 0 if fit_centre else num_groups
    matrix.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(torch.float64).tiny)
    fitted = torch.linalg.solve(matrix[:, first:, first:], right[:, first:]).float().T
    half = fitted[-num_groups:].expand(-1, num_rows)
    centre = fitted[:num_groups].expand(-1, num_rows) if fit_centre else torch.zeros_like(half)
    turn = torch.where(half < 0, -1.0, 1.0)
    levels = storable(Levels(centre.contiguous(), half * turn))
    found = Levels(levels.centre, levels.half * turn)
    better = _value(matrix, right, found) < _value(matrix, right, binary.levels)
    signs = by_group(binary.signs, num_groups) * torch.where(better, turn, 1.0)[:, None]
    return Binary(signs.flatten(0, 1), binary.levels.replace_rows(better, levels))


def _normal_equations(
    hessian_columns: Tensor, signs: Tensor, hessian: Tensor, num_groups: int
) -> tuple[Float[Tensor, "out unknowns unknowns"], Float[Tensor, "out unknowns"]]:
    """``X H Xᵀ`` and ``X H w`` of every row in float64; X is ones, then signs, of each group."""
    num_columns, num_rows = signs.shape
    size = num_columns // num_groups

    def sums(values: Tensor) -> Tensor:
        return values.reshape(num_groups, size, num_rows).sum(dim=1).T.double()

    matrix = signs.new_empty(num_rows, 2 * num_groups, 2 * num_groups, dtype=torch.float64)
    right = torch.cat([sums(hessian_columns), sums(hessian_columns * signs)], dim=1)
    blocks = hessian.reshape(num_groups, size, num_groups, size)
    matrix[:, :num_groups, :num_groups] = blocks.sum(dim=(1, 3)).double()
    for group in range(num_groups):
        part = slice(group * size, (group + 1) * size)
        product = hessian[:, part] @ signs[part]
        matrix[:, :num_groups, num_groups + group] = sums(product)
        matrix[:, num_groups + group, :num_groups] = matrix[:, :num_groups, num_groups + group]
        matrix[:, num_groups:, num_groups + group] = sums(product.mul_(signs))
    return matrix, right


def _value(matrix: Tensor, right: Tensor, levels: Levels) -> Float[Tensor, "out"]:
    """Output error of every row, less what does not depend on the levels; or one for all rows."""
    x = torch.cat([levels.centre, levels.half]).T.double()[: len(matrix)]
    return torch.einsum("ri,rij,rj->r", x, matrix, x) - 2 * (x * right).sum(dim=1)


def turned(
    columns: Float[Tensor, "in out"], binary: Binary, hessian: Float[Tensor, "in in"]
) -> tuple[Binary, int]:
    """Go through the columns once and turn each sign for which that lowers its row's output error.

    Coordinate descent: every decision sees those before it.

    Returns:
        The new signs with the same levels, and how many were turned.
    """
    return turned_along(hessian @ binary.columns().neg_().add_(columns), binary, hessian)


def turned_along(
    gradient: Float[Tensor, "in out"], binary: Binary, hessian: Float[Tensor, "in in"]
) -> tuple[Binary, int]:
    """As :func:`turned`, from ``hessian @ (columns - binary.columns())``, which is used up."""
    sweep = _Sweep(gradient, binary, hessian)
    with torch.inference_mode():  # many calls of little work, as in GPTQ's solver
        for start in range(0, len(gradient), COLUMN_BLOCK):
            sweep.turn_block(start, min(start + COLUMN_BLOCK, len(gradient)))
    return Binary(sweep.signs, binary.levels), int((sweep.signs != binary.signs).sum())


class _Sweep:
    """The signs so far, and ``H d`` for all columns still to come."""

    def __init__(self, gradient: Tensor, binary: Binary, hessian: Tensor):
        self._gradient = gradient
        self.signs = binary.signs.clone()
        self._hessian = hessian
        self._diagonal = hessian.diagonal().tolist()
        self._half = binary.levels.half.unbind()
        self._groupsize = len(gradient) // len(self._half)
        self._changes = torch.empty_like(gradient[:COLUMN_BLOCK])
        """By how much the columns of the block at hand changed."""

    def turn_block(self, start: int, end: int) -> None:
        for first in range(start, end, PANEL_COLUMNS):
            last = min(first + PANEL_COLUMNS, end)
            changes = self._changes[first - start : last - start].zero_()
            for column in range(first, last):
                if column > first:
                    effect = self._hessian[first:last, column]
                    self._gradient[column].addmv_(changes.T, effect, alpha=-1)
                self._turn(column, changes[column - first])
            effects = self._hessian[last:end, first:last]
            self._gradient[last:end].addmm_(effects, changes, alpha=-1)
        effects, changes = self._hessian[end:, start:end], self._changes[: end - start]
        self._gradient[end:].addmm_(effects, changes, alpha=-1)

    def _turn(self, column: int, change: Tensor) -> None:
        signs, half = self.signs[column], self._half[column // self._groupsize]
        # A turn changes the error by 4 half (sign * gradient + half * diagonal).
        torch.mul(signs, half, out=change)
        gain = torch.add(self._gradient[column], change, alpha=self._diagonal[column])
        worth = gain.mul_(signs) < 0
        change.mul_(worth).mul_(-2)
        signs.mul_(torch.where(worth, -1.0, 1.0))


def descend(
    columns: Float[Tensor, "in out"],
    start: Binary,
    hessian: Float[Tensor, "in in"],
    *,
    num_rounds: int,
    storable: Storable = Levels.in_float16,
    fit_centre: bool = True,
    tied: bool = False,
) -> Binary:
    """Turn signs and refit levels in turns, until almost no sign turns or the rounds are used up.

    No move raises the output error of a row; with ``tied``, of all rows together.
    """
    refit = partial(refitted, storable=storable, fit_centre=fit_centre, tied=tied)
    binary, product = start, hessian @ columns
    for _ in range(num_rounds):
        binary, num_turned = turned(columns, binary, hessian)
        binary = refit(columns, binary, hessian, product=product)
        if num_turned <= STILL * columns.numel():
            break
    return binary
