"""GPTQ: round column by column and let the columns still to come make up for each error.

Frantar et al., 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), algorithm 1. Inside this module weights are transposed
(``in out``): one input column of all rows is contiguous in memory, which is what each step reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onecomp.linalg import HessianFactor
from onecomp.quantizer.grid import Grid, GridSearch, fit_grid

PANEL_COLUMNS = 16
"""Columns updated one by one before the rest of a column block is updated in one product."""


@dataclass(frozen=True)
class GridRule:
    """How the grid of a group is found."""

    wbits: int
    groupsize: int
    """Columns that share a scale, a divisor of ``in``; never -1 here."""
    sym: bool
    search: GridSearch | None = None
    static: bool = False
    """Grids come from the original weights, groups are those of the layer's own column order."""


@dataclass(frozen=True)
class Solution:
    """Codes in the layer's own column order, and the grids they lie on."""

    codes: Float[Tensor, "in out"]
    """Whole numbers."""
    grid: Grid
    group_of_column: Tensor
    """Row of ``grid`` for each column, int64 ``(in,)``."""
    order: Tensor | None = None
    """Groups are runs of columns in this order; None for the layer's own."""

    def columns(self) -> Float[Tensor, "in out"]:
        """The dequantized weight, transposed."""
        centred = self.codes - self.grid.zero_point[self.group_of_column]
        return centred.mul_(self.grid.scale[self.group_of_column])

    def nearest(self, columns: Float[Tensor, "in out"]) -> "Solution":
        """The same grids with each weight of a transposed matrix rounded on its own."""
        codes = (columns / self.grid.scale[self.group_of_column]).round_()
        codes.add_(self.grid.zero_point[self.group_of_column])
        return replace(self, codes=codes.clamp_(0, self.grid.maxq))

    def replace_rows(self, rows: Bool[Tensor, "out"], other: "Solution") -> "Solution":
        """Codes of ``other``, which has the same grids, where ``rows`` is true."""
        return replace(self, codes=torch.where(rows, other.codes, self.codes))

    def split(self, sizes: list[int]) -> list["Solution"]:
        """Cut by rows."""
        parts = zip(
            self.codes.split(sizes, dim=1),
            self.grid.scale.split(sizes, dim=1),
            self.grid.zero_point.split(sizes, dim=1),
            strict=True,
        )
        return [
            replace(self, codes=codes, grid=Grid(scale, zero_point, self.grid.wbits))
            for codes, scale, zero_point in parts
        ]

    @staticmethod
    def join(parts: Iterable["Solution"]) -> "Solution":
        """The inverse of ``split``."""
        parts = list(parts)
        grid = Grid(
            torch.cat([p.grid.scale for p in parts], dim=1),
            torch.cat([p.grid.zero_point for p in parts], dim=1),
            parts[0].grid.wbits,
        )
        codes = torch.cat([p.codes for p in parts], dim=1)
        return replace(parts[0], codes=codes, grid=grid)


def fit_static_grid(
    weight: Float[Tensor, "out in"], rule: GridRule, importance: Float[Tensor, "in"] | None = None
) -> Grid:
    """Grids of groups in the layer's own column order, fitted to the weight as it is."""
    return fit_grid(
        weight.T.reshape(-1, rule.groupsize, len(weight)),
        wbits=rule.wbits,
        sym=rule.sym,
        search=rule.search,
        importance=None if importance is None else importance.reshape(-1, rule.groupsize),
    )


def nearest_solution(weight: Float[Tensor, "out in"], grid: Grid, groupsize: int) -> Solution:
    """Every weight rounded on its own (RTN)."""
    group_of_column = torch.arange(weight.shape[1], device=weight.device) // groupsize
    return Solution(torch.empty_like(weight.T), grid, group_of_column).nearest(weight.T)


def gptq_quantize(
    weight: Float[Tensor, "out in"],
    factor: HessianFactor,
    rule: GridRule,
    *,
    blocksize: int = 128,
    importance: Float[Tensor, "in"] | None = None,
    grid: Grid | None = None,
) -> Solution:
    """Codes that keep the layer's output close to what ``weight`` gives.

    Rows are independent of each other given the factor. Errors are spread within a column block
    at once and to the columns behind it when the block is done ("lazy batch updates", section 3.3).

    Args:
        weight: Rows of one or several layers with the same input, float32.
        factor: Factor of their damped Hessian; also fixes the order of the columns.
        rule: Grids.
        blocksize: Width of a column block.
        importance: Weight of each column in the grid search, in the layer's own order.
        grid: Grids to use instead of fitting any; ``rule`` must be static.

    Returns:
        Codes on the device of ``weight``.
    """
    grids, unit_upper = _Grids(weight, factor, rule, importance, grid), factor.unit_upper
    with torch.inference_mode():  # many calls of little work: bookkeeping for autograd would show
        codes = _solve(
            factor.permuted(weight).T.clone(memory_format=torch.contiguous_format),
            unit_upper,
            grids,
            blocksize,
        )
    codes = _unpermuted(codes, factor)
    codes = grids.grid.zero_point[grids.group_of_column].add_(codes)
    return Solution(codes, grids.grid, grids.group_of_column, None if rule.static else factor.order)


def _solve(live: Tensor, unit_upper: Tensor, grids: "_Grids", blocksize: int) -> Tensor:
    """Codes counted from the zero point, in the order of solving; ``live`` is used up."""
    codes, errors = torch.empty_like(live), torch.zeros_like(live[:blocksize])
    error_columns = errors.unbind()
    for start, end in column_blocks(len(live), blocksize, grids.live_groupsize):
        num_columns = end - start
        columns = zip(
            live[start:end].unbind(),
            codes[start:end].unbind(),
            error_columns[:num_columns],
            strict=True,
        )
        block = _Block(live[start:end], errors, unit_upper[start:end, start:end], list(columns))
        for group in grids.segments(start, end):
            grids.fit(start + group.start, live)
            block.solve(group, start, grids)
        live[end:].addmm_(unit_upper[start:end, end:].T, errors[:num_columns], alpha=-1)
    return codes


def column_blocks(
    num_columns: int, blocksize: int, live_groupsize: int | None
) -> Iterator[tuple[int, int]]:
    """Cut the columns so that a grid fitted to live weights sees every correction made so far.

    A group wider than a column block starts at a block's start; a narrower one lies within it.

    >>> list(column_blocks(10, 4, None))
    [(0, 4), (4, 8), (8, 10)]
    >>> list(column_blocks(12, 4, 6))
    [(0, 4), (4, 6), (6, 10), (10, 12)]
    >>> list(column_blocks(12, 8, 3))
    [(0, 6), (6, 12)]
    """
    stride = live_groupsize or num_columns
    if stride <= blocksize:
        stride = blocksize = blocksize // stride * stride
    for start in range(0, num_columns, stride):
        group_end = min(start + stride, num_columns)
        for block_start in range(start, group_end, blocksize):
            yield block_start, min(block_start + blocksize, group_end)


class _Grids:
    """Grids of all groups: fitted at once (static), or each when its first column is reached."""

    def __init__(
        self,
        weight: Tensor,
        factor: HessianFactor,
        rule: GridRule,
        importance: Tensor | None,
        grid: Grid | None,
    ):
        out_features, in_features = weight.shape
        self._rule = rule
        self._importance = importance
        if importance is not None and not rule.static:
            self._importance = factor.permuted(importance[None])[0]
        shape = (in_features // rule.groupsize, out_features)
        if rule.static:
            self.grid = fit_static_grid(weight, rule, importance) if grid is None else grid
        else:
            self.grid = Grid(weight.new_empty(shape), weight.new_empty(shape), rule.wbits)
        self.live_groupsize = None if rule.static else rule.groupsize
        columns = torch.arange(in_features, device=weight.device)
        position = columns if rule.static or factor.order is None else factor.inverse_order
        self.group_of_column = position // rule.groupsize
        self._group_of_position = factor.permuted(self.group_of_column[None])[0].tolist()
        self._ranges = {group: self._range(group) for group in range(shape[0]) if rule.static}

    def segments(self, start: int, end: int) -> Iterator[range]:
        """Ranges of a column block, relative to its start, that lie in one live group each."""
        step = min(self.live_groupsize or end - start, end - start)
        for first in range(0, end - start, step):
            yield range(first, min(first + step, end - start))

    def fit(self, position: int, live: Tensor) -> None:
        """Fit the group that begins at ``position`` to the weights as they are now."""
        size = self.live_groupsize
        if size is None or position % size:
            return
        importance = self._importance
        fitted = fit_grid(
            live[None, position : position + size],
            wbits=self._rule.wbits,
            sym=self._rule.sym,
            search=self._rule.search,
            importance=None if importance is None else importance[None, position : position + size],
        )
        group = position // size
        self.grid.scale[group], self.grid.zero_point[group] = fitted.scale[0], fitted.zero_point[0]
        self._ranges[group] = self._range(group)

    def _range(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, and the smallest and largest code counted from the zero point, of every row."""
        zero_point = self.grid.zero_point[group]
        return self.grid.scale[group], -zero_point, self.grid.maxq - zero_point

    def at(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """``_range`` of the column that is solved as the ``position``-th."""
        return self._ranges[self._group_of_position[position]]


@dataclass(frozen=True)
class _Block:
    """A column block: its weights and errors, and its part of the unit factor."""

    live: Float[Tensor, "block out"]
    errors: Tensor
    """As wide as the widest block."""
    upper: Float[Tensor, "block block"]
    columns: list[tuple[Tensor, Tensor, Tensor]]
    """Weight, code and error of each column, taken apart once: on small layers the time goes to
    calls, not to arithmetic."""

    def solve(self, columns: range, first: int, grids: _Grids) -> None:
        """Quantize ``columns`` and correct all columns of the block behind them.

        Args:
            columns: Positions in the block.
            first: Position of the block's first column in the order of solving.
            grids: Where each column's grid is.
        """
        for start in range(columns.start, columns.stop, PANEL_COLUMNS):
            end = min(start + PANEL_COLUMNS, columns.stop)
            errors = self.errors[start:end]
            # Zero for the columns not yet solved: what their errors hold from before has no effect.
            weights_of_errors = self.upper[start:end, start:end].unbind(dim=1)
            for column in range(start, end):
                if column > start:
                    correction = weights_of_errors[column - start]
                    self.columns[column][0].addmv_(errors.T, correction, alpha=-1)
                self._round(column, grids.at(first + column))
            self.live[end:].addmm_(self.upper[start:end, end:].T, errors, alpha=-1)

    def _round(self, column: int, grid: tuple[Tensor, Tensor, Tensor]) -> None:
        weight, code, error = self.columns[column]
        scale, smallest, largest = grid
        torch.div(weight, scale, out=code)
        code.round_().clamp_(smallest, largest)
        torch.addcmul(weight, code, scale, value=-1, out=error)


def _unpermuted(codes: Tensor, factor: HessianFactor) -> Tensor:
    return codes if factor.order is None else codes[factor.inverse_order]
