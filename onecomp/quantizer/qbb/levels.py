"""Sums of signed scales: what a weight of QBB can be, and the signs that say which.

Weights are transposed (``in out``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.pieces import step_cuts


@dataclass(frozen=True)
class BasisLevels:
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
        signs = torch.stack([sign_of(codes, base) for base in range(self.num_bases)])
        levels, order = torch.einsum("bl,gbo->gol", signs, self.alpha).sort(dim=2, stable=True)
        order = order.to(torch.uint8)
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        return levels.contiguous(), order, middles.contiguous()

    def nearest(
        self, group: int, columns: Float[Tensor, "_ out"]
    ) -> tuple[Float[Tensor, "_ out"], UInt8[Tensor, "_ out"]]:
        """Nearest level of each weight of some columns of a group, and its code."""
        levels, codes, middles = (part[group] for part in self._ordered)
        place = torch.searchsorted(middles, columns.T.contiguous())
        return levels.gather(1, place).T, codes.gather(1, place).T

    def rows(self, start: int, stop: int) -> "BasisLevels":
        """Those of some rows."""
        return BasisLevels(self.alpha[..., start:stop])

    def rounded(self, columns: Float[Tensor, "in out"]) -> "Bases":
        """Every weight on its own takes the nearest level."""
        cuts = step_cuts(columns.shape[1], len(columns))
        codes = [self.rows(a, b)._nearest_codes(columns[:, a:b]) for a, b in cuts]
        return Bases(torch.cat(codes, dim=1), self)

    def _nearest_codes(self, columns: Tensor) -> UInt8[Tensor, "in out"]:
        by_group = columns.chunk(len(self.alpha))
        return torch.cat([self.nearest(group, part)[1] for group, part in enumerate(by_group)])


@dataclass(frozen=True)
class Bases:
    """Signs of all bases, and the scales they are multiplied by."""

    codes: UInt8[Tensor, "in out"]
    """Bit i is 1 where base i is +1."""
    levels: BasisLevels

    def signs(self, base: int) -> Float[Tensor, "in out"]:
        """One sign matrix, transposed."""
        return sign_of(self.codes, base)

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
        cuts = step_cuts(columns.shape[1], len(columns))
        each = [quadratic_form(self.rows(a, b).rest(columns[:, a:b]), hessian) for a, b in cuts]
        return torch.cat(each)

    def rest(self, columns: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
        """What is left of a transposed weight, in memory of its own."""
        return self.columns().neg_().add_(columns)

    def rows(self, start: int, stop: int) -> "Bases":
        """Those of some rows; signs are a view."""
        return Bases(self.codes[:, start:stop], self.levels.rows(start, stop))

    @staticmethod
    def join(parts: "Sequence[Bases]") -> "Bases":
        """The bases of more rows."""
        alpha = torch.cat([part.levels.alpha for part in parts], dim=2)
        return Bases(torch.cat([part.codes for part in parts], dim=1), BasisLevels(alpha))

    def replace_rows(self, rows: Bool[Tensor, "out"], other: "Bases") -> "Bases":
        """``other`` where ``rows`` is true."""
        alpha = torch.where(rows, other.levels.alpha, self.levels.alpha)
        return Bases(torch.where(rows, other.codes, self.codes), BasisLevels(alpha))


def sign_of(codes: Integer[Tensor, "*shape"], base: int) -> Float[Tensor, "*shape"]:
    """Of one base, +1 and -1."""
    return ((codes >> base) & 1).float().mul_(2).sub_(1)
