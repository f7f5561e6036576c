"""Two levels in each group of columns of a row, and signs that choose: what a weight of one bit is.

Weights are transposed (``in out``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import quadratic_form
from onecomp.quantizer.grid import LARGEST_SCALE


@dataclass(frozen=True)
class Levels:
    """The two values ``centre - half`` and ``centre + half`` of every group of every row."""

    centre: Float[Tensor, "groups out"]
    half: Float[Tensor, "groups out"]
    """Not negative."""

    def columns(self, signs: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
        """The transposed weight that signs +1 and -1 stand for."""
        groups = by_group(signs, len(self.half))
        return torch.addcmul(self.centre[:, None], self.half[:, None], groups).reshape_as(signs)

    def nearest(self, columns: Float[Tensor, "in out"]) -> "Binary":
        """Each weight on its own takes the nearer level, the upper one if it lies in the middle."""
        above = by_group(columns, len(self.half)) >= self.centre[:, None]
        return Binary(above.to(columns.dtype).mul_(2).sub_(1).reshape_as(columns), self)

    def in_float16(self) -> "Levels":
        """Centre and half rounded to what float16 holds.

        Raises:
            QuantizationError: A level above 65504, float16's largest number.
        """
        return Levels(in_float16(self.centre), in_float16(self.half))

    @staticmethod
    def join(parts: "Sequence[Levels]") -> "Levels":
        """Levels of more rows."""
        centre = torch.cat([part.centre for part in parts], dim=1)
        return Levels(centre, torch.cat([part.half for part in parts], dim=1))

    def replace_rows(self, rows: Bool[Tensor, "out"], other: "Levels") -> "Levels":
        """``other``, which has as many groups, where ``rows`` is true."""
        return Levels(
            torch.where(rows, other.centre, self.centre), torch.where(rows, other.half, self.half)
        )

    def ends(self) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
        """The lower and the upper value."""
        return self.centre - self.half, self.centre + self.half

    def ends_in_float16(self) -> "Levels":
        """Both values rounded to what float16 holds.

        Raises:
            QuantizationError: A level above 65504, float16's largest number.
        """
        low, high = map(in_float16, self.ends())
        return Levels((low + high) / 2, (high - low) / 2)


Storable = Callable[[Levels], Levels]
"""Rounds levels to numbers that a result can hold, so that what is computed with is stored."""


@dataclass(frozen=True)
class Binary:
    """Signs, and the levels they choose from."""

    signs: Float[Tensor, "in out"]
    """+1 and -1."""
    levels: Levels

    def columns(self) -> Float[Tensor, "in out"]:
        """The transposed weight."""
        return self.levels.columns(self.signs)

    def errors(
        self, columns: Float[Tensor, "in out"], hessian: Float[Tensor, "in in"]
    ) -> Float[Tensor, "out"]:
        """Output error of every row."""
        return quadratic_form(self.columns().sub_(columns), hessian)

    def split(self, sizes: list[int]) -> list["Binary"]:
        """Cut by rows."""
        parts = (t.split(sizes, dim=1) for t in (self.signs, self.levels.centre, self.levels.half))
        return [
            Binary(signs, Levels(centre, half)) for signs, centre, half in zip(*parts, strict=True)
        ]

    @staticmethod
    def join(parts: "Sequence[Binary]") -> "Binary":
        """The inverse of ``split``."""
        signs = torch.cat([part.signs for part in parts], dim=1)
        return Binary(signs, Levels.join([part.levels for part in parts]))

    def replace_rows(self, rows: Bool[Tensor, "out"], other: "Binary") -> "Binary":
        """``other``, which has as many groups, where ``rows`` is true."""
        signs = torch.where(rows, other.signs, self.signs)
        return Binary(signs, self.levels.replace_rows(rows, other.levels))


def by_group(
    columns: Float[Tensor, "in out"], num_groups: int
) -> Float[Tensor, "groups columns out"]:
    """A view of a transposed matrix by groups of columns."""
    return columns.unflatten(0, (num_groups, -1))


def in_float16(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest numbers that float16 holds, in float32.

    Raises:
        QuantizationError: A value above 65504.
    """
    largest = values.abs().max()
    if not largest <= LARGEST_SCALE:
        raise QuantizationError(
            f"A level of {largest.item():.3g} does not fit float16 (largest 65504)."
        )
    return values.to(torch.float16).float()


def sign_mean(
    columns: Float[Tensor, "in out"], num_groups: int = 1, *, tied: bool = False
) -> Binary:
    """``sign(w) * mean |w|`` of every group of every row, the plainest one bit there is.

    With ``tied`` the mean is over all of them.
    """
    half = by_group(columns, num_groups).abs().mean(dim=1)
    half = half.mean().expand_as(half) if tied else half
    return Levels(torch.zeros_like(half), half).in_float16().nearest(columns)


def best_rows(
    columns: Float[Tensor, "in out"],
    candidates: Sequence[Binary],
    hessian: Float[Tensor, "in in"],
    *,
    tied: bool = False,
) -> tuple[Binary, Float[Tensor, "out"], Int[Tensor, "out"]]:
    """Of each row the candidate of least output error, the first of equals.

    Returns:
        The best, the output error of each row, and which candidate each row is from; with ``tied``
        all rows are from one.
    """
    errors = torch.stack([binary.errors(columns, hessian) for binary in candidates])
    chosen = (errors.sum(dim=1, keepdim=True).expand_as(errors) if tied else errors).argmin(dim=0)
    best = candidates[0]
    for index, other in enumerate(candidates[1:], start=1):
        best = best.replace_rows(chosen == index, other)
    return best, errors.gather(0, chosen[None])[0], chosen
