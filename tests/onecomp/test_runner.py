"""The Python API on a tiny model."""

import gc
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError, InputError
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.export.verify import verify_checkpoint
from onecomp.models import ModelConfig
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, GPTQResult, Quantizer
from onecomp.quantizer.quant_linear import QuantLinear, dense_layers
from onecomp.runner import Runner
from onecomp.store import RunDirectory

IDS = torch.arange(3, 51)[None]


@pytest.fixture(scope="module")
def model_config(tiny_model_dir) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir("llama")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def calibration(text) -> CalibrationConfig:
    return CalibrationConfig(str(text), 48, 8, strategy="concat_chunk")


def make(model_config, calibration, quantizer: Quantizer, **options: object) -> Runner:
    """A Runner that has run."""
    executor = LocalExecutor(1)
    runner = Runner(
        model_config,
        quantizer,
        calibration_config=calibration,
        report_progress=False,
        executor=executor,
        **options,
    )
    try:
        runner.run()
    finally:
        executor.stop()
    return runner


@pytest.fixture(scope="module")
def runner(model_config, calibration) -> Runner:
    quantizer = GPTQ(wbits=4, groupsize=32, calc_quant_error=True)
    return make(model_config, calibration, quantizer, qep=True, qep_config=QEPConfig())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode(), dense_layers(model, torch.float32):
        return model(input_ids=IDS).logits


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture
def dequantized(runner) -> nn.Module:
    model = runner.model_config.load_model()
    for name, result in runner.quantizer.results.items():
        model.get_submodule(name).weight.data = result.dequantize()
    return model


def test_every_layer_has_a_result_with_its_errors(runner):
    results = runner.quantizer.results
    assert len(results) == 14
    for result in results.values():
        assert isinstance(result, GPTQResult)
        assert 0 < result.relative_weight_squared_error < 0.1
        assert 0 < result.relative_output_squared_error < 0.1


def test_results_are_read_from_the_run_directory_when_asked_for(
    model_config, calibration, tmp_path
):
    quantizer = GPTQ(wbits=4, groupsize=32)
    make(model_config, calibration, quantizer, run_dir=tmp_path / "run")
    first, *_, last = quantizer.results
    expected = quantizer.results[first].dequantize()
    (tmp_path / "run" / "blocks" / "00001.safetensors").unlink()
    assert torch.equal(quantizer.results[first].dequantize(), expected)
    with pytest.raises(InputError, match="cannot be read"):
        _ = quantizer.results[last]


def test_several_methods_run_at_once_each_with_its_own_results(model_config, calibration, tmp_path):
    methods = [GPTQ(groupsize=32), RTN(groupsize=32)]
    runner = make(model_config, calibration, None, quantizers=methods, run_dir=tmp_path / "run")
    for method in methods:
        alone = type(method)(groupsize=32)
        make(model_config, calibration, alone)
        assert list(method.results) == list(alone.results)
        for name, result in alone.results.items():
            assert torch.equal(method.results[name].dequantize(), result.dequantize())
    with pytest.raises(ConfigError, match="say which quantizer is meant: the Runner has GPTQ_4"):
        runner.save_quantized_model(tmp_path / "saved")
    runner.save_quantized_model(tmp_path / "saved", quantizer=methods[1])
    model, _ = load_quantized_model(tmp_path / "saved")
    [name, *_] = methods[1].results
    assert torch.equal(
        model.get_submodule(name).dequantize(), methods[1].results[name].dequantize()
    )
    with pytest.raises(InputError, match=r"results of several methods \(GPTQ_4bit_gs32, RTN_4bit"):
        verify_checkpoint(tmp_path / "saved", RunDirectory(tmp_path / "run"), None)


def test_errors_of_outputs_are_measured_for_rounding_too_where_text_is_read(
    model_config, calibration
):
    blind, seeing = RTN(calc_quant_error=True), RTN(calc_quant_error=True, flag_calibration=True)
    for quantizer in (blind, seeing):
        make(model_config, calibration, quantizer)
    for name, result in seeing.results.items():
        assert 0 < result.relative_output_squared_error < 1
        assert result.output_squared_error > result.mean_output_squared_error > 0
        assert blind.results[name].output_squared_error is None
        assert blind.results[name].weight_squared_error == result.weight_squared_error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"quantizer": GPTQ()}, "quantizer and quantizers are both given"),
        ({"qep": True}, "qep=True lets each method see its own errors"),
    ],
)
def test_several_methods_go_neither_with_one_nor_with_propagation(model_config, options, problem):
    with pytest.raises(ConfigError, match=problem):
        Runner(model_config, quantizers=[GPTQ(), RTN()], **options).check()


def test_results_outlive_a_runner_without_a_run_directory(model_config, calibration):
    quantizer = GPTQ(wbits=4, groupsize=32)
    make(model_config, calibration, quantizer)
    gc.collect()
    [path] = {file.parents[1] for file in quantizer.results._files.values()}
    assert len([result.dequantize() for result in quantizer.results.values()]) == 14
    quantizer.results = {}
    gc.collect()
    assert not path.exists()


def test_a_run_directory_is_continued_and_its_results_are_the_same(
    model_config, calibration, tmp_path
):
    first = make(model_config, calibration, GPTQ(groupsize=32), run_dir=tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "blocks").iterdir()}
    second = make(model_config, calibration, GPTQ(groupsize=32), run_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for name, result in first.quantizer.results.items():
        assert torch.equal(second.quantizer.results[name].qweight, result.qweight)
    with pytest.raises(
        InputError, match=r"belongs to another configuration \(.*quantizer.wbits: 4 -> 3\)"
    ):
        make(model_config, calibration, GPTQ(wbits=3, groupsize=32, name="n"), run_dir=tmp_path)


def test_the_saved_model_loads_with_the_same_logits(runner, dequantized, tmp_path):
    path = runner.save_quantized_model(tmp_path / "packed")
    loaded, tokenizer = load_quantized_model(path)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QuantLinear)
    assert_close(loaded, dequantized)
    assert tokenizer("ab").input_ids == [97 - 33, 98 - 33] or len(tokenizer("ab").input_ids) == 2
    with pytest.raises(InputError, match="already holds a checkpoint"):
        runner.save_quantized_model(path)
    with pytest.raises(ConfigError, match="save_format='vllm': must be 'auto'"):
        runner.save_quantized_model(tmp_path / "other", save_format="vllm")


def test_the_dequantized_model_loads_anywhere(runner, dequantized, tmp_path):
    path = runner.save_dequantized_model(tmp_path / "dense")
    config = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in config
    loaded = ModelConfig(path=str(path), dtype="float32", device="cpu").load_model()
    assert_close(loaded, dequantized)


def test_results_and_statistics_are_saved(runner, tmp_path):
    runner.save_quantization_results(tmp_path / "results.pt")
    loaded = GPTQ(groupsize=32).load_results(tmp_path / "results.pt")
    assert list(loaded) == list(runner.quantizer.results)
    for name, result in loaded.items():
        assert torch.equal(result.dequantize(), runner.quantizer.results[name].dequantize())
    runner.save_quantization_statistics(tmp_path / "statistics.json")
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert list(statistics) == list(loaded)
    assert statistics["model.layers.1.mlp.down_proj"]["quantization_time"] > 0
    assert len(statistics["model.layers.1.mlp.down_proj"]) == 7


def test_results_are_logged_with_dashes_for_what_was_not_measured(
    model_config, calibration, caplog
):
    runner = make(model_config, calibration, RTN(groupsize=32, num_layers=1))
    with caplog.at_level("INFO"):
        runner.print_quantization_results()
    assert "model.layers.0.self_attn.q_proj  quantization_time " in caplog.text
    assert "output_squared_error -" in caplog.text


def test_the_live_quantized_model_gives_the_same_logits(runner, dequantized):
    for pack_weights in (True, False):
        model, _ = runner.create_quantized_model(pack_weights=pack_weights)
        assert model.config.quantization_config["bits"] == 4
        assert_close(model, dequantized)
    model = runner.model_config.load_model()
    runner.update_model_weights(model)
    assert_close(model, dequantized)


def test_perplexities_come_as_a_triple(runner, text):
    sizes = {"dataset_name": str(text), "max_length": 64, "stride": 64}
    all_three = runner.calculate_perplexity(original_model=True, dequantized_model=True, **sizes)
    assert all(1 < value < 1e6 for value in all_three)
    assert all_three[1] == pytest.approx(all_three[2], rel=1e-3)
    assert all_three[0] != all_three[1]
    only = runner.calculate_perplexity(original_model=True, quantized_model=False, **sizes)
    assert only == (all_three[0], None, None)


@dataclass
class Rounding(Quantizer):
    """A method without a checkpoint format."""

    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        return (module.weight.data * 8).round() / 8


def test_a_method_without_layers_of_its_own_is_evaluated_dequantized(
    model_config, calibration, text, tmp_path
):
    runner = make(model_config, calibration, Rounding())
    sizes = {"dataset_name": str(text), "max_length": 64, "stride": 64}
    original, dequantized, quantized = runner.calculate_perplexity(**sizes)
    assert original is None
    assert math.isfinite(dequantized)
    assert quantized is None
    with pytest.raises(NotImplementedError, match="Rounding has no checkpoint format"):
        runner.save_quantized_model(tmp_path / "out")
    with pytest.raises(NotImplementedError):
        runner.create_quantized_model()
    assert not (tmp_path / "out").exists()


def test_nothing_can_be_saved_or_measured_before_the_run(model_config, tmp_path, text):
    runner = Runner(model_config, GPTQ())
    for call in (
        lambda: runner.save_quantized_model(tmp_path / "out"),
        lambda: runner.save_dequantized_model(tmp_path / "out"),
        lambda: runner.save_quantization_results(tmp_path / "out"),
        lambda: runner.save_quantization_statistics(tmp_path / "out"),
        runner.print_quantization_results,
        runner.create_quantized_model,
        lambda: runner.calculate_perplexity(dataset_name=str(text)),
    ):
        with pytest.raises(ConfigError, match=r"Call run\(\) first"):
            call()
    assert not (tmp_path / "out").exists()


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        Runner().check()
    assert len(caught.value.problems) == 2
    assert "model_config=None: must be a ModelConfig." in str(caught.value)
    assert "quantizer=None: must be a Quantizer, e.g. GPTQ()." in str(caught.value)
    with pytest.raises(ConfigError, match="qep=True needs a method that uses the Hessian"):
        Runner(ModelConfig("model"), RTN(), qep=True).run()


def test_the_calibration_batch_is_what_the_run_uses(model_config, calibration, tmp_path):
    runner = make(model_config, calibration, GPTQ(groupsize=32, num_layers=1), run_dir=tmp_path)
    batch = runner.prepare_calibration_dataset("cpu")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (8, 48)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].min() == 1
    assert torch.equal(batch["input_ids"], runner._session.run.samples().input_ids)
