"""A quantized layer while it is trained: what training may change, in float32, beside its format.

Every forward pass computes with exactly what would be stored: scales rounded to float16, zero
points and codes to whole numbers, latents to signs. Gradients go through the rounding
(straight-through estimators), so that a loss is always that of the checkpoint to be written.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

CODE_SHARPNESS = 10.0
"""Steepness of the smooth staircase whose slope is the gradient of rounding a latent code."""
HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Trained:
    """What training may change beside the scales."""

    zero_points: bool = False
    """Zero points; only where the checkpoint's format has them, so not with symmetric grids."""
    codes: bool = False
    """Integer codes, by way of latents."""
    signs: bool = False
    """Signs, likewise."""
    smoothing: float = 100.0
    """Sharpness of the smooth sign. ``1 / smoothing`` is the latent scale: a fresh latent lies one
    latent scale away from its boundary, and the smooth sign is as wide as that."""

    @property
    def latent_scale(self) -> float:
        """How far a fresh latent is from where its sign or code changes."""
        return 1 / self.smoothing


class TrainableLinear(nn.Module, ABC):
    """Stands in for a quantized layer while it is trained.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: The layer's bias, which stays as it is.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", bias)
        self._held: Tensor | None = None

    @abstractmethod
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as it would be stored, in float32, differentiable in what is trained."""

    @abstractmethod
    def scales(self) -> Iterator[nn.Parameter]:
        """Continuous parameters."""

    def zero_points(self) -> Iterator[nn.Parameter]:
        """Zero points, in code steps; none unless they are trained."""
        yield from ()

    @abstractmethod
    def decisions(self) -> Iterator[nn.Parameter]:
        """Latents of codes or signs, in units of their own; none unless they are trained."""

    @abstractmethod
    def decided(self) -> Iterator[Tensor]:
        """What the latents stand for: codes or signs; none unless they are trained."""

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``nn.Linear``'s result with the weight rounded to the type of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight() if self._held is None else self._held
        return functional.linear(x, weight.to(x.dtype), bias)

    @contextmanager
    def held_weight(self) -> Iterator[None]:
        """Compute the weight once for all passes inside the context.

        Parameters must not change there, and whoever goes back through several of the passes
        keeps the graph.
        """
        self._held = self.weight()
        try:
            yield
        finally:
            self._held = None


def trained_scale(stored: Tensor) -> nn.Parameter:
    """A float32 parameter that starts at stored scales."""
    return nn.Parameter(stored.detach().float().clone())


def as_stored(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``scale`` rounded to what float16 can hold; the gradient passes."""
    rounded = scale.detach().clamp(-HALF_MAX, HALF_MAX).half().float()
    return scale + (rounded - scale.detach())


def signs_of(latent: Float[Tensor, "*shape"], trained: Trained) -> Float[Tensor, "*shape"]:
    """Signs of latents, that of zero is 1; the gradient is the slope of a smooth sign.

    The smooth sign is ``tanh(k x) / k`` with ``k`` the smoothing: divided by ``k``, its slope does
    not depend on the unit of the latents.
    """
    smooth = torch.tanh(trained.smoothing * latent) / trained.smoothing
    return smooth + (torch.where(latent >= 0, 1.0, -1.0) - smooth).detach()


def codes_of(latent: Float[Tensor, "*shape"], maxq: int) -> Float[Tensor, "*shape"]:
    """Nearest codes of latents; the gradient is the slope of a smooth staircase.

    The staircase is ``floor(v) + sigmoid(k (v - floor(v) - 1/2))``. More than half a step outside
    the codes the slope is zero, so that a latent cannot wander off.
    """
    near = latent.clamp(-0.5, maxq + 0.5)
    floor = near.detach().floor()
    smooth = floor + torch.sigmoid(CODE_SHARPNESS * (near - floor - 0.5))
    return smooth + (latent.detach().clamp(0, maxq).round() - smooth.detach())


def sign_latents(
    signs: Float[Tensor, "*shape"], trained: Trained, confidence: Tensor | None = None
) -> nn.Parameter:
    """Latents whose signs are ``signs``, at most one latent scale away from zero.

    Args:
        signs: 1 and -1.
        trained: Has the latent scale.
        confidence: How far the value that a sign stands for lies on its side, 1 for usual;
            negative where it lies on the other. None: all alike.
    """
    distance = torch.ones_like(signs) if confidence is None else confidence.clamp(0.05, 1)
    return nn.Parameter(signs * distance * trained.latent_scale)
