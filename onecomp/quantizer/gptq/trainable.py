"""Integer codes on a grid while scales, zero points and codes are trained."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from onecomp.quantizer.trainable import (
    TrainableLinear,
    Trained,
    as_stored,
    codes_of,
    trained_scale,
)

MOST_LEAN = 0.45
"""How far a latent may start from its code; at half a step it would be another code's."""


@dataclass(frozen=True, eq=False)
class GridTensors:
    """What a layer of codes consists of, unpacked."""

    codes: Int[Tensor, "out in"]
    zero_points: Int[Tensor, "groups out"]
    scales: Float[Tensor, "groups out"]
    group_index: Int[Tensor, "in"]
    wbits: int
    has_plain_groups: bool
    """Groups are neighbouring columns, all of one width."""


class TrainableCodes(TrainableLinear):
    """``scale * (code - zero_point)`` with float32 scales, and latents where codes are trained.

    Args:
        grid: The layer's tensors; codes keep one byte a weight where they are not trained.
        bias: The layer's bias.
        trained: What is trained.
        reference: The original weight: a latent leans from its code towards the original by what
            that differs, so that codes that were a close call change first. None: no lean.
    """

    def __init__(
        self,
        grid: GridTensors,
        bias: Tensor | None,
        trained: Trained,
        reference: Float[Tensor, "out in"] | None,
    ):
        out_features, in_features = grid.codes.shape
        super().__init__(in_features, out_features, bias)
        self.maxq, self.has_plain_groups = 2**grid.wbits - 1, grid.has_plain_groups
        self.scale = trained_scale(grid.scales)
        zeros = grid.zero_points.float()
        self.zero = nn.Parameter(zeros, requires_grad=trained.zero_points)
        self.register_buffer("group_index", grid.group_index.long())
        self.latent = None
        if trained.codes:
            self.latent = nn.Parameter(self._latents(grid, reference))
        else:
            self.register_buffer("fixed_codes", grid.codes.to(torch.uint8))

    def _latents(self, grid: GridTensors, reference: Tensor | None) -> Tensor:
        codes = grid.codes.float()
        if reference is None:
            return codes
        scales = self._by_column(self.scale.detach())
        steps = self._by_column(self.zero.detach())
        safe = torch.where(scales == 0, 1, scales)
        lean = reference.to(codes) / safe + steps - codes
        return codes + lean.clamp_(-MOST_LEAN, MOST_LEAN)

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as it would be stored."""
        zeros = codes_of(self.zero, self.maxq) if self.zero.requires_grad else self.zero
        scales = as_stored(self.scale)
        if self.has_plain_groups:
            groups = self.codes().unflatten(1, (len(scales), -1))
            return ((groups - zeros.T.unsqueeze(2)) * scales.T.unsqueeze(2)).flatten(1)
        return (self.codes() - self._by_column(zeros)) * self._by_column(scales)

    def _by_column(self, values: Float[Tensor, "groups out"]) -> Float[Tensor, "out in"]:
        return values.T[:, self.group_index]

    def codes(self) -> Float[Tensor, "out in"]:
        """Codes, differentiable where they are trained."""
        if self.latent is None:
            return self.fixed_codes.float()
        return codes_of(self.latent, self.maxq)

    def rounded_zero_points(self) -> Float[Tensor, "groups out"]:
        """Zero points as they would be stored."""
        return self.zero.detach().clamp(0, self.maxq).round()

    def scales(self) -> Iterator[nn.Parameter]:
        """The scales of all groups."""
        yield self.scale

    def zero_points(self) -> Iterator[nn.Parameter]:
        """The zero points, if trained."""
        if self.zero.requires_grad:
            yield self.zero

    def decisions(self) -> Iterator[nn.Parameter]:
        """Latent codes, if trained."""
        if self.latent is not None:
            yield self.latent

    def decided(self) -> Iterator[Tensor]:
        """Codes, if trained."""
        if self.latent is not None:
            yield self.codes()
