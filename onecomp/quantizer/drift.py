"""Errors that a layer's inputs carry from quantized layers before it, as noise in the Hessian."""

from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.checks import as_number


def drifted(hessian: Float[Tensor, "in in"], drift_ratio: float) -> Float[Tensor, "in in"]:
    """A copy of the Hessian for inputs with independent noise.

    Few bits bend the inputs of all later layers. A search under the Hessian as it is pays for the
    inputs it shows with directions that they leave empty, and those fill.

    Args:
        hessian: ``2 / tokens * XᵀX``.
        drift_ratio: Energy of the noise in each input, relative to the input's own.
    """
    return add_drift(hessian.clone(), drift_ratio)


def add_drift(hessian: Float[Tensor, "in in"], drift_ratio: float) -> Float[Tensor, "in in"]:
    """The same in place, on a copy that is there already."""
    hessian.diagonal().mul_(1 + drift_ratio)
    return hessian


def drift_problems(drift_ratio: object) -> list[str]:
    """What is wrong with a ratio, one sentence at most."""
    if as_number(drift_ratio) >= 0:
        return []
    return [f"drift_ratio={drift_ratio!r}: must be 0 or more."]
