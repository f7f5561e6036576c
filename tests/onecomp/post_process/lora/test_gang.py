"""Adapters that several workers train together, on a real Ray Train gang."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from onecomp.errors import ConfigError, InputError
from onecomp.export.live import save_live_model
from onecomp.post_process.base import records_of
from onecomp.post_process.engine import LocalEngine, ParameterGroup
from onecomp.post_process.gang import GangMember
from onecomp.post_process.lora import gang_worker
from onecomp.post_process.lora import process as process_module
from onecomp.post_process.lora.adapter import adapter_parameters, adapters_on_trial
from onecomp.post_process.lora.gang import CHECKPOINT_FOLDER, TRAINED_FILE
from onecomp.post_process.lora.process import PostProcessLoraTeacherOnlySFT
from onecomp.post_process.lora.train import LoraJob, train_adapter

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


class StoppedError(Exception):
    """The worker was lost."""


@pytest.fixture
def job(quantized, original, jsonl, tmp_path, monkeypatch) -> LoraJob:
    """What the driver would tell its workers, with the checkpoint that they read."""
    jobs = []

    def note(job: LoraJob, model) -> None:
        shutil.copytree(job.directory, tmp_path / "job")
        jobs.append(replace(job, directory=tmp_path / "job"))
        save_live_model(model, tmp_path / "job" / CHECKPOINT_FOLDER)
        raise StoppedError

    monkeypatch.setattr(process_module, "train_adapter", note)
    settings = {**SETTINGS, "gradient_accumulation_steps": 4}
    with pytest.raises(StoppedError):
        PostProcessLoraTeacherOnlySFT(data_files=str(jsonl), **settings).run(quantized(), original)
    return jobs[0]


@pytest.fixture
def _process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_a_gang_that_lost_a_worker_ends_with_the_same_bits(job, quantized, tmp_path):
    def keep(write) -> None:
        write(tmp_path / "kept")

    def keep_and_stop(write) -> None:
        keep(write)
        raise StoppedError

    with pytest.raises(StoppedError):
        gang_worker.train(job, GangMember(0, 1, None, keep_and_stop))
    resumed = gang_worker.train(job, GangMember(0, 1, tmp_path / "kept", keep))
    of_resumed = load_file(job.directory / TRAINED_FILE)
    whole = gang_worker.train(job, GangMember(0, 1, None, lambda _write: None))
    of_whole = load_file(job.directory / TRAINED_FILE)
    assert resumed == whole
    assert whole["epoch"] == 2
    assert whole["best"] < whole["initial"]
    assert all(torch.equal(of_resumed[name], of_whole[name]) for name in of_whole)

    model = quantized()
    layers = {name: model.get_submodule(name) for name in job.targets}
    with adapters_on_trial(model, layers, job.config, job.seed):
        assert train_adapter(job, model).evaluations == whole["evaluations"]
        parameters = adapter_parameters(model)
        assert all(torch.equal(of_whole[name], p) for name, p in parameters.items())


def test_a_node_that_does_not_see_the_samples_is_named(job):
    lost = replace(job, directory=job.directory / "elsewhere")
    with pytest.raises(InputError, match=r"does not exist on node .* Set output_dir"):
        gang_worker.train(lost, GangMember(0, 1, None, lambda _write: None))


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
