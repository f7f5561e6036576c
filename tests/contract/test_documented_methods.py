"""The documented settings of every method beside GPTQ and RTN: names, order and defaults."""

import pytest
from documented import QUANTIZER, Parameters, field_differences

import onecomp
from onecomp import quantizer as methods

OF_HESSIANS: Parameters = {**QUANTIZER, "flag_calibration": True, "flag_hessian": True}
METHODS: dict[str, Parameters] = {
    "DBF": {
        **OF_HESSIANS,
        "target_bits": 1.5,
        "iters": 600,
        "reg": 3e-2,
        "use_balancing": True,
        "balance_iters": 40,
        "balance_alpha": 1.0,
        "balance_mode": "l1",
        "use_adaptive_rho": True,
        "mlp_target_bits": None,
        "module_target_bits": None,
        "bitpack_on_quantize": True,
    },
    "JointQ": {
        **OF_HESSIANS,
        "bits": 4,
        "symmetric": False,
        "group_size": 128,
        "log_level": 0,
        "device": None,
        "regularization_lambda": 0.1,
        "regularization_mode": "diagonal",
        "regularization_gamma": 0.5,
        "lambda_mode": "fixed_lambda",
        "lambda_list": [0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5],
        "incremental_eps_y": 0.03,
        "incremental_eps_w": 0.10,
        "incremental_initial_skip_ew_threshold": 0.3,
        "actorder": False,
        "ils_enabled": False,
        "ils_num_iterations": 10,
        "ils_num_clones": 8,
        "ils_num_channels": None,
        "enable_clip_optimize": True,
        "enable_clip_optimize_ep": False,
        "enable_gptq": True,
        "gptq": None,
    },
    "QUIP": {**OF_HESSIANS, "wbits": 4, "percdamp": 0.01, "incoh_mode": "kron"},
    "CQ": {**OF_HESSIANS, "each_row": True},
    "ARB": {**OF_HESSIANS, "arb_iters": 15, "split_points": 2},
    "QBB": {
        **OF_HESSIANS,
        "wbits": 4,
        "iters_per_basis": 1000,
        "lr": 1e-4,
        "ste_type": "clipped",
        "use_progressive_quantization": False,
        "progressive_bits": 2,
    },
    "Onebit": {
        **OF_HESSIANS,
        "iters": 10,
        "use_importance_scaling": True,
        "use_balancing": True,
        "balance_iters": 40,
        "balance_alpha": 1.0,
    },
    "AutoBitQuantizer": {
        **QUANTIZER,
        "quantizers": [],
        "assignment_strategy": "activation_aware",
        "ratios": None,
        "target_bit": None,
        "target_bit_is_effective": False,
        "calibration_config": None,
        "use_curvature_b": True,
        "save_path": None,
        "auto_dbf": True,
        "dbf_threshold": 2.0,
        "dbf_iters": None,
        "bitpack_on_quantize": True,
        "fused_groups": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
        "enable_fused_groups": True,
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_settings_come_in_the_documented_order_with_the_documented_defaults(name):
    assert field_differences(getattr(onecomp, name), METHODS[name]) == []


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_their_results_are_where_all_are(name):
    cls = getattr(onecomp, name)
    assert getattr(methods, name) is cls
    assert issubclass(cls, onecomp.Quantizer)
    result = getattr(onecomp, f"{name}Result", None)
    if name != "AutoBitQuantizer":
        assert issubclass(result, onecomp.QuantizationResult)
