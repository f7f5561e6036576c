"""The correction itself."""

from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import HessianFactor


def corrected_weight(
    weight: Float[Tensor, "out in"],
    delta: Float[Tensor, "in in"],
    factor: HessianFactor,
    perccorr: float,
) -> Float[Tensor, "out in"]:
    """Weight whose output on the quantized model's inputs comes close to the original output.

    ``W' = W + perccorr * W C (H + λI)⁻¹`` with ``H = 2/T X̂ᵀX̂`` and ``C = 2/T (X - X̂)ᵀX̂``:
    at ``perccorr=1`` the damped least-squares solution of ``W' X̂ = W X``
    (Arai and Ichikawa, 2025, arXiv:2504.09629, section 4).

    Args:
        weight: Float32 weight.
        delta: ``C``.
        factor: Damped factor of ``H``.
        perccorr: Share of the correction, 0 to 1.
    """
    return weight + perccorr * factor.right_divide(weight @ delta)
