"""Adapters that several workers train together, on a real Ray Train gang."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from onecomp.errors import ConfigError, InputError
from onecomp.export.live import save_live_model
from onecomp.post_process.base import records_of
from onecomp.post_process.engine import LocalEngine, ParameterGroup
from onecomp.post_process.gang import Gang, GangMember, GangRequest
from onecomp.post_process.lora import gang as gang_module
from onecomp.post_process.lora import gang_worker
from onecomp.post_process.lora import process as process_module
from onecomp.post_process.lora import student as student_module
from onecomp.post_process.lora.adapter import adapter_parameters, adapters_on_trial
from onecomp.post_process.lora.gang import CHECKPOINT_FOLDER, TRAINED_FILE, train_together
from onecomp.post_process.lora.process import PostProcessLoraTeacherOnlySFT
from onecomp.post_process.lora.student import dense_weights_fit
from onecomp.post_process.lora.train import TOKEN_FILE, LoraJob, train_adapter
from onecomp.post_process.training import Progress
from onecomp.quantizer.quant_linear import QuantLinear

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


class ClusterGang(Gang):
    """Workers on two machines, as the driver sees them."""

    num_workers, has_gpus, is_one_machine = 2, False, False

    def __init__(self, work: Callable[[LoraJob], Progress]):
        self.work = work

    def __exit__(self, *_error: object) -> None:
        pass

    def run(self, loop: str, argument: LoraJob, directory: Path) -> dict:
        del loop
        assert argument.directory == directory
        return asdict(self.work(argument))


@pytest.mark.parametrize("fails", [False, True])
def test_workers_meet_in_a_directory_of_their_own(job, quantized, tmp_path, monkeypatch, fails):
    """Beside what the user has there, which stays; theirs is gone afterwards."""
    ours = tmp_path / "adapter" / "training-0002"
    for name in ("training", "training-0001"):
        (tmp_path / "adapter" / name).mkdir(parents=True)
        (tmp_path / "adapter" / name / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "adapter").rglob("*"))
    model = quantized()

    def work(placed: LoraJob) -> Progress:
        assert placed.directory == ours
        assert {path.name for path in ours.iterdir()} == {CHECKPOINT_FOLDER, TOKEN_FILE}
        if fails:
            raise StoppedError
        trained = {name: torch.ones_like(p) for name, p in adapter_parameters(model).items()}
        save_file(trained, ours / TRAINED_FILE)
        return Progress(initial=2.0, best=1.0)

    monkeypatch.setattr(gang_module, "default_gang", lambda _request: ClusterGang(work))
    monkeypatch.chdir(tmp_path)
    layers = {name: model.get_submodule(name) for name in job.targets}
    with adapters_on_trial(model, layers, job.config, job.seed):
        with pytest.raises(StoppedError) if fails else nullcontext():
            assert train_together(job, model, GangRequest(), Path("adapter")).improved
        if not fails:
            assert all(bool((p == 1).all()) for p in adapter_parameters(model).values())
    assert sorted((tmp_path / "adapter").rglob("*")) == before


def test_several_machines_need_a_directory(job, quantized, monkeypatch):
    monkeypatch.setattr(gang_module, "default_gang", lambda _request: ClusterGang(Progress))
    with pytest.raises(ConfigError, match="output_dir=None: the workers are on several machines"):
        train_together(job, quantized(), GangRequest(), None)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("cuda:0", "auto", ("cuda:3", "cuda:3")),
        ("auto", "cuda:1", ("cuda:3", "cuda:3")),
        ("cuda", "cpu", ("cuda:3", "cpu")),
        ("cpu", "cpu", ("cpu", "cpu")),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(job, monkeypatch, student, teacher, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    told = replace(
        job,
        model_config=replace(job.model_config, device=student),
        teaching=replace(job.teaching, teacher=replace(job.teaching.teacher, device=teacher)),
    )
    found = []

    def note(placed: LoraJob, *_args: object) -> Progress:
        found.append((placed.model_config.device, placed.teaching.teacher.device))
        return Progress()

    monkeypatch.setattr(gang_worker, "_train", note)
    gang_worker.train(told, GangMember(0, 1, None, lambda _write: None))
    assert found == [expected]


@pytest.mark.usefixtures("_process_group")
def test_ranks_share_the_memory_of_their_machine(quantized, monkeypatch):
    model, cpu = quantized(), torch.device("cpu")
    dense = sum(
        4 * layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    )

    def fit(share_of: int) -> bool:
        """Whether the weights fit where there is just enough for so many ranks."""
        monkeypatch.setattr(student_module, "free_host_memory", lambda: 2 * dense * share_of)
        return dense_weights_fit(model, torch.float32, cpu)

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fit(1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)  # nothing tells where they are
    assert (fit(3), fit(4)) == (False, True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (fit(1), fit(2)) == (False, True)
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    assert fit(1)  # the variable is of no gang


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
