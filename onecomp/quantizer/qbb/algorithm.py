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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from onecomp.linalg import HessianFactor, quadratic_form
from onecomp.quantizer.binary_levels import in_float16

COLUMN_BLOCK = 128
"""Columns after which all later ones are brought up to date in one product."""
PANEL_COLUMNS = 16
"""Columns after which those of the column block are."""
RIDGE = 1e-6
"""Of the mean diagonal: keeps the equations of the scales solvable where bases are equal."""
ENOUGH = 3e-3
"""The search ends when a round lowers the error by less than this part of it."""
START_FITS = 5
"""Rounds of fitting the scales before a Hessian is looked at."""
SHRINKS = 16
"""Ranges that an evenly spaced start is tried with."""


@dataclass(frozen=True)
class Levels:
    """The sums of signed scales that a weight of a group of a row can take."""

    alpha: Float[Tensor, "groups bases out"]
    """Not negative."""

    @property
    def num_bases(self) -> int:
        """Sign matrices."""
        return self.alpha.shape[1]

    @cached_property
    def _ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rising levels and their codes, ``(groups, out, levels)``, and the middles between."""
        codes = torch.arange(2**self.num_bases, device=self.alpha.device)
        signs = torch.stack([_sign_of(codes, base) for base in range(self.num_bases)])
        levels, order = torch.einsum("bl,gbo->gol", signs, self.alpha).sort(dim=2, stable=True)
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        return levels.contiguous(), order.to(torch.uint8), middles.contiguous()

    def nearest(
        self, group: int, columns: Float[Tensor, "_ out"]
    ) -> tuple[Float[Tensor, "_ out"], UInt8[Tensor, "_ out"]]:
        """Nearest level of each weight of some columns of a group, and its code."""
        levels, codes, middles = (part[group] for part in self._ordered)
        place = torch.searchsorted(middles, columns.T.contiguous())
        return levels.gather(1, place).T, codes.gather(1, place).T

    def rounded(self, columns: Float[Tensor, "in out"]) -> "Bases":
        """Every weight on its own takes the nearest level."""
        by_group = columns.chunk(len(self.alpha))
        codes = [self.nearest(group, part)[1] for group, part in enumerate(by_group)]
        return Bases(torch.cat(codes).contiguous(), self)


@dataclass(frozen=True)
class Bases:
    """Signs of all bases, and the scales they are multiplied by."""

    codes: UInt8[Tensor, "in out"]
    """Bit i is 1 where base i is +1."""
    levels: Levels

    def signs(self, base: int) -> Float[Tensor, "in out"]:
        """One sign matrix, transposed."""
        return _sign_of(self.codes, base)

    def columns(self) -> Float[Tensor, "in out"]:
        """The transposed weight."""
        return self.sums(self.levels.alpha)

    def sums(self, alpha: Float[Tensor, "groups bases out"]) -> Float[Tensor, "in out"]:
        """The transposed weight that these signs make with other scales."""
        total = alpha.new_zeros(self.codes.shape)
        by_group = total.view(len(alpha), -1, total.shape[1])
        for base in range(alpha.shape[1]):
            by_group.addcmul_(self.signs(base).view_as(by_group), alpha[:, base, None])
        return total

    def errors(
        self, columns: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"]
    ) -> Float[Tensor, "out"]:
        """Output error of every row."""
        return quadratic_form(columns - self.columns(), hessian)

    def replace_rows(self, rows: Bool[Tensor, "out"], other: "Bases") -> "Bases":
        """``other`` where ``rows`` is true."""
        alpha = torch.where(rows, other.levels.alpha, self.levels.alpha)
        return Bases(torch.where(rows, other.codes, self.codes), Levels(alpha))


def _sign_of(codes: Tensor, base: int) -> Float[Tensor, "*shape"]:
    return ((codes >> base) & 1).float().mul_(2).sub_(1)


# Starts


def greedy_levels(
    columns: Float[Tensor, "in out"],
    importance: Float[Tensor, "in"],
    *,
    num_bases: int,
    num_groups: int,
) -> Levels:
    """Each base takes the signs of what those before it leave, and their mean magnitude as scale.

    Args:
        columns: Transposed weight.
        importance: Weight of each column in the mean.
        num_bases: Sign matrices.
        num_groups: Groups of neighbouring columns with scales of their own.
    """
    shares = importance.view(num_groups, -1, 1)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(shares.dtype).tiny)
    rest = columns.reshape(num_groups, -1, columns.shape[1]).abs()
    alpha = []
    for _ in range(num_bases):
        alpha.append((rest * shares).sum(dim=1))
        rest = (rest - alpha[-1][:, None]).abs_()
    return Levels(in_float16(torch.stack(alpha, dim=1)))


def even_levels(
    columns: Float[Tensor, "in out"], *, num_bases: int, num_groups: int, shrink: float = 1.0
) -> Levels:
    """Evenly spaced levels from minus to plus the largest magnitude, or a part of it.

    The scales are powers of two times half a step: plain rounding at these bits, with as many
    levels below zero as above. A single base takes the mean magnitude instead of the largest.
    """
    magnitudes = columns.reshape(num_groups, -1, columns.shape[1]).abs()
    reach = magnitudes.amax(dim=1) if num_bases > 1 else magnitudes.mean(dim=1)
    powers = 2.0 ** torch.arange(num_bases - 1, -1, -1, device=columns.device)
    step = reach * (shrink / (2**num_bases - 1))
    return Levels(in_float16(powers[:, None] * step[:, None, :]))


def start_levels(
    columns: Float[Tensor, "in out"],
    importance: Float[Tensor, "in"],
    *,
    num_bases: int,
    num_groups: int,
) -> Levels:
    """Levels of least squared error without compensation, weighted by column.

    The best of the greedy and of evenly spaced ones, then fitted.
    """
    counts = {"num_bases": num_bases, "num_groups": num_groups}
    shrinks = torch.linspace(1, 1 / SHRINKS, SHRINKS).tolist() if num_bases > 1 else [1.0]
    best = greedy_levels(columns, importance, **counts)
    least = _weighted_errors(columns, best.rounded(columns), importance, num_groups)
    for shrink in shrinks:
        levels = even_levels(columns, **counts, shrink=shrink)
        errors = _weighted_errors(columns, levels.rounded(columns), importance, num_groups)
        better = (errors < least)[:, None]
        best = Levels(torch.where(better, levels.alpha, best.alpha))
        least = torch.minimum(least, errors)
    return fitted_levels(columns, best, importance)


def fitted_levels(
    columns: Float[Tensor, "in out"], levels: Levels, importance: Float[Tensor, "in"]
) -> Levels:
    """Scales fitted in turns with the choice of the nearest level, errors weighted by column.

    Lloyd's algorithm for levels that are sums.
    """
    for _ in range(START_FITS):
        levels = refitted(columns, levels.rounded(columns), importance).levels
    return levels


def _weighted_errors(
    columns: Tensor, bases: Bases, importance: Tensor, num_groups: int
) -> Float[Tensor, "groups out"]:
    squares = (columns - bases.columns()).square_().mul_(importance[:, None])
    return squares.view(num_groups, -1, columns.shape[1]).sum(dim=1)


# Moves


def compensated(columns: Float[Tensor, "in out"], levels: Levels, factor: HessianFactor) -> Bases:
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
        values = bases.columns()
        live = hessian @ (columns - values)
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


def refitted(
    columns: Float[Tensor, "in out"],
    bases: Bases,
    hessian: Float[Tensor, "in in"] | Float[Tensor, "in"],
) -> Bases:
    """The scales of least output error for the signs as they are, in numbers that float16 holds.

    Least squares under the Hessian, group after group. Rows keep their scales where rounding them
    costs more than the fit gains. Where a scale comes out negative its signs are turned instead.

    Args:
        columns: Transposed weight.
        bases: Signs and scales so far.
        hessian: Symmetric and positive semi-definite; its diagonal where it has nothing else.

    Raises:
        QuantizationError: A scale above 65504, float16's largest number.
    """
    alpha, size = bases.levels.alpha.clone(), len(columns) // len(bases.levels.alpha)
    rest, everywhere = columns - bases.columns(), slice(0, len(columns))
    for group in range(len(alpha)):
        part = slice(group * size, (group + 1) * size)
        gradient = _product(hessian, part, everywhere, rest)
        signs = [_sign_of(bases.codes[part], base) for base in range(alpha.shape[1])]
        products = [_product(hessian, part, part, one) for one in signs]
        step = _best_step(alpha[group], signs, products, gradient)
        alpha[group] += step
        for base, one in enumerate(signs):
            rest[part].addcmul_(one, step[base], value=-1)
    return _with_positive(bases, alpha)


def _product(
    hessian: Tensor, rows: slice, columns: slice, values: Float[Tensor, "_ out"]
) -> Float[Tensor, "_ out"]:
    """``hessian[rows, columns] @ values`` of a matrix, or of a diagonal given as a vector."""
    if hessian.ndim == 1:
        return hessian[rows, None] * values[rows.start - columns.start :][: rows.stop - rows.start]
    return hessian[rows, columns] @ values


def _best_step(
    alpha: Float[Tensor, "bases out"],
    signs: Sequence[Tensor],
    products: Sequence[Tensor],
    gradient: Float[Tensor, "_ out"],
) -> Float[Tensor, "bases out"]:
    """By how much the scales of a group change; nothing where that would not lower the error.

    Args:
        alpha: Scales so far.
        signs: Sign matrices of the group.
        products: The group's part of the Hessian times each of them.
        gradient: The group's part of ``H d``.
    """
    num_bases, num_rows = alpha.shape
    matrix = alpha.new_empty(num_rows, num_bases, num_bases, dtype=torch.float64)
    for i, product in enumerate(products):
        for j in range(i, num_bases):
            matrix[:, i, j] = matrix[:, j, i] = (product * signs[j]).sum(dim=0)
    right = torch.stack([(one * gradient).sum(dim=0) for one in signs], dim=1).double()
    ridge = matrix.diagonal(dim1=1, dim2=2).mean(dim=1).mul(RIDGE)
    ridge = ridge.add_(torch.finfo(torch.float64).tiny)[:, None].expand(-1, num_bases)
    wish = alpha.T + torch.linalg.solve(matrix + torch.diag_embed(ridge), right)
    step = in_float16(wish.float()).double() - alpha.T
    gain = 2 * (step * right).sum(dim=1) - torch.einsum("ri,rij,rj->r", step, matrix, step)
    return torch.where((gain > 0)[:, None], step, 0.0).T.float()


def _with_positive(bases: Bases, alpha: Float[Tensor, "groups bases out"]) -> Bases:
    negative = (alpha < 0).to(torch.uint8)
    bits = torch.arange(alpha.shape[1], device=alpha.device, dtype=torch.uint8)
    turn = (negative << bits[:, None]).sum(dim=1, dtype=torch.uint8)
    turn = turn.repeat_interleave(len(bases.codes) // len(alpha), dim=0)
    return Bases(bases.codes ^ turn, Levels(alpha.abs()))


def with_one_more(
    columns: Float[Tensor, "in out"], bases: Bases, importance: Float[Tensor, "in"]
) -> Bases:
    """The same and a base of the signs that are left, with their mean magnitude as scale."""
    alpha, rest = bases.levels.alpha, columns - bases.columns()
    added = greedy_levels(rest, importance, num_bases=1, num_groups=len(alpha)).alpha
    bit = (rest >= 0).to(torch.uint8) << bases.levels.num_bases
    return Bases(bases.codes | bit, Levels(in_float16(torch.cat([alpha, added], dim=1))))


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
