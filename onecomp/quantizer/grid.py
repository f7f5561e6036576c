"""Uniform grids: the scale and zero point that a group of columns shares.

Weights are laid out column by column (``columns out``): a column of the layer's weight matrix is
contiguous, as the solver walks through columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onecomp.errors import QuantizationError

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16; a group of zeros, or of weights too small for float16, gets it."""
LARGEST_SCALE = 65504.0
SMALLEST_SQUARE = 2.0**-40
"""Added to squared errors in units of the scale, since the logarithm of zero is slow."""
SEARCH_CHUNK = 1 << 17
"""Weights times candidates tried at once: with their temporaries they stay in a cache."""
SEARCH_COST = 14_000
"""Multiplications of a product that take as long as the search for one weight, on a CPU."""


@dataclass(frozen=True)
class Grid:
    """Values ``scale * (code - zero_point)``, code 0..2**wbits - 1, one grid per group and row.

    Scales are exactly representable in float16, so that what is computed with is what is stored.
    """

    scale: Float[Tensor, "groups out"]
    """Not zero. Negative where a symmetric grid reaches further on the positive side."""
    zero_point: Float[Tensor, "groups out"]
    """Whole numbers 0..2**wbits - 1."""
    wbits: int

    @property
    def maxq(self) -> int:
        """Largest code."""
        return 2**self.wbits - 1


@dataclass(frozen=True)
class GridSearch:
    """Shrink the range of a grid where clipping its extremes lowers the error of the rest.

    Candidates are ``range * (1 - i / steps)`` for ``i < 0.8 * steps``, compared by the sum of
    ``|error| ** norm`` over the group (Frantar et al., 2023, the authors' code). Of the candidates
    every ``stride``-th is tried first, then the neighbours of the best at ever smaller strides.
    """

    steps: int = 600
    norm: float = 2.4
    stride: int = 24


def fit_grid(
    groups: Float[Tensor, "groups columns out"],
    *,
    wbits: int,
    sym: bool,
    search: GridSearch | None = None,
    importance: Float[Tensor, "groups columns"] | None = None,
) -> Grid:
    """Grid of every group and row.

    An asymmetric grid spans [min(w, 0), max(w, 0)], so that 0.0 is exact. A symmetric grid has
    scale 2a / maxq with a = max |w| and its zero point at code 2**(wbits - 1).

    Args:
        groups: Weights, float32, one slice per group.
        wbits: Bits per weight, 1 to 8.
        sym: Symmetric grid.
        search: Shrink ranges by error; with ``sym`` it also tries negative scales, whose extra
            code lies on the positive side.
        importance: Weight of each column's error in the search, e.g. the Hessian's diagonal.

    Raises:
        QuantizationError: A scale above 65504, float16's largest number.
    """
    low, high = _ranges(groups, sym)
    if search is None:
        scale, zero_point = _grid_of_range(low, high, wbits, sym)
    else:
        pieces = [
            _search(*piece, wbits=wbits, sym=sym, search=search)
            for piece in _chunks(groups, low, high, importance)
        ]
        scale, zero_point = (
            torch.cat(parts, dim=1).reshape(low.shape) for parts in zip(*pieces, strict=True)
        )
    if not scale.abs().max() <= LARGEST_SCALE:
        raise QuantizationError(
            f"A scale of {scale.abs().max().item():.3g} does not fit float16 (largest 65504)."
        )
    return Grid(scale, zero_point, wbits)


def round_to_nearest(
    groups: Float[Tensor, "groups columns out"], grid: Grid
) -> Int[Tensor, "groups columns out"]:
    """Nearest codes, each weight on its own (RTN), int32."""
    scale, zero_point = grid.scale[:, None, :], grid.zero_point[:, None, :]
    return torch.round(groups / scale).add_(zero_point).clamp_(0, grid.maxq).to(torch.int32)


def _ranges(groups: Tensor, sym: bool) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(dim=1).clamp_(max=0), groups.amax(dim=1).clamp_(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _grid_of_range(low: Tensor, high: Tensor, wbits: int, sym: bool) -> tuple[Tensor, Tensor]:
    maxq = 2**wbits - 1
    scale = _storable((high - low) / maxq)
    if sym:
        return scale, torch.full_like(scale, 2 ** (wbits - 1))
    return scale, torch.round(-low / scale).clamp_(0, maxq)


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST_SCALE, max=2 * LARGEST_SCALE).to(torch.float16).float()


def _chunks(
    groups: Tensor, low: Tensor, high: Tensor, importance: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Columns-first slices ``(columns, k)`` of ``k`` group-rows, small enough for a cache."""
    num_groups, num_columns, num_rows = groups.shape
    flat = groups.transpose(0, 1).reshape(num_columns, num_groups * num_rows)
    weights = None
    if importance is not None:
        weights = importance.T.repeat_interleave(num_rows, dim=1)
    width = max(1, SEARCH_CHUNK // num_columns)
    low, high = low.reshape(1, -1), high.reshape(1, -1)
    return [
        (
            flat[:, start : start + width].contiguous(),
            low[:, start : start + width],
            high[:, start : start + width],
            None if weights is None else weights[:, start : start + width],
        )
        for start in range(0, flat.shape[1], width)
    ]


def _search(
    columns: Tensor,
    low: Tensor,
    high: Tensor,
    importance: Tensor | None,
    *,
    wbits: int,
    sym: bool,
    search: GridSearch,
) -> tuple[Tensor, Tensor]:
    candidates = _Candidates(low, high, wbits, sym, search.steps)
    best = _Best(candidates, columns, importance, search.norm)
    last = max(1, int(0.8 * search.steps))
    coarse = torch.arange(1.0, last + 1, search.stride, device=low.device)[:, None]
    best.try_candidates(torch.cat([coarse, -coarse]) if sym else coarse)
    sign = torch.sign(best.number)
    stride = search.stride // 2
    while stride >= 1:
        centre = best.number.abs()
        around = torch.cat([centre - stride, centre + stride])
        best.try_candidates(around.clamp_(1, last).mul_(sign))
        stride //= 2
    return best.grid()


@dataclass(frozen=True)
class _Candidates:
    """The grids of a search by number: ``step + 1``, negative for a negative scale."""

    low: Float[Tensor, "1 k"]
    high: Float[Tensor, "1 k"]
    wbits: int
    sym: bool
    steps: int

    def grids(
        self, numbers: Float[Tensor, "candidates _"]
    ) -> tuple[Float[Tensor, "candidates k"], Float[Tensor, "candidates k"]]:
        """Scales and zero points; numbers are given for each group-row, or once for all."""
        shrink = (self.steps + 1 - numbers.abs()) / self.steps
        if self.sym:
            scale = _storable(self.high * (shrink * (2 / (2**self.wbits - 1))))
            return scale.mul_(torch.sign(numbers)), torch.full_like(scale, 2 ** (self.wbits - 1))
        return _grid_of_range(shrink * self.low, shrink * self.high, self.wbits, self.sym)


class _Best:
    """The best candidate so far of every group-row."""

    def __init__(
        self,
        candidates: _Candidates,
        columns: Float[Tensor, "columns k"],
        importance: Float[Tensor, "columns k"] | None,
        norm: float,
    ):
        self._candidates, self._columns, self._norm = candidates, columns, norm
        self._log_importance = _log_relative(importance) if importance is not None else None
        self._at_once = max(1, SEARCH_CHUNK // columns.numel())
        shape = (self._at_once, *columns.shape)
        self._buffers = columns.new_empty(shape), columns.new_empty(shape)
        self._error = torch.full_like(candidates.low, torch.inf)
        self.number = torch.ones_like(candidates.low)

    def try_candidates(self, numbers: Float[Tensor, "candidates _"]) -> None:
        """Compare candidates, one number each for all group-rows or one for every group-row."""
        scales, zero_points = self._candidates.grids(numbers)
        parts = zip(scales.split(self._at_once), zero_points.split(self._at_once), strict=True)
        errors = torch.cat([self._errors_in_steps(*part) for part in parts])
        errors.mul_(scales.abs().pow_(self._norm))
        for number, error in zip(numbers, errors, strict=True):
            self.number = torch.where(error < self._error, number, self.number)
            self._error = torch.minimum(error, self._error)

    def grid(self) -> tuple[Float[Tensor, "1 k"], Float[Tensor, "1 k"]]:
        """Scale and zero point of the best."""
        return self._candidates.grids(self.number)

    def _errors_in_steps(
        self, scales: Float[Tensor, "some k"], zero_points: Float[Tensor, "some k"]
    ) -> Float[Tensor, "some k"]:
        """Sums of ``importance * |error / scale| ** norm``, through logarithms for speed."""
        exact, codes = (buffer[: len(scales)] for buffer in self._buffers)
        torch.mul(self._columns, (1 / scales)[:, None], out=exact)
        torch.round(exact, out=codes)
        lowest = -zero_points[:, None]
        torch.clamp(codes, lowest, lowest + (2**self._candidates.wbits - 1), out=codes)
        logarithm = exact.sub_(codes).square_().add_(SMALLEST_SQUARE).log_()
        if self._log_importance is None:
            logarithm.mul_(self._norm / 2)
        else:
            torch.add(self._log_importance, logarithm, alpha=self._norm / 2, out=logarithm)
        return logarithm.exp_().sum(dim=1)


def _log_relative(importance: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
    """Logarithm relative to each group's largest, bounded below where ``exp`` is still fast."""
    largest = importance.amax(dim=0).clamp_(min=torch.finfo(importance.dtype).tiny)
    return (importance / largest).clamp_(min=SMALLEST_SQUARE).log_()
