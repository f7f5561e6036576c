"""Errors of a result against the weight it stands for."""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.result import QuantizationResult
from onecomp.statistics import GroupStatistics


def fill_weight_errors(result: QuantizationResult, weight: Float[Tensor, "out in"]) -> None:
    """Fill the three fields about ``||W - Ŵ||²``; sums are float64."""
    weight = weight.float()
    error = (weight - result.dequantize(weight.device)).double().square().sum().item()
    result.weight_squared_error = error
    result.mean_weight_squared_error = error / weight.numel()
    result.relative_weight_squared_error = _ratio(error, weight.double().square().sum().item())


def fill_output_errors(
    result: QuantizationResult, weight: Float[Tensor, "out in"], statistics: GroupStatistics
) -> None:
    """Fill the three fields about ``||W X - Ŵ X||²`` from the sums over tokens alone."""
    weight, tokens = weight.float(), statistics.num_tokens
    hessian = statistics.hessian()
    error = _output_energy(weight - result.dequantize(weight.device), hessian, tokens)
    result.output_squared_error = error
    result.mean_output_squared_error = error / (weight.shape[0] * tokens)
    result.relative_output_squared_error = _ratio(error, _output_energy(weight, hessian, tokens))


def _output_energy(weight: Tensor, hessian: Tensor, tokens: int) -> float:
    return quadratic_form(weight.T, hessian).sum(dtype=torch.float64).item() * tokens / 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
