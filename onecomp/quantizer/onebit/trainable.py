"""Signs between two vectors of scales while all of them are trained."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onecomp.quantizer.trainable import (
    TrainableLinear,
    Trained,
    as_stored,
    sign_latents,
    signs_of,
    trained_scale,
)


class TrainableSigns(TrainableLinear):
    """``a * sign * b`` with float32 scales, and latents where signs are trained.

    Signs keep one byte each where they are not.

    Args:
        signs: 1 and -1.
        output_scale: ``a``.
        input_scale: ``b``.
        bias: The layer's bias.
        trained: What is trained.
        reference: The original weight: signs of weights that are small beside their scales are a
            close call and change first. None: all alike.
    """

    def __init__(
        self,
        signs: Float[Tensor, "out in"],
        output_scale: Tensor,
        input_scale: Tensor,
        bias: Tensor | None,
        trained: Trained,
        reference: Float[Tensor, "out in"] | None,
    ):
        super().__init__(signs.shape[1], signs.shape[0], bias)
        self.trained = trained
        self.a, self.b = trained_scale(output_scale), trained_scale(input_scale)
        if trained.signs:
            confidence = None
            if reference is not None:
                size = self.a.detach()[:, None] * self.b.detach()
                confidence = reference.to(signs) * signs / torch.where(size == 0, 1, size)
            self.sign = sign_latents(signs, trained, confidence)
        else:
            self.register_buffer("sign", signs.to(torch.int8))

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as it would be stored."""
        return self.signs() * as_stored(self.b) * as_stored(self.a)[:, None]

    def signs(self) -> Float[Tensor, "out in"]:
        """Signs, differentiable where they are trained."""
        return signs_of(self.sign, self.trained) if self.trained.signs else self.sign.float()

    def scales(self) -> Iterator[nn.Parameter]:
        """Both vectors."""
        yield from (self.a, self.b)

    def decisions(self) -> Iterator[nn.Parameter]:
        """Latents of the signs, if trained."""
        if self.trained.signs:
            yield self.sign

    def decided(self) -> Iterator[Tensor]:
        """Signs, if trained."""
        if self.trained.signs:
            yield self.signs()
