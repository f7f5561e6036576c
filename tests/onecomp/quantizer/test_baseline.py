"""No layer is worse than plain rounding without a word in the journal."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from onecomp.jobs import quantize_group
from onecomp.quantizer import RTN, QuantizationResult
from onecomp.quantizer.baseline import nearest_weight, sign_mean_weight
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.statistics import GroupStatistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Shrinks(WeightQuantizer):
    """A poor method: every weight times ``share``."""

    flag_calibration: bool = True
    flag_hessian: bool = True
    share: float = 1.0

    def quantize_weights(
        self, weights: Mapping[str, Tensor], factors: HessianFactors | None
    ) -> dict[str, QuantizationResult]:
        return {
            name: QuantizationResult(dequantized_weight=weight * self.share)
            for name, weight in weights.items()
        }

    def baseline(self, layer_name: str, weight: Tensor) -> Tensor | None:
        return nearest_weight(weight, wbits=4) if layer_name == "a" else None


@pytest.mark.parametrize(("share", "is_worse"), [(0.5, True), (0.999, False)])
def test_a_layer_that_is_worse_than_plain_rounding_is_named_with_the_ratio(share, is_worse):
    statistics = GroupStatistics.of(draw(200, 32, seed=1) @ draw(32, 32, seed=2), None)
    weights = {"a": draw(20, 32), "b": draw(20, 32, seed=3)}
    results, fallbacks = quantize_group(Shrinks(share=share), weights, statistics, None)
    if not is_worse:
        assert fallbacks == []
        return
    hessian, weight = statistics.hessian().double(), weights["a"].double()

    def error(other: Tensor) -> float:
        off = weight - other.double()
        return ((off @ hessian) * off).sum().item()

    ratio = error(weight * share) / error(nearest_weight(weights["a"], wbits=4))
    assert ratio > 10
    assert fallbacks == [f"worse than plain rounding: {ratio:.3g} times its output error (a)"]
    assert results["a"].relative_output_squared_error == pytest.approx((1 - share) ** 2, rel=1e-4)


def test_without_tokens_nothing_is_compared():
    results, fallbacks = quantize_group(Shrinks(share=0.5), {"a": draw(20, 32)}, None, None)
    assert fallbacks == ["round to nearest: no calibration token reached it"]
    assert results["a"].relative_output_squared_error is None


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 8])
def test_plain_rounding_is_what_rtn_does(sym, groupsize):
    weight = draw(20, 32)
    expected = RTN(wbits=3, groupsize=groupsize, sym=sym).quantize_weights({"a": weight}, None)
    rounded = nearest_weight(weight, wbits=3, groupsize=groupsize, sym=sym)
    assert torch.equal(rounded, expected["a"].dequantize())


def test_sign_and_mean_is_the_best_scale_of_the_signs():
    weight = draw(5, 32)
    rounded = sign_mean_weight(weight)
    assert (rounded.sign() == weight.sign()).all()
    for factor in (0.99, 1.01):
        assert (weight - factor * rounded).square().sum() > (weight - rounded).square().sum()
    assert sign_mean_weight(torch.zeros(1, 4)).equal(torch.zeros(1, 4))
