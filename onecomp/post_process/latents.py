"""Learning rates of latent codes and signs, and the weights that tell where latents begin."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from onecomp.models.skeleton import Skeleton
from onecomp.quantizer.gptq.trainable import TrainableCodes
from onecomp.quantizer.trainable import TrainableLinear, Trained

HALF_STEP = 0.5
"""From the middle of a code to where it changes; for signs this is ``1 / smoothing``."""


@dataclass(frozen=True, kw_only=True)
class LatentRates:
    """Learning rates of latents; 0: codes, or signs, stay as they are.

    They are relative: in units in which a fresh latent lies at most ``1 / smoothing`` from where
    its code or sign changes.
    """

    codes: float = 0.0
    signs: float = 0.0
    smoothing: float = 100.0

    @property
    def is_used(self) -> bool:
        """Whether any latents are trained."""
        return self.codes > 0 or self.signs > 0

    def trained(self, *, zero_points: bool) -> Trained:
        """What is trained of a layer of any format.

        Args:
            zero_points: Whether zero points are.
        """
        return Trained(
            zero_points=zero_points,
            codes=self.codes > 0,
            signs=self.signs > 0,
            smoothing=self.smoothing,
        )

    def of(self, layer: TrainableLinear) -> float:
        """The rate of a layer's latents in the layer's own units."""
        if isinstance(layer, TrainableCodes):
            return self.codes * HALF_STEP * self.smoothing
        return self.signs


SCALES_ALONE = LatentRates()
"""Codes and signs stay as they are."""


def references(original: Skeleton, latents: LatentRates) -> Callable[[str], Tensor | None]:
    """What tells where a layer's latents begin, from its full name: its weight before quantization.

    Args:
        original: Skeleton of the original model, whose files are read when a layer is asked for.
        latents: Nothing is read where none are trained.
    """

    def weight(layer: str) -> Tensor | None:
        name = original.tensor_name(f"{layer}.weight")
        is_known = latents.is_used and name in original.source.tensor_files
        return original.source.read([name])[name] if is_known else None

    return weight
