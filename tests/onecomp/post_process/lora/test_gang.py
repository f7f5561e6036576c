"""Adapters that several workers train together, on a real Ray Train gang."""

import pytest
import torch

from onecomp.errors import ConfigError
from onecomp.post_process.base import records_of
from onecomp.post_process.engine import LocalEngine, ParameterGroup
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.process import PostProcessLoraTeacherOnlySFT

SETTINGS = {
    "max_length": 32,
    "epochs": 2,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lr": 3e-3,
    "cache_teacher_outputs": True,
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_executor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_workers_train_what_one_does(quantized, original, jsonl, tmp_path):
    adapters, entries = [], []
    for num_workers, accumulation in ((None, 4), (2, 2)):
        model = quantized()
        process = PostProcessLoraTeacherOnlySFT(
            data_files=str(jsonl),
            output_dir=str(tmp_path / str(num_workers)),
            gradient_accumulation_steps=accumulation,
            num_workers=num_workers,
            **SETTINGS,
        )
        process.run(model, original)
        entries += records_of(model)
        adapters.append(adapter_parameters(model))
    alone, together = entries
    assert together["executed"]
    assert together["details"]["updates"] == alone["details"]["updates"] == 8
    assert together["held_out_before"] == pytest.approx(alone["held_out_before"], rel=1e-5)
    assert together["held_out_after"] == pytest.approx(alone["held_out_after"], rel=1e-3)
    for name, parameter in adapters[0].items():
        assert torch.allclose(parameter, adapters[1][name], atol=1e-3)
    assert (tmp_path / "2" / "adapter_model.safetensors").exists()


def test_too_few_samples_for_all_workers(quantized, original, jsonl):
    process = PostProcessLoraTeacherOnlySFT(data_files=str(jsonl), num_workers=2, **SETTINGS)
    with pytest.raises(ConfigError, match=r"accumulation 16 x 2 worker\(s\)"):
        process.run(quantized(), original)


def test_an_engine_goes_on_with_its_moments():
    """Three steps at once, and with new objects after the second, have the same bits."""

    def step(engine: LocalEngine, parameter: torch.nn.Parameter, number: int) -> None:
        engine.backward((parameter * (number + 1)).square().sum())
        engine.step(1.0)

    def fresh() -> tuple[LocalEngine, torch.nn.Parameter]:
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        group = ParameterGroup((parameter,), 0.1)
        return LocalEngine([group], 1.0, {"only": parameter}), parameter

    engine, whole = fresh()
    for number in range(3):
        step(engine, whole, number)
    first, parameter = fresh()
    for number in range(2):
        step(first, parameter, number)
    second, parameter = fresh()
    second.restore(first.state())
    second.restore_moments(first.moments())
    step(second, parameter, 2)
    assert torch.equal(parameter, whole)
