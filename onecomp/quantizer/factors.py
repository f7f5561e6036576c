"""One factorisation of a Hessian, shared by everything that solves with it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import HessianFactor, from_strips, strip_bounds
from onecomp.quantizer.checks import as_number

SMALLEST_PERCDAMP = 3.95e-4
"""Least documented damping."""
LADDER = (
    (1, torch.float32),
    (10, torch.float32),
    (100, torch.float32),
    (10, torch.float64),
    (100, torch.float64),
)
"""Rungs: how many times the damping asked for, and in which precision, until a factor exists."""


@dataclass(frozen=True, order=True)
class FactorKey:
    """Which factor of a Hessian."""

    percdamp: float
    """Damping, a fraction of the mean diagonal."""
    by_activation: bool = False
    """Columns in the order of falling activation (the Hessian's diagonal), or in the layer's."""


@dataclass
class HessianFactors:
    """Factors of one Hessian, made when first asked for and kept; and what was found with them.

    Pickled, the symmetric and the triangular matrices travel as strips: little more than half of
    the bytes. No tensor is written to once it is here.

    Args:
        hessian: ``2 / tokens * XᵀX``.
        num_tokens: Tokens that it is the mean over; 0 where that is not known.
    """

    hessian: Float[Tensor, "in in"]
    num_tokens: int = 0
    fallbacks: list[str] = field(default_factory=list)
    """What the ladder or a method had to do other than asked, in words for the journal."""
    rounded_rows: int = 0
    """Rows that a method rounded to nearest because that served them better."""
    row_errors: dict[str, Float[Tensor, "2 out"]] = field(default_factory=dict)
    """By layer name, output error and output energy of each row, where the method knows them."""
    _known: dict[FactorKey, HessianFactor] = field(default_factory=dict, repr=False)
    _failed: dict[FactorKey, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_identity(
        cls, in_features: int, keys: Iterable[FactorKey], device: torch.device | str
    ) -> "HessianFactors":
        """With all inputs alike and independent second-order methods round to nearest.

        Args:
            in_features: Columns.
            keys: The factors that will be asked for; they are known without factoring.
            device: Where they are.
        """
        eye = torch.eye(in_features, device=device)
        known = {}
        for key in keys:
            order = torch.arange(in_features, device=device) if key.by_activation else None
            upper = eye * (1 + key.percdamp) ** -0.5
            known[key] = HessianFactor(order, upper, key.percdamp)
        return cls(eye, _known=known)

    def at(self, percdamp: float, by_activation: bool = False) -> HessianFactor:
        """The factor with damping ``percdamp`` times the mean diagonal, or the next that exists.

        Args:
            percdamp: Damping, a fraction of the mean diagonal.
            by_activation: Columns in the order of falling activation, or in the layer's own.

        Raises:
            QuantizationError: Not even a hundred times the damping in float64 was enough.
        """
        return self._factor(FactorKey(percdamp, by_activation))

    def in_any_order(self, percdamp: float) -> HessianFactor:
        """A factor with this damping that is there already, else the one in the layer's order.

        Raises:
            QuantizationError: Not even a hundred times the damping in float64 was enough.
        """
        there = sorted(key for key in (*self._known, *self._failed) if key.percdamp == percdamp)
        return self._factor(there[0] if there else FactorKey(percdamp))

    def _factor(self, key: FactorKey) -> HessianFactor:
        if key in self._failed:
            raise QuantizationError(self._failed[key])
        if key not in self._known:
            self._known[key] = self._climb(key)
        return self._known[key]

    def _climb(self, key: FactorKey) -> HessianFactor:
        reason, percdamp, order = "", key.percdamp, None
        if key.by_activation:
            order = torch.argsort(self.hessian.diagonal(), descending=True, stable=True)
        for more, dtype in LADDER:
            try:
                factor = HessianFactor.of(
                    self.hessian, percdamp=percdamp * more, order=order, dtype=dtype
                )
            except QuantizationError as error:
                reason = str(error)
                continue
            if (more, dtype) != LADDER[0]:
                self.fallbacks.append(f"percdamp {percdamp:g} -> {percdamp * more:g} in {dtype}")
            return factor
        self._failed[key] = reason
        raise QuantizationError(reason)

    def for_piece(self) -> "HessianFactors":
        """The same factors with nothing found yet."""
        return replace(self, fallbacks=[], rounded_rows=0, row_errors={})

    def to(self, device: torch.device | str) -> "HessianFactors":
        """The same factors on a device; themselves where they are there."""
        if self.hessian.device == torch.device(device):
            return self
        known = {
            key: HessianFactor(
                None if factor.order is None else factor.order.to(device),
                factor.upper.to(device),
                factor.percdamp,
            )
            for key, factor in self._known.items()
        }
        return replace(self, hessian=self.hessian.to(device), _known=known)

    def __getstate__(self) -> dict[str, object]:
        sent = {
            key: (
                None if factor.order is None else factor.order.cpu(),
                _to_strips(factor.upper),
                factor.percdamp,
            )
            for key, factor in self._known.items()
        }
        return vars(self) | {"hessian": _to_strips(self.hessian), "_known": sent}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.hessian = from_strips(state["hessian"])
        self._known = {
            key: HessianFactor(order, _upper_from_strips(strips), percdamp)
            for key, (order, strips, percdamp) in state["_known"].items()
        }


def _to_strips(matrix: Float[Tensor, "in in"]) -> list[Tensor]:
    """Copies in the processor's memory; a view would be pickled with all that it is a view of."""
    bounds = strip_bounds(len(matrix))
    return [matrix[a:b, a:].clone(memory_format=torch.contiguous_format).cpu() for a, b in bounds]


def _upper_from_strips(strips: list[Tensor]) -> Float[Tensor, "in in"]:
    size = strips[0].shape[1]
    full = strips[0].new_zeros(size, size)
    for (a, b), strip in zip(strip_bounds(size), strips, strict=True):
        full[a:b, a:] = strip
    return full


def percdamp_problems(percdamp: object) -> list[str]:
    """What is wrong with a damping, one sentence at most."""
    if as_number(percdamp) >= SMALLEST_PERCDAMP:
        return []
    return [f"percdamp={percdamp!r}: must be at least {SMALLEST_PERCDAMP}."]
