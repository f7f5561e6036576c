"""Quantizing one input group: the job that its owner runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import LayerError, QuantizationError
from onecomp.linalg import all_finite, one_thread
from onecomp.qep.config import QEPConfig
from onecomp.qep.correction import corrected_weight
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.errors_of import fill_output_errors, fill_weight_errors
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.result import QuantizationResult
from onecomp.statistics import GroupStatistics


@dataclass(frozen=True)
class GroupReceipt:
    """What the driver learns of a finished group: numbers only."""

    layers: dict[str, dict[str, float | None]]
    """Error fields by layer name."""
    fallbacks: list[str]
    num_tokens: int
    seconds: float
    worker: int
    received_bytes: int


def quantize_group(
    quantizer: Quantizer,
    weights: Mapping[str, Float[Tensor, "out in"]],
    statistics: GroupStatistics | None,
    qep: QEPConfig | None,
) -> tuple[dict[str, QuantizationResult], list[str]]:
    """Quantize layers that share an input, on one thread, so that the bits are the same anywhere.

    Args:
        quantizer: Method and settings.
        weights: Float32 weights by full layer name.
        statistics: Sums over the group's inputs; None for methods that need none.
        qep: Corrects the weights first where the statistics allow it.

    Returns:
        Results by layer name, and what had to be done other than asked, in words.

    Raises:
        LayerError: Weights or inputs that are not finite, or arithmetic that failed for good.
    """
    first = next(iter(weights))
    _require_finite(weights)
    if statistics is not None:
        statistics.require_finite(first)
    with one_thread(), torch.no_grad():
        factors = _factors(quantizer, statistics, weights[first].shape[1])
        try:
            weights = _corrected(weights, statistics, factors, qep)
            started = time.monotonic()
            results = dict(quantizer.quantize_weights(weights, factors))
        except QuantizationError as error:
            raise LayerError(first, str(error)) from error
        _fill(results, weights, statistics, quantizer, time.monotonic() - started)
    return results, [] if factors is None else factors.fallbacks


def _factors(
    quantizer: Quantizer, statistics: GroupStatistics | None, in_features: int
) -> HessianFactors | None:
    if not quantizer.flag_hessian:
        return None
    if statistics is None:  # with all inputs alike, second-order methods round to nearest
        return HessianFactors(
            torch.eye(in_features), fallbacks=["round to nearest: no calibration token reached it"]
        )
    hessian = statistics.hessian()
    return HessianFactors(hessian, quantizer.column_order(hessian))


def _corrected(
    weights: Mapping[str, Tensor],
    statistics: GroupStatistics | None,
    factors: HessianFactors | None,
    qep: QEPConfig | None,
) -> Mapping[str, Tensor]:
    delta = None if statistics is None else statistics.delta()
    if qep is None or delta is None or factors is None:
        return weights
    try:
        factor = factors.at(qep.percdamp)
    except QuantizationError as error:
        factors.fallbacks.append(f"weights not corrected: {error}")
        return weights
    return {
        name: corrected_weight(weight, delta, factor, qep.perccorr)
        if qep.corrects(name)
        else weight
        for name, weight in weights.items()
    }


def _fill(
    results: Mapping[str, QuantizationResult],
    weights: Mapping[str, Tensor],
    statistics: GroupStatistics | None,
    quantizer: Quantizer,
    seconds: float,
) -> None:
    total = sum(weight.numel() for weight in weights.values())
    for name, result in results.items():
        result.quantization_time = seconds * weights[name].numel() / total
        if quantizer.calc_quant_error:
            fill_weight_errors(result, weights[name])
            if statistics is not None:
                fill_output_errors(result, weights[name], statistics)


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not all_finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            raise LayerError(
                name,
                f"its weight holds {bad} NaN or infinite values of {weight.numel()}. "
                "The checkpoint is damaged, or --dtype is too narrow for it.",
            )
