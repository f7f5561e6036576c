"""The documented API, written out: names, parameters, their order and defaults stay as they are.

What is documented may be called by position and by keyword. Additions come behind it and are
keyword-only, so that no documented call changes its meaning.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from documented import (
    QUANTIZER,
    REQUIRED,
    Parameters,
    default_of,
    differences,
    field_differences,
)
from tiny_models import tiny_model
from torch import nn

import onecomp
from onecomp import quantizer as methods
from onecomp.quantizer import gptq, rtn
from onecomp.runner import Runner

RESULT: Parameters = {
    "dequantized_weight": None,
    "quantization_time": None,
    "output_squared_error": None,
    "mean_output_squared_error": None,
    "weight_squared_error": None,
    "mean_weight_squared_error": None,
    "relative_output_squared_error": None,
    "relative_weight_squared_error": None,
}
DATACLASSES: dict[str, tuple[type, Parameters]] = {
    "Quantizer": (onecomp.Quantizer, QUANTIZER),
    "ResultLoader": (
        onecomp.ResultLoader,
        {**QUANTIZER, "target_layer_types": (), "results_file": None, "weights_only": False},
    ),
    "GPTQ": (
        onecomp.GPTQ,
        {
            **QUANTIZER,
            "flag_calibration": True,
            "flag_hessian": True,
            "blocksize": 128,
            "percdamp": 0.01,
            "wbits": 4,
            "groupsize": -1,
            "actorder": False,
            "mse": False,
            "sym": True,
            "q_grid": 600,
            "q_norm": 2.4,
            "mlp_wbits": None,
            "mlp_groupsize": None,
            "module_wbits": None,
        },
    ),
    "RTN": (
        onecomp.RTN,
        {
            **QUANTIZER,
            "wbits": 4,
            "groupsize": -1,
            "sym": False,
            "mse": False,
            "norm": 2.4,
            "grid": 100,
        },
    ),
    "QuantizationResult": (onecomp.QuantizationResult, RESULT),
    "GPTQResult": (
        onecomp.GPTQResult,
        {
            **RESULT,
            "wbits": None,
            "groupsize": None,
            "actorder": None,
            "sym": None,
            "qweight": None,
            "scales": None,
            "qzeros": None,
            "perm": None,
        },
    ),
    "RTNResult": (
        onecomp.RTNResult,
        {
            **RESULT,
            "wbits": None,
            "groupsize": None,
            "sym": None,
            "quantized_weight": None,
            "scale": None,
            "zero": None,
        },
    ),
    "QEPConfig": (
        onecomp.QEPConfig,
        {
            "general": False,
            "percdamp": 0.01,
            "perccorr": 0.5,
            "device": None,
            "exclude_layer_keywords": ["mlp.down_proj"],
        },
    ),
    "ModelConfig": (
        onecomp.ModelConfig,
        {"model_id": None, "path": None, "dtype": "float16", "device": "auto"},
    ),
    "CalibrationConfig": (
        onecomp.CalibrationConfig,
        {
            "calibration_dataset": "c4",
            "max_length": 2048,
            "num_calibration_samples": 512,
            "strategy": "drop_rand",
            "seed": 0,
            "batch_size": None,
            "num_layers_per_group": 7,
            "text_key": "text",
            "use_quality_filter": False,
            "max_documents": 10000,
        },
    ),
}
ADDITIONS: dict[type, Parameters] = {
    onecomp.GPTQ: {"static_groups": False, "weighted_mse": False},
    onecomp.ModelConfig: {"trust_remote_code": False},
}
"""Fields of our own whose default keeps a documented call what it is, or safe."""
METHODS = ("ARB", "CQ", "DBF", "JointQ", "Onebit", "QBB", "QUIP")
"""Their settings are in ``test_documented_methods``."""
NAMES = {
    *DATACLASSES,
    *METHODS,
    *(f"{method}Result" for method in METHODS),
    "AutoBitQuantizer",
    "DoubleBinaryLinear",
    "OnebitLinear",
    "VRAMBitwidthEstimation",
    "estimate_target_bitwidth",
    "estimate_wbits_from_vram",
    "BlockWisePTQ",
    "GlobalPTQ",
    "GlobalPTQDistributed",
    "PostProcessLoraSFT",
    "PostProcessLoraTeacherOnlySFT",
    "PostProcessLoraTeacherSFT",
    "PostQuantizationProcess",
    "Runner",
    "setup_logger",
    "load_quantized_model",
    "QuantizedModelLoader",
    "calculate_perplexity",
    "Executor",
    "LocalExecutor",
    "default_executor",
    "OneCompError",
    "ConfigError",
    "InputError",
    "LayerError",
    "WorkerError",
}
"""What ``from onecomp import`` offers."""

QUANTIZER_METHODS: dict[str, Parameters] = {
    "setup": {"model": REQUIRED},
    "quantize": {"module": REQUIRED, "input": REQUIRED, "output": REQUIRED},
    "quantize_layer": {"module": REQUIRED, "input": None, "hessian": None},
    "quantize_with_qep": {
        "module": REQUIRED,
        "quant_input_activation": REQUIRED,
        "original_input_activation": None,
        "percdamp": 0.01,
        "perccorr": 0.5,
        "hessian": None,
        "delta_hatX": None,
    },
    "execute_post_processing": {},
    "save_results": {"filepath": REQUIRED},
    "load_results": {"filepath": REQUIRED, "weights_only": False},
    "apply_results_to_model": {"model": REQUIRED},
    "get_quant_config": {},
    "create_inference_layer": {"result": REQUIRED, "linear_module": REQUIRED},
    "finalize_quant_config_for_save": {
        "quant_config": REQUIRED,
        "quantized_layer_names": REQUIRED,
        "num_hidden_layers": REQUIRED,
    },
    "validate_params": {},
}
GPTQ_METHODS: dict[str, Parameters] = {
    "resolve_bits": {
        "layer_name": REQUIRED,
        "default_bits": REQUIRED,
        "mlp_bits": None,
        "module_bits": None,
    },
    "resolve_groupsize": {
        "layer_name": REQUIRED,
        "default_groupsize": REQUIRED,
        "mlp_groupsize": None,
    },
}
RESULT_METHODS: dict[str, Parameters] = {
    "compute_dequantized_weight": {"device": None},
    "get_statistics": {},
}
RUNNER_METHODS: dict[str, Parameters] = {
    "check": {},
    "run": {},
    "calculate_perplexity": {
        "original_model": False,
        "dequantized_model": False,
        "quantized_model": True,
        "dataset_name": "Salesforce/wikitext",
        "dataset_config": "wikitext-2-raw-v1",
        "split": "test",
        "max_samples": None,
        "max_length": 2048,
        "stride": 2048,
        "quantizer": None,
    },
    "save_quantized_model": {
        "save_directory": REQUIRED,
        "pack_weights": True,
        "save_format": "auto",
    },
    "save_dequantized_model": {"path": REQUIRED, "quantizer": None},
    "save_quantization_results": {"path": REQUIRED, "quantizer": None},
    "save_quantization_statistics": {"path": REQUIRED, "quantizer": None},
    "print_quantization_results": {"quantizer": None},
    "create_quantized_model": {"pack_weights": True, "quantizer": None, "use_gemlite": None},
    "update_model_weights": {"model": REQUIRED, "quantizer": None},
    "prepare_calibration_dataset": {"device": REQUIRED, "model": None},
}
MODEL_CONFIG_METHODS: dict[str, Parameters] = {
    "get_model_id_or_path": {},
    "get_device": {},
    "load_config": {},
    "load_model": {"device_map": None},
    "load_tokenizer": {},
    "has_additional_data": {},
}
FUNCTIONS: dict[str, Parameters] = {
    "setup_logger": {"level": "INFO", "basic": "WARNING", "filemode": "w", "logfile": None},
    "load_quantized_model": {"directory": REQUIRED},
    "calculate_perplexity": {
        "model": None,
        "tokenizer": None,
        "model_config": None,
        "dataset_name": "Salesforce/wikitext",
        "dataset_config": "wikitext-2-raw-v1",
        "split": "test",
        "max_samples": None,
        "max_length": 2048,
        "stride": 2048,
    },
}
KEYWORDS: dict[str, Parameters] = {
    "load_quantized_model": {
        "torch_dtype": None,
        "device_map": "auto",
        "trust_remote_code": False,
        "local_files_only": False,
    },
}
"""Documented parameters that are keyword-only."""
RUNNER: Parameters = {
    "model_config": None,
    "quantizer": None,
    "calibration_config": None,
    "qep": False,
    "qep_config": None,
    "report_progress": True,
}
"""Arguments of the Runner, all of which the documented examples give by keyword."""

STATISTICS = {
    "quantization_time",
    "output_squared_error",
    "mean_output_squared_error",
    "weight_squared_error",
    "mean_weight_squared_error",
    "relative_output_squared_error",
    "relative_weight_squared_error",
}

CALLS: dict[str, tuple[Callable[..., object], Parameters]] = {
    **{
        f"{owner.__name__}.{name}": (getattr(owner, name), parameters)
        for owner, documented in (
            (onecomp.Quantizer, QUANTIZER_METHODS),
            (onecomp.ResultLoader, QUANTIZER_METHODS),
            (onecomp.GPTQ, QUANTIZER_METHODS | GPTQ_METHODS),
            (onecomp.RTN, QUANTIZER_METHODS),
            (onecomp.QuantizationResult, RESULT_METHODS),
            (onecomp.GPTQResult, RESULT_METHODS),
            (onecomp.RTNResult, RESULT_METHODS),
            (Runner, RUNNER_METHODS),
            (onecomp.ModelConfig, MODEL_CONFIG_METHODS),
        )
        for name, parameters in documented.items()
    },
    **{name: (getattr(onecomp, name), parameters) for name, parameters in FUNCTIONS.items()},
}


@pytest.mark.parametrize("name", DATACLASSES)
def test_fields_come_in_the_documented_order_with_the_documented_defaults(name):
    cls, documented = DATACLASSES[name]
    assert field_differences(cls, documented) == []


@pytest.mark.parametrize("name", DATACLASSES)
def test_additional_fields_are_optional(name):
    cls, _ = DATACLASSES[name]
    assert [f.name for f in fields(cls) if f.kw_only and default_of(f) is REQUIRED] == []


@pytest.mark.parametrize("cls", ADDITIONS)
def test_additional_fields_have_defaults_that_change_nothing(cls):
    defaults = {field.name: default_of(field) for field in fields(cls) if field.kw_only}
    assert {name: defaults[name] for name in ADDITIONS[cls]} == ADDITIONS[cls]


@pytest.mark.parametrize("name", CALLS)
def test_parameters_come_in_the_documented_order_with_the_documented_defaults(name):
    assert differences(*CALLS[name]) == []


@pytest.mark.parametrize("name", CALLS)
def test_additional_parameters_are_optional(name):
    call, _ = CALLS[name]
    keywords = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in keywords if p.default is REQUIRED] == []


@pytest.mark.parametrize("name", KEYWORDS)
def test_documented_keywords_have_the_documented_defaults(name):
    parameters = inspect.signature(getattr(onecomp, name)).parameters
    assert {key: parameters[key].default for key in KEYWORDS[name]} == KEYWORDS[name]


def test_the_runner_takes_the_documented_keywords():
    parameters = inspect.signature(Runner).parameters
    assert {key: parameters[key].default for key in RUNNER} == RUNNER


@pytest.mark.parametrize("name", ["apply_results_to_model", "create_inference_layer"])
@pytest.mark.parametrize("cls", [onecomp.Quantizer, onecomp.GPTQ, onecomp.RTN])
def test_options_of_a_method_are_handed_on_as_keywords(cls, name):
    kinds = {p.kind for p in inspect.signature(getattr(cls, name)).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD in kinds


@pytest.mark.parametrize("name", GPTQ_METHODS)
def test_resolving_needs_no_instance(name):
    assert isinstance(inspect.getattr_static(onecomp.GPTQ, name), staticmethod)


def test_names_are_where_the_examples_import_them():
    assert methods.GPTQ is gptq.GPTQ is onecomp.GPTQ
    assert methods.RTN is rtn.RTN is onecomp.RTN
    assert methods.ResultLoader is onecomp.ResultLoader
    assert set(onecomp.__all__) == NAMES
    assert all(getattr(onecomp, name).__module__.startswith("onecomp.") for name in NAMES)


def test_all_quantizers_and_results_share_their_bases():
    for cls in (onecomp.GPTQ, onecomp.RTN, onecomp.ResultLoader):
        assert issubclass(cls, onecomp.Quantizer)
    for cls in (onecomp.GPTQResult, onecomp.RTNResult):
        assert issubclass(cls, onecomp.QuantizationResult)
    assert inspect.isabstract(onecomp.Quantizer)


def test_statistics_are_the_seven_documented_numbers():
    assert onecomp.GPTQResult().get_statistics().keys() == STATISTICS


def test_a_runner_without_results_says_what_to_do():
    runner = Runner(onecomp.ModelConfig("some-model"), onecomp.GPTQ())
    with pytest.raises(ValueError, match=r"Call run\(\) first"):
        runner.save_quantized_model("anywhere")


def test_the_documented_ways_of_selecting_layers():
    model = tiny_model("llama", num_layers=1)
    attention = "model.layers.0.self_attn"
    chosen = {
        "only": onecomp.GPTQ(include_layer_names=[f"{attention}.q_proj"]),
        "keywords": onecomp.GPTQ(include_layer_keywords=["q_proj", "k_proj", "v_proj"]),
        "without": onecomp.GPTQ(exclude_layer_keywords=["down_proj", "gate_proj", "self_attn"]),
        "first": onecomp.GPTQ(num_layers=1),
        "loader": onecomp.ResultLoader(),
    }
    for quantizer in chosen.values():
        quantizer.setup(model)
    found = {key: list(quantizer.module_to_name.values()) for key, quantizer in chosen.items()}
    assert found == {
        "only": [f"{attention}.q_proj"],
        "keywords": [f"{attention}.{letter}_proj" for letter in "qkv"],
        "without": ["model.layers.0.mlp.up_proj"],
        "first": [f"{attention}.q_proj"],
        "loader": [],
    }


def test_a_new_method_needs_quantize_layer_only(tmp_path: Path):
    class Halves(onecomp.Quantizer):
        def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
            return (module.weight * 2).round() / 2

    layer, quantizer = nn.Linear(4, 3, bias=False), Halves(calc_quant_error=True)
    quantizer.setup(layer)
    layer.register_forward_hook(quantizer.quantize)
    layer(torch.ones(2, 4))
    [result] = quantizer.results.values()
    assert torch.equal(result.compute_dequantized_weight().float() * 2 % 1, torch.zeros(3, 4))
    assert result.relative_output_squared_error is not None
    with pytest.raises(NotImplementedError):
        quantizer.get_quant_config()
    with pytest.raises(NotImplementedError):
        quantizer.create_inference_layer(result, layer)
    quantizer.save_results(tmp_path / "results.pt")
    loaded = onecomp.ResultLoader(results_file=str(tmp_path / "results.pt")).results
    assert loaded.keys() == quantizer.results.keys()


@pytest.mark.parametrize(
    ("changed", "is_compatible"),
    [
        (lambda model, size=1, *, more=0: None, True),
        (lambda model=None, size=1: None, True),
        (lambda model, size=2: None, False),
        (lambda model, size=1, more=0: None, False),
        (lambda size=1, model=None: None, False),
        (lambda module, size=1: None, False),
        (lambda model, *, size=1: None, False),
    ],
)
def test_the_comparison_tells_compatible_from_changed(changed, is_compatible):
    assert (differences(changed, {"model": REQUIRED, "size": 1}) == []) is is_compatible
