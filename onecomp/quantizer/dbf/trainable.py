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
        reference: The original weight: signs that it hardly asks for, all others given, are a
            close call and change first. None: all alike.
    """

    def __init__(
        self,
        left_signs: Float[Tensor, "out rank"],
        right_signs: Float[Tensor, "rank in"],
        scales: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
        trained: Trained,
        reference: Float[Tensor, "out in"] | None,
    ):
        super().__init__(right_signs.shape[1], left_signs.shape[0], bias)
        self.trained = trained
        self.input_scale, self.middle_scale, self.output_scale = map(trained_scale, scales)
        if trained.signs:
            sure = (None, None)
            if reference is not None:
                sure = self._confidence(left_signs, right_signs, reference.to(left_signs))
            self.left = sign_latents(left_signs, trained, sure[0])
            self.right = sign_latents(right_signs, trained, sure[1])
        else:
            self.register_buffer("left", left_signs.to(torch.int8))
            self.register_buffer("right", right_signs.to(torch.int8))

    @torch.no_grad()
    def _confidence(
        self,
        left: Float[Tensor, "out rank"],
        right: Float[Tensor, "rank in"],
        reference: Float[Tensor, "out in"],
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """How much of each sign the original weight asks for, by least squares in that sign alone.

        With ``v_r`` the rows of ``diag(mid) B diag(Db)`` the coefficient of ``A[i, r]`` that fits
        row ``i`` best, all others given, is ``A[i, r] + <E_i, v_r> / (Da_i |v_r|^2)`` with ``E``
        the error; likewise for ``B`` with columns. 1: the sign as it is.
        """
        rows = self.middle_scale[:, None] * right * self.input_scale
        columns = self.output_scale[:, None] * left * self.middle_scale
        error = reference - self.output_scale[:, None] * (left @ rows)
        of_left = _ratio(error @ rows.T, self.output_scale[:, None] * rows.square().sum(1))
        of_right = _ratio(columns.T @ error, columns.square().sum(0)[:, None] * self.input_scale)
        return 1 + left * of_left, 1 + right * of_right

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
        return signs_of(self.left, self.trained) if self.trained.signs else self.left.float()

    def right_signs(self) -> Float[Tensor, "rank in"]:
        """``B``, differentiable where signs are trained."""
        return signs_of(self.right, self.trained) if self.trained.signs else self.right.float()

    def scales(self) -> Iterator[nn.Parameter]:
        """The three scales."""
        yield from (self.input_scale, self.middle_scale, self.output_scale)

    def decisions(self) -> Iterator[nn.Parameter]:
        """Latents of both factors, if trained."""
        if self.trained.signs:
            yield from (self.left, self.right)

    def decided(self) -> Iterator[Tensor]:
        """Signs of both factors, if trained."""
        if self.trained.signs:
            yield from (self.left_signs(), self.right_signs())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / torch.where(below == 0, 1, below)
