import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError, LayerError
from onecomp.linalg import quadratic_form
from onecomp.quantizer import GPTQ, QBB, QBBResult, QuantizationResult
from onecomp.quantizer.baseline import nearest_weight, sign_mean_weight
from onecomp.quantizer.factors import HessianFactors


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def quantize(quantizer: QBB, weight: Tensor, hessian: Tensor) -> QBBResult:
    return quantizer.quantize_weights({"layer": weight}, HessianFactors(hessian))["layer"]


def row_errors(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    return quadratic_form((weight - other).T.contiguous(), hessian)


@pytest.mark.parametrize("wbits", [1, 2])
def test_scales_are_of_rows_and_such_a_weight_is_found(wbits):
    """Rows of very different scale, which scales of columns could not tell apart."""
    scales = torch.tensor([1.0, 0.375])[:wbits] * torch.logspace(-2, 2, 12)[:, None]
    scales = scales.half().float()
    weight = sum(scales[:, i : i + 1] * draw(12, 64, seed=5 + i).sign() for i in range(wbits))
    result = quantize(QBB(wbits=wbits), weight, correlated_hessian(64))
    assert result.alpha.shape == (12, 1, wbits)
    torch.testing.assert_close(result.dequantize(), weight, rtol=2e-3, atol=0)


def test_a_result_is_the_sum_of_its_bases():
    weight = draw(12, 64)
    result = quantize(QBB(wbits=3, groupsize=16), weight, correlated_hessian(64))
    total = torch.zeros(12, 64)
    for base in range(3):
        assert set(result.signs(base).unique().tolist()) == {-1.0, 1.0}
        total += result.alpha[:, :, base].float().repeat_interleave(16, 1) * result.signs(base)
    torch.testing.assert_close(result.dequantize(), total)
    assert result.codes.dtype == torch.uint8
    assert result.alpha.dtype == torch.float16


def test_more_bases_leave_less_error_and_beat_rounding():
    weight, hessian = draw(40, 96), correlated_hessian(96)
    errors = [
        row_errors(weight, quantize(QBB(wbits=w), weight, hessian).dequantize(), hessian).sum()
        for w in (1, 2, 3, 4)
    ]
    assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(errors))
    plain = [sign_mean_weight(weight)] + [nearest_weight(weight, wbits=w) for w in (2, 3, 4)]
    for error, other in zip(errors, plain, strict=True):
        assert error < 0.6 * row_errors(weight, other, hessian).sum()


def test_four_bases_are_close_to_gptq_or_better():
    weight, hessian = draw(40, 96), correlated_hessian(96)
    gptq = GPTQ(wbits=4, actorder=True, mse=True)
    other = gptq.quantize_weights({"layer": weight}, HessianFactors(hessian))["layer"]
    result = quantize(QBB(), weight, hessian)
    ours, theirs = (row_errors(weight, r.dequantize(), hessian).sum() for r in (result, other))
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("wbits", [1, 3])
def test_no_row_is_worse_than_plain_rounding(wbits):
    """Also where the damped Hessian, which the search sees, says little of the true one."""
    weight = draw(30, 32)
    direction = draw(32, 1, seed=7)
    hessian = direction @ direction.T
    quantizer = QBB(wbits=wbits, percdamp=1e4)
    factors = HessianFactors(hessian)
    result = quantizer.quantize_weights({"layer": weight}, factors)["layer"]
    step = weight.abs().amax(dim=1, keepdim=True) / (2**wbits - 1)
    if wbits == 1:
        step = weight.abs().mean(dim=1, keepdim=True)
    step = step.half().float()
    most = 2**wbits - 1
    odd = (2 * torch.floor(weight / step / 2) + 1).clamp(-most, most)
    errors, plain = (row_errors(weight, w, hessian) for w in (result.dequantize(), odd * step))
    assert wbits == 1 or factors.rounded_rows > 0
    assert (errors <= plain * 1.001 + 1e-6).all()
    torch.testing.assert_close(factors.row_errors["layer"][0], errors, rtol=1e-3, atol=1e-5)


def test_layers_are_compared_with_rounding_that_has_zero_points():
    weight = draw(8, 64).abs()
    expected = nearest_weight(weight, wbits=3, groupsize=16)
    assert torch.equal(QBB(wbits=3, groupsize=16).baseline("layer", weight), expected)
    assert QBB(wbits=1).baseline("layer", weight) is None


def test_progressive_quantization_starts_with_fewer_bases_and_ends_close():
    weight, hessian = draw(40, 96), correlated_hessian(96)
    joint, progressive, plain = (
        row_errors(weight, w, hessian).sum()
        for w in (
            quantize(QBB(), weight, hessian).dequantize(),
            quantize(QBB(use_progressive_quantization=True), weight, hessian).dequantize(),
            nearest_weight(weight, wbits=4),
        )
    )
    assert progressive != joint
    assert progressive < 1.3 * joint < plain


def test_groups_have_scales_of_their_own():
    weight, hessian = draw(20, 96), correlated_hessian(96)
    by_row, by_group = (
        quantize(QBB(wbits=2, groupsize=size), weight, hessian) for size in (-1, 16)
    )
    assert by_group.alpha.shape == (20, 6, 2)
    errors = [row_errors(weight, r.dequantize(), hessian).sum() for r in (by_row, by_group)]
    assert errors[1] < errors[0]


def test_layers_of_a_group_are_joined_and_cut_again():
    first, second, hessian = draw(20, 32), draw(12, 32, seed=3), correlated_hessian(32)
    weights = {"first": first, "second": second}
    results = QBB(wbits=2).quantize_weights(weights, HessianFactors(hessian))
    whole = quantize(QBB(wbits=2), torch.cat([first, second]), hessian)
    joined = QuantizationResult.join([results["first"], results["second"]])
    assert torch.equal(joined.dequantize(), whole.dequantize())


def test_zero_rows_and_unused_columns_stay_finite():
    weight, hessian = draw(10, 32), correlated_hessian(32)
    weight[3] = 0
    hessian[5] = hessian[:, 5] = 0
    for wbits in (1, 4):
        result = quantize(QBB(wbits=wbits), weight, hessian)
        assert result.dequantize().isfinite().all()
        assert row_errors(weight, result.dequantize(), hessian)[3] < 1e-8


def test_a_hessian_without_a_factor_means_plain_rounding():
    weight, hessian = draw(10, 32), torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 30  # not positive definite with any damping of the ladder
    factors = HessianFactors(hessian)
    result = QBB(wbits=2).quantize_weights({"layer": weight}, factors)["layer"]
    largest = weight.abs().amax(dim=1)
    torch.testing.assert_close(result.alpha[:, 0, 0].float(), largest * 2 / 3, rtol=1e-3, atol=0)
    assert factors.fallbacks[-1].startswith("round to nearest: The Hessian is not positive")


def test_lr_and_ste_type_are_kept_without_effect():
    weight, hessian = draw(10, 32), correlated_hessian(32)
    plain = quantize(QBB(wbits=2), weight, hessian)
    for other in (QBB(wbits=2, lr=1.0), QBB(wbits=2, ste_type="tanh")):
        assert torch.equal(quantize(other, weight, hessian).codes, plain.codes)


def test_more_rounds_lower_the_error():
    weight, hessian = draw(40, 96), correlated_hessian(96)
    one, many = (
        row_errors(
            weight, quantize(QBB(wbits=1, iters_per_basis=n), weight, hessian).dequantize(), hessian
        )
        for n in (1, 50)
    )
    assert many.sum() < one.sum()


def test_all_settings_are_checked_at_once():
    with pytest.raises(ConfigError) as caught:
        QBB(
            wbits=0,
            iters_per_basis=0,
            lr=0.0,
            ste_type="hard",
            groupsize=0,
            percdamp=0.0,
            drift_ratio=-1.0,
        )
    for text in (
        "wbits=0: must be a whole number from 1 to 8.",
        "iters_per_basis=0: must be a whole number, at least 1.",
        "lr=0.0: must be above 0.",
        "ste_type='hard': must be clipped, identity, tanh.",
        "groupsize=0: must be -1 (one group a row) or at least 1.",
        "percdamp=0.0: must be above 0.",
        "drift_ratio=-1.0: must be 0 or more.",
    ):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="progressive_bits=3: must be a whole number from 1 to"):
        QBB(wbits=2, use_progressive_quantization=True, progressive_bits=3)


def test_defaults_are_the_documented_ones():
    quantizer = QBB()
    assert (quantizer.wbits, quantizer.iters_per_basis, quantizer.lr) == (4, 1000, 1e-4)
    assert (quantizer.use_progressive_quantization, quantizer.progressive_bits) == (False, 2)
    assert (quantizer.flag_hessian, quantizer.row_separable) == (True, True)
    assert QBB(wbits=3, groupsize=64).name == "QBB_3bit_gs64"
    assert replace(quantizer, wbits=2).name == "QBB_2bit"


def test_groups_that_do_not_fit_name_the_layer():
    layer = nn.Linear(48, 8, bias=False)
    text = "groupsize=32 must divide in_features, but the layer has in_features=48 (48 % 32 = 16)"
    with pytest.raises(LayerError, match=re.escape(text)):
        QBB(groupsize=32).quantize_layer(layer, None, torch.eye(48))


def test_there_is_no_checkpoint_format():
    with pytest.raises(NotImplementedError, match="QBB has no checkpoint format"):
        QBB().get_quant_config()
