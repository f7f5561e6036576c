"""Double binary factorisation of layers of equal shape that share an input."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import all_finite
from onecomp.quantizer.dbf.admm import Search, factorise
from onecomp.quantizer.dbf.coordinates import Balancing, Coordinates, damped
from onecomp.quantizer.dbf.factors import BinaryFactors
from onecomp.quantizer.dbf.refine import refine


def dbf_quantize(
    weight: Float[Tensor, "layers out in"],
    hessian: Float[Tensor, "in in"],
    rank: int,
    search: Search,
    balancing: Balancing | None,
    drift_ratio: float = 0.0,
) -> BinaryFactors:
    """Factors with a small ``tr(ΔW H ΔWᵀ)``, of layers of equal shape that share an input.

    Starts from singular vectors, without random numbers. Follows Boža and Macko, 2025
    (arXiv:2505.11076), with the whole Hessian in place of its diagonal; then fits scales and flips
    signs (``refine``).

    Args:
        weight: Their weights, stacked.
        hessian: Symmetric and positive semi-definite, finite.
        rank: See ``rank_of``.
        search: Settings of the alternation.
        balancing: None searches in coordinates without equal norms.
        drift_ratio: Energy of noise in each input, relative to the input's own.

    Raises:
        QuantizationError: The search overflowed.
    """
    coordinates = Coordinates.of(weight, damped(hessian, drift_ratio), balancing)
    size = coordinates.size
    factors = BinaryFactors.split(*factorise(weight, coordinates, rank, search))
    del coordinates  # as large as the Hessian
    factors = refine(weight / size[..., None], damped(hessian, drift_ratio), factors).normalised()
    factors = replace(factors, row_scale=factors.row_scale * size)
    if not all_finite(factors.weight()):
        raise QuantizationError("The factors are not finite.")
    return factors
