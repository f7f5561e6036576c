"""OneBit: a weight as a matrix of signs between a scale per row and a scale per column.

``Ŵ = diag(row_scale) S diag(column_scale)``, Xu et al., 2024, "OneBit: Towards Extremely Low-bit
Large Language Models" (arXiv:2402.11295). The paper takes ``S = sign(W)`` and the scales from the
leading singular pair of ``|W|`` (section 3.3), and trains from there. Here that is the start of a
search for the least output error ``tr((W - Ŵ) H (W - Ŵ)ᵀ)``: signs are chosen anew with
compensation, then scales are fitted by least squares and single signs turned, in turns.

Signs and weights are transposed (``in out``), as in ``binary``, which the search for signs is in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onecomp.linalg import HessianFactor, quadratic_form
from onecomp.quantizer.binary import compensated, turned_along
from onecomp.quantizer.binary_levels import Binary, Levels, in_float16
from onecomp.quantizer.pieces import step_cuts

POWER_STEPS = 50
"""Of the power iteration, which starts from ones: a matrix of magnitudes is close to rank one."""
SMALLEST_SHARE = 1e-6
"""Of the mean: a column's importance and scale are never less, so that dividing by them is safe."""
SMALLEST_SUM = 1e-30
"""Of a row or column while balancing."""
RIDGE = 1e-3
"""Of each diagonal entry, in the equations of the column scales."""
ENOUGH = 2e-3
"""The search ends when a round lowers the error by less than this part of it."""


@dataclass(frozen=True)
class OneBit:
    """Signs and scales of a weight."""

    row_scale: Float[Tensor, "out"]
    column_scale: Float[Tensor, "in"]
    """Positive."""
    signs: Float[Tensor, "in out"]
    """+1 and -1."""

    @staticmethod
    def of(binary: Binary) -> "OneBit":
        """A group for each row and levels around zero as they are, column scales of one."""
        scales = binary.signs.new_ones(len(binary.signs))
        return OneBit(binary.levels.half[0], scales, binary.signs)

    def columns(self) -> Float[Tensor, "in out"]:
        """The transposed weight."""
        return (self.signs * self.column_scale[:, None]).mul_(self.row_scale)

    def rows(self, start: int, stop: int) -> "OneBit":
        """A view of some rows."""
        return OneBit(self.row_scale[start:stop], self.column_scale, self.signs[:, start:stop])

    def errors(
        self, columns: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"]
    ) -> Float[Tensor, "out"]:
        """Output error of every row."""
        each = [quadratic_form(_rest(part, own), hessian) for part, own in _in_steps(columns, self)]
        return torch.cat(each)

    def error(
        self, columns: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"]
    ) -> Float[Tensor, ""]:
        """Output error of all rows together."""
        return self.errors(columns, hessian).sum()


def _in_steps(columns: Tensor, found: OneBit) -> Iterator[tuple[Tensor, OneBit]]:
    """Some rows at a time, so that temporaries are small beside the Hessian."""
    for start, stop in step_cuts(columns.shape[1], len(columns)):
        yield columns[:, start:stop], found.rows(start, stop)


def _rest(columns: Tensor, found: OneBit) -> Float[Tensor, "in out"]:
    """What the signs and scales leave of the weight, in memory of its own."""
    return found.columns().neg_().add_(columns)


@dataclass(frozen=True)
class ScaleStart:
    """How the first scales are found: from ``|W|`` after its columns, and rows, are weighed."""

    use_importance_scaling: bool = True
    """Weigh columns by the root of the Hessian's diagonal."""
    use_balancing: bool = True
    """Bring rows and columns to equal sums first, so that no few of them decide."""
    balance_iters: int = 40
    balance_alpha: float = 1.0
    """Sum of a balanced row. Scales only what is undone later."""

    def scales(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, "in"]
    ) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
        """Row and column scales for the weight itself, all weighing undone on them."""
        magnitudes, row_weight = weight.abs(), weight.new_ones(len(weight))
        column_weight = torch.ones_like(importance)
        if self.use_importance_scaling:
            column_weight = importance.clamp(min=SMALLEST_SHARE * importance.mean()).sqrt()
            magnitudes.mul_(column_weight)
        if self.use_balancing:
            rows, columns = balancing(magnitudes, self.balance_iters, self.balance_alpha)
            magnitudes.mul_(rows[:, None]).mul_(columns)
            row_weight, column_weight = rows, column_weight * columns
        row_scale, column_scale = leading_pair(magnitudes)
        return row_scale / row_weight, column_scale / column_weight


def leading_pair(
    magnitudes: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
    """``row`` and ``column`` whose product is the best approximation of rank one; not negative.

    Deterministic: the leading pair of a matrix without negative entries has none, so a power
    iteration from ones finds it.
    """
    column = magnitudes.new_ones(magnitudes.shape[1])
    row = magnitudes.new_zeros(len(magnitudes))
    for _ in range(POWER_STEPS):
        row = magnitudes @ column
        row /= row.norm().clamp_(min=torch.finfo(row.dtype).tiny)
        column = magnitudes.T @ row
    return row, column


def balancing(
    magnitudes: Float[Tensor, "out in"], num_rounds: int, row_sum: float
) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
    """Factors of rows and columns after which rows have equal sums, and columns, too.

    Sinkhorn's algorithm. Rows and columns of zeros keep a factor that is finite; where there are
    many, sums that suit both do not exist, and factors would grow from round to round.

    Args:
        magnitudes: Not negative.
        num_rounds: Rounds of rows, then columns.
        row_sum: Sum of a row; that of a column follows.
    """
    out_features, in_features = magnitudes.shape
    column_sum = row_sum * out_features / in_features
    rows, columns = magnitudes.new_ones(out_features), magnitudes.new_ones(in_features)
    for _ in range(num_rounds):
        rows = row_sum / _positive(magnitudes @ columns)
        columns = column_sum / _positive(magnitudes.T @ rows)
        power = 2.0 ** ((rows.mean().log2() - columns.mean().log2()) / 2).round()  # exact
        rows, columns = rows / power, columns * power
    return rows, columns


def _positive(values: Float[Tensor, "_"]) -> Float[Tensor, "_"]:
    return values.clamp(min=(SMALLEST_SHARE * values.mean()).clamp_(min=SMALLEST_SUM))


def sign_start(weight: Float[Tensor, "out in"], scales: tuple[Tensor, Tensor]) -> OneBit:
    """The weight's own signs between scales; of the scales, columns' are about one."""
    row_scale, column_scale = scales
    mean = column_scale.mean().clamp(min=torch.finfo(column_scale.dtype).tiny)
    signs = torch.where(weight < 0, -1.0, 1.0).T.contiguous()
    least = torch.tensor(SMALLEST_SHARE, device=weight.device)
    return OneBit(row_scale * mean, (column_scale / mean).clamp_(min=least), signs)


def with_compensated_signs(
    columns: Float[Tensor, "in out"], start: OneBit, factor: HessianFactor
) -> OneBit:
    """Signs chosen column by column, the columns to come making up for each error.

    Dividing columns by their scales makes the rows ones of two levels; the factor is scaled alike.
    """
    scale = start.column_scale
    scaled = HessianFactor(
        factor.order, factor.upper / factor.permuted(scale[None]), factor.percdamp
    )
    signs = torch.empty_like(start.signs)
    for part, own in _in_steps(columns, replace(start, signs=signs)):
        own.signs.copy_(compensated(part / scale[:, None], _levels(own.row_scale), scaled).signs)
    return replace(start, signs=signs)


def with_turned_signs(
    columns: Float[Tensor, "in out"], found: OneBit, hessian: Float[Tensor, "in in"]
) -> OneBit:
    """Go through the columns once and turn every sign for which that lowers the error."""
    scale = found.column_scale
    gradient = (hessian @ _rest(columns, found)).mul_(scale[:, None])
    scaled = (scale[:, None] * hessian).mul_(scale)
    binary = Binary(found.signs, _levels(found.row_scale))
    return replace(found, signs=turned_along(gradient, binary, scaled)[0].signs)


def _levels(row_scale: Float[Tensor, "out"]) -> Levels:
    return Levels(torch.zeros_like(row_scale)[None], row_scale[None])


def with_fitted_rows(
    columns: Float[Tensor, "in out"], found: OneBit, hessian: Float[Tensor, "in in"]
) -> OneBit:
    """Row scales of least error for signs and column scales as they are: one division a row."""
    fitted = torch.cat([_row_fit(*part, hessian) for part in _in_steps(columns, found)])
    signs = _turned_where(fitted < 0, found.signs)
    return replace(found, row_scale=fitted.abs_(), signs=signs)


def _row_fit(columns: Tensor, found: OneBit, hessian: Tensor) -> Float[Tensor, "out"]:
    signed = found.signs * found.column_scale[:, None]
    product = hessian @ signed
    energy = signed.mul_(product).sum(dim=0).clamp_(min=torch.finfo(product.dtype).tiny)
    return product.mul_(columns).sum(dim=0).div_(energy)


def _turned_where(negative: Bool[Tensor, "*line"], signs: Tensor) -> Float[Tensor, "in out"]:
    """The same tensor where nothing is negative, as is usual."""
    return torch.where(negative, -signs, signs) if negative.any() else signs


def with_fitted_columns(
    columns: Float[Tensor, "in out"], found: OneBit, hessian: Float[Tensor, "in in"]
) -> OneBit:
    """Column scales of least error for signs and row scales as they are.

    The equations are ``(H ∘ Sᵀ diag(row_scale²) S) x = diag(Sᵀ diag(row_scale) W H)``, solved for
    the step from the scales so far, with a small ridge. Unchanged where they have no solution.
    """
    matrix, right = torch.zeros_like(hessian), torch.zeros_like(found.column_scale)
    for part, own in _in_steps(columns, found):
        signed = own.signs * own.row_scale
        matrix.addmm_(signed, signed.T)
        right += (hessian @ _rest(part, own)).mul_(signed).sum(dim=1)
    diagonal = matrix.mul_(hessian).diagonal()
    unit = diagonal.clamp(min=SMALLEST_SHARE**2 * diagonal.mean()).rsqrt_()
    matrix.mul_(unit[:, None]).mul_(unit).diagonal().add_(RIDGE)
    lower, failed_minor = torch.linalg.cholesky_ex(matrix)
    if failed_minor:
        return found
    step = torch.cholesky_solve((unit * right)[:, None], lower)[:, 0] * unit
    scale = found.column_scale + step
    signs = _turned_where(scale[:, None] < 0, found.signs)
    magnitudes = scale.abs()
    least = SMALLEST_SHARE * magnitudes.mean()
    return replace(found, column_scale=magnitudes.clamp(min=least), signs=signs)


def in_storable_scales(
    columns: Float[Tensor, "in out"], found: OneBit, hessian: Float[Tensor, "in in"]
) -> OneBit:
    """Scales in numbers that float16 holds, rows fitted again to the rounded columns.

    Raises:
        QuantizationError: A scale above 65504.
    """
    mean = found.column_scale.mean()
    rounded = replace(found, column_scale=in_float16(found.column_scale / mean))
    fitted = with_fitted_rows(columns, rounded, hessian)
    return replace(fitted, row_scale=in_float16(fitted.row_scale))


def search(
    columns: Float[Tensor, "in out"],
    found: OneBit,
    hessian: Float[Tensor, "in in"],
    *,
    num_rounds: int,
) -> OneBit:
    """Fit the scales and turn signs in turns; ends when a round hardly lowers the error."""
    least = found.error(columns, hessian)
    for other in _rounds(columns, found, hessian, num_rounds):
        error = other.error(columns, hessian)
        if not error < (1 - ENOUGH) * least:
            return other if error < least else found
        found, least = other, error
    return found


def _rounds(columns: Tensor, found: OneBit, hessian: Tensor, num_rounds: int) -> Iterator[OneBit]:
    for _ in range(num_rounds):
        found = with_fitted_columns(columns, with_fitted_rows(columns, found, hessian), hessian)
        found = with_turned_signs(columns, found, hessian)
        yield with_fitted_rows(columns, found, hessian)
