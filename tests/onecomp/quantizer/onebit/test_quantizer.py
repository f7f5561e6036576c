import pytest
import torch
from torch import Tensor

from onecomp.errors import ConfigError
from onecomp.export.quant_config import check_quant_config, layer_format
from onecomp.linalg import quadratic_form
from onecomp.quantizer import Onebit, OnebitResult
from onecomp.quantizer.baseline import sign_mean_weight
from onecomp.quantizer.factors import HessianFactors


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0) -> Tensor:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / len(rows) * rows.T @ rows


def quantize(weight: Tensor, factors: HessianFactors, **settings: object) -> OnebitResult:
    return Onebit(**settings).quantize_weights({"layer": weight}, factors)["layer"]


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    return quadratic_form((weight - other).T.contiguous(), hessian).sum()


@pytest.mark.parametrize("use_importance_scaling", [False, True])
@pytest.mark.parametrize("use_balancing", [False, True])
def test_stored_scales_are_of_the_weight_that_errors_were_measured_on(
    use_importance_scaling, use_balancing
):
    """Rows and columns of very different scale: what stays in a balanced space would be far off."""
    weight = draw(30, 64) * torch.logspace(-1, 1, 64) * torch.logspace(1, -1, 30)[:, None]
    hessian = correlated_hessian(64)
    factors = HessianFactors(hessian)
    result = quantize(
        weight,
        factors,
        use_importance_scaling=use_importance_scaling,
        use_balancing=use_balancing,
    )
    stored = torch.outer(result.a.float(), result.b.float()) * result.signs()
    torch.testing.assert_close(result.dequantize(), stored)
    error, energy = factors.row_errors["layer"].sum(dim=1)
    torch.testing.assert_close(output_error(weight, stored, hessian), error, rtol=1e-3, atol=0)
    assert error < 0.25 * energy
    assert error < 0.5 * output_error(weight, sign_mean_weight(weight), hessian)


def test_a_onebit_weight_is_found():
    weight = torch.outer(torch.logspace(-1, 1, 30), torch.logspace(1, -1, 64))
    weight *= draw(30, 64).sign()
    result = quantize(weight, HessianFactors(correlated_hessian(64)))
    torch.testing.assert_close(result.dequantize(), weight, rtol=5e-3, atol=0)


def test_signs_differ_from_those_of_the_weight():
    weight = draw(30, 64)
    result = quantize(weight, HessianFactors(correlated_hessian(64)))
    assert (result.signs() != weight.sign()).any()


def test_more_rounds_lower_the_error():
    weight, hessian = draw(40, 96), correlated_hessian(96)
    one, many = (
        quantize(weight, HessianFactors(hessian), iters=rounds).dequantize() for rounds in (1, 20)
    )
    assert output_error(weight, many, hessian) < output_error(weight, one, hessian)


def test_a_layer_is_never_worse_than_sign_times_mean():
    """Also where the damped Hessian, which the search sees, says little of the true one."""
    direction = draw(32, 1, seed=7)
    hessian = direction @ direction.T
    for seed in range(5):
        weight = draw(20, 32, seed=seed)
        result = quantize(weight, HessianFactors(hessian), percdamp=1e4)
        error, plain = (
            output_error(weight, w, hessian)
            for w in (result.dequantize(), sign_mean_weight(weight))
        )
        assert error <= plain * 1.01


def test_zero_rows_and_unused_columns_stay_finite():
    weight, hessian = draw(10, 32), correlated_hessian(32)
    weight[3] = 0
    weight[:, 7] = 0
    hessian[5] = hessian[:, 5] = 0
    result = quantize(weight, HessianFactors(hessian))
    assert result.dequantize().isfinite().all()
    assert result.dequantize()[3].abs().max() < 1e-6


def test_a_hessian_without_a_factor_means_sign_times_mean():
    weight, hessian = draw(10, 32), torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 30  # not positive definite with any damping of the ladder
    factors = HessianFactors(hessian)
    result = quantize(weight, factors)
    torch.testing.assert_close(result.dequantize(), sign_mean_weight(weight), rtol=1e-3, atol=0)
    assert factors.fallbacks[-1].startswith("sign times mean: The Hessian is not positive")


def test_the_config_names_the_method_and_every_layer():
    quantizer, names = Onebit(), ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    config = quantizer.finalize_quant_config_for_save(quantizer.get_quant_config(), names, 2)
    check_quant_config(config, "checkpoint")
    assert (config["quant_method"], config["bits"]) == ("onebit", 1)
    assert config["quantized_layer_names"] == names
    assert layer_format(config, names[1]) == quantizer.layer_format(names[1])


def test_defaults_are_the_documented_ones():
    quantizer = Onebit()
    assert (quantizer.iters, quantizer.balance_iters, quantizer.balance_alpha) == (10, 40, 1.0)
    assert (quantizer.use_importance_scaling, quantizer.use_balancing) == (True, True)
    assert (quantizer.flag_hessian, quantizer.row_separable) == (True, False)


def test_all_settings_are_checked_at_once():
    with pytest.raises(ConfigError) as caught:
        Onebit(iters=0, balance_iters=0, balance_alpha=0.0, percdamp=0.0, drift_ratio=-1.0)
    for text in (
        "iters=0: must be a whole number, at least 1.",
        "balance_iters=0: must be a whole number, at least 1.",
        "balance_alpha=0.0: must be above 0.",
        "percdamp=0.0: must be above 0.",
        "drift_ratio=-1.0: must be 0 or more.",
    ):
        assert text in str(caught.value)
