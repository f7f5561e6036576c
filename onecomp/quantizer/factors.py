"""One factorisation of a Hessian, shared by everything that solves with it."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import HessianFactor

LADDER = (
    (1, torch.float32),
    (10, torch.float32),
    (100, torch.float32),
    (10, torch.float64),
    (100, torch.float64),
)
"""Rungs: how many times the damping asked for, and in which precision, until a factor exists."""


@dataclass
class HessianFactors:
    """Factors of one Hessian, made when first asked for and kept.

    Args:
        hessian: ``2 / tokens * XᵀX``.
        order: Order in which columns are solved; None for the layer's own.
    """

    hessian: Float[Tensor, "in in"]
    order: Tensor | None = None
    fallbacks: list[str] = field(default_factory=list)
    """What the ladder had to do, in words for the journal."""
    _known: dict[float, HessianFactor] = field(default_factory=dict, repr=False)

    def at(self, percdamp: float) -> HessianFactor:
        """The factor with damping ``percdamp`` times the mean diagonal, or the next that exists.

        Raises:
            QuantizationError: Not even a hundred times the damping in float64 was enough.
        """
        if percdamp not in self._known:
            self._known[percdamp] = self._climb(percdamp)
        return self._known[percdamp]

    def _climb(self, percdamp: float) -> HessianFactor:
        reason = ""
        for more, dtype in LADDER:
            try:
                factor = HessianFactor.of(
                    self.hessian, percdamp=percdamp * more, order=self.order, dtype=dtype
                )
            except QuantizationError as error:
                reason = str(error)
                continue
            if (more, dtype) != LADDER[0]:
                self.fallbacks.append(f"percdamp {percdamp:g} -> {percdamp * more:g} in {dtype}")
            return factor
        raise QuantizationError(reason)
