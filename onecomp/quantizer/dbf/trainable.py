"""Two binary factors while their scales and signs are trained."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onecomp.quantizer.dbf.result import product
from onecomp.quantizer.trainable import (
    TrainableLinear,
    Trained,
    as_stored,
    sign_latents,
    signs_of,
    trained_scale,
)


class TrainableFactors(TrainableLinear):
    """``Da A mid B Db`` with float32 scales, and latents where signs are trained.

    Signs keep one byte each where they are not.

    Args:
        left_signs: ``A``.
        right_signs: ``B``.
        scales: ``Db``, ``mid`` and ``Da``, in the order of use.
        bias: The layer's bias.
        trained: What is trained.
    """

    def __init__(
        self,
        left_signs: Float[Tensor, "out rank"],
        right_signs: Float[Tensor, "rank in"],
        scales: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
        trained: Trained,
    ):
        super().__init__(right_signs.shape[1], left_signs.shape[0], bias)
        self.trained = trained
        self.input_scale, self.middle_scale, self.output_scale = map(trained_scale, scales)
        if trained.decisions:
            self.left = sign_latents(left_signs, trained)
            self.right = sign_latents(right_signs, trained)
        else:
            self.register_buffer("left", left_signs.to(torch.int8))
            self.register_buffer("right", right_signs.to(torch.int8))

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as it would be stored."""
        middle, left, right = (
            as_stored(self.middle_scale),
            self.left_signs(),
            self.right_signs(),
        )
        outer = as_stored(self.output_scale), as_stored(self.input_scale)
        return product(outer[0], left, middle, right, outer[1])

    def left_signs(self) -> Float[Tensor, "out rank"]:
        """``A``, differentiable where signs are trained."""
        return signs_of(self.left, self.trained) if self.trained.decisions else self.left.float()

    def right_signs(self) -> Float[Tensor, "rank in"]:
        """``B``, differentiable where signs are trained."""
        return signs_of(self.right, self.trained) if self.trained.decisions else self.right.float()

    def scales(self) -> Iterator[nn.Parameter]:
        """The three scales."""
        yield from (self.input_scale, self.middle_scale, self.output_scale)

    def decisions(self) -> Iterator[nn.Parameter]:
        """Latents of both factors, if trained."""
        if self.trained.decisions:
            yield from (self.left, self.right)

    def decided(self) -> Iterator[Tensor]:
        """Signs of both factors, if trained."""
        if self.trained.decisions:
            yield from (self.left_signs(), self.right_signs())
