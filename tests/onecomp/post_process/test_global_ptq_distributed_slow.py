"""Gangs in full: every stage and form of the teacher, a killed worker, NaN losses."""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
import torch
from gang_subjects import WHOLE_CONFIG, Subject, make_subject, same_curve, train_here
from torch import Tensor, distributed, nn

from cluster.train_gang import GangPlan, Member, run_gang
from onecomp.post_process.base import PATCHES, records_of
from onecomp.post_process.deepspeed_config import EngineConfig, StepSettings, engine_config
from onecomp.post_process.deepspeed_engine import DeepSpeedEngine, partition, start_deepspeed
from onecomp.post_process.engine import Engine, LocalEngine, ParameterGroup
from onecomp.post_process.gang_result import read_progress
from onecomp.post_process.training import Course, Progress, Samples, Task, Training, share
from onecomp.quantizer import DBF, GPTQ, Onebit

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_executor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def stage(number: int) -> dict:
    return {"zero_optimization": {**WHOLE_CONFIG["zero_optimization"], "stage": number}}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_workers_train_as_one_under_every_stage(subject: Subject, number, tmp_path):
    here = train_here(subject, tmp_path / "teacher")
    process = subject.process(output_dir=str(tmp_path / "out"), deepspeed_config=stage(number))
    process.run(subject.load(), subject.model_config)
    same_curve(tmp_path / "out" / "training-0001", here)


def test_one_worker_accumulates_to_the_same(subject: Subject, tmp_path):
    here = train_here(subject, tmp_path / "teacher")
    process = subject.process(
        output_dir=str(tmp_path / "out"),
        deepspeed_config=WHOLE_CONFIG,
        num_workers=1,
        gradient_accumulation_steps=2,
    )
    model = subject.load()
    process.run(model, subject.model_config)
    same_curve(tmp_path / "out" / "training-0001", here)
    [record] = records_of(model)
    assert record["details"]["weight_bytes_per_worker"] >= here.held_bytes


@pytest.mark.parametrize("quantizer", [DBF(), Onebit()])
def test_layers_of_signs_are_sharded_and_trained(
    quantizer, tiny_model_dir, text, tmp_path_factory, tmp_path
):
    root = tmp_path_factory.mktemp("signs")
    subject = make_subject(tiny_model_dir(), text, root, quantizer)
    here = train_here(subject, tmp_path / "teacher")
    process = subject.process(output_dir=str(tmp_path / "out"), deepspeed_config=WHOLE_CONFIG)
    model = subject.load()
    process.run(model, subject.model_config)
    same_curve(tmp_path / "out" / "training-0001", here)
    [record] = records_of(model)
    assert record["details"]["weight_bytes_per_worker"] < 0.6 * here.held_bytes


@pytest.mark.parametrize("teacher", ["streamed", "sharded"])
def test_bfloat16_and_both_forms_of_the_teacher_lower_the_loss(subject: Subject, teacher):
    model = subject.load()
    shipped = Path(__file__).parents[3] / "deploy" / "deepspeed" / "zero3.json"
    process = subject.process(
        bf16=True, teacher=teacher, deepspeed_config=str(shipped), w_ntp=0.1, epochs=1
    )
    process.run(model, subject.model_config)
    [record] = records_of(model)
    assert record["executed"]
    assert record["held_out_after"] < record["held_out_before"]


def test_a_checkpoint_is_improved_without_a_live_model(subject: Subject, tmp_path, caplog):
    process = subject.process(deepspeed_config=WHOLE_CONFIG)
    outcome = process.improve(subject.checkpoint, tmp_path, subject.model_config)
    assert outcome.executed
    patches = sorted(path.name for path in (tmp_path / PATCHES).iterdir())
    assert patches == ["block-00000.safetensors", "block-00001.safetensors"]
    with caplog.at_level(logging.INFO):
        again = process.improve(subject.checkpoint, tmp_path, subject.model_config)
    assert again.held_out_after == outcome.held_out_after
    assert "step" not in caplog.text


# A killed worker


def train_workers() -> list[psutil.Process]:
    """Processes of the gang's ranks below this one, by the name that Ray gives them."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if "RayTrainWorker" in " ".join(p.cmdline()[:1])]


@contextmanager
def killing_after_a_checkpoint(work: Path) -> Iterator[list[int]]:
    """Kill a rank in the epoch after the first checkpoint that counts."""
    killed: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        snapshot = work / "ray-train" / "checkpoint_manager_snapshot.json"
        while not is_over.wait(0.05):
            if snapshot.exists() and "checkpoint_" in snapshot.read_text():
                time.sleep(0.3)
                victim = train_workers()[-1]
                victim.kill()
                killed.append(victim.pid)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        is_over.set()
        watcher.join()


@pytest.mark.parametrize("number", [2, 3])
def test_a_killed_worker_is_replaced_and_the_result_is_that_of_an_undisturbed_run(
    number, tiny_model_dir, text, tmp_path_factory, tmp_path, caplog
):
    sizes = {"num_calibration_samples": 72, "max_length": 32}
    root = tmp_path_factory.mktemp("killed")
    quantizer = GPTQ(wbits=3, groupsize=32, sym=False)
    subject = make_subject(tiny_model_dir(), text, root, quantizer, **sizes)
    settings = {"deepspeed_config": stage(number), "epochs": 4}
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    expected = subject.load()
    subject.process(output_dir=str(quiet), **settings).run(expected, subject.model_config)
    model = subject.load()
    with (
        caplog.at_level(logging.INFO),
        killing_after_a_checkpoint(killed / "training-0001") as pids,
    ):
        subject.process(output_dir=str(killed), **settings).run(model, subject.model_config)
    assert len(pids) == 1
    assert "resumed behind epoch" in caplog.text
    curves = [read_progress(place / "training-0001") for place in (quiet, killed)]
    assert curves[0] == curves[1]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


# Losses and gradients that are no numbers: the engine alone, on a model of two layers

SIZE, NUM_SAMPLES = 6, 40


class Codes(nn.Module):
    """Integers that stay, and scales that are trained; an odd number, which needs padding."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 8, (SIZE + 1, SIZE + 1), dtype=torch.uint8, generator=generator)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.rand(SIZE + 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.codes.float() - 4) * self.scale[:, None]).T


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Codes(0), Codes(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def trained(self) -> dict[str, nn.Parameter]:
        return {"first": self.first.scale, "second": self.second.scale}


def pair_task(model: nn.Module, engine: Engine, spoiled: Mapping[int, str]) -> Task:
    inputs = torch.randn(NUM_SAMPLES + 2, SIZE + 1, generator=torch.Generator().manual_seed(5))

    def loss(numbers: Samples) -> Tensor:
        value = (model(inputs[numbers]) - inputs[numbers]).square().mean()
        kinds = {spoiled.get(number) for number in numbers}
        if "loss" in kinds:
            return value * torch.nan
        # The square root has an infinite slope at 0, which is multiplied by 0: no number.
        return value + (value * 0).sqrt() if "gradient" in kinds else value

    def held_out() -> tuple[float, int]:
        mine = share(2, engine)
        with torch.no_grad():
            return sum(float(loss([NUM_SAMPLES + number])) for number in mine), len(mine)

    return Task(loss=loss, held_out=held_out)


def pair_training(engine: Engine, model: nn.Module, accumulation: int, spoiled) -> Progress:
    course = Course(num_samples=NUM_SAMPLES, epochs=3, accumulation=accumulation)
    return Training(engine, course, pair_task(model, engine, spoiled)).run()


def pair_loop(argument: tuple[EngineConfig, Mapping[int, str]], member: Member) -> dict:
    config, spoiled = argument
    start_deepspeed(torch.device("cpu"))
    model = Pair()
    partition(model, config)
    groups = [ParameterGroup(tuple(model.trained().values()), 0.05)]
    engine = DeepSpeedEngine(model, groups, model.trained(), config)
    progress = pair_training(engine, engine.model, 4 // member.world_size, spoiled)
    state = engine.state()
    engine.restore({name: values + 1 for name, values in state.items()})
    shifted = engine.state()
    totals = engine.total([float(member.rank + 1), 0.5])
    whole = float(engine.model(torch.ones(1, SIZE + 1)).sum().detach())
    distributed.barrier()
    return {
        "progress": progress,
        "state": {name: values.tolist() for name, values in state.items()},
        "shift": max(float((shifted[n] - state[n] - 1).abs().max()) for n in state),
        "totals": totals,
        "output": whole,
    }


@pytest.mark.parametrize("number", [1, 2, 3])
def test_steps_without_a_number_are_skipped_as_in_one_process(number, tmp_path):
    """Some samples have no loss, or no gradient, and spoil their steps."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    spoiled = {3: "loss", 6: "gradient", 11: "loss"}
    settings = StepSettings(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        gptq_lr=0.05,
        bf16=False,
    )
    config = engine_config(stage(number), settings)
    plan = GangPlan(
        name="pair",
        folder=tmp_path,
        num_workers=2,
        max_failures=0,
        environment={"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
    )
    found = run_gang(pair_loop, (config, spoiled), plan)

    model = Pair()
    groups = [ParameterGroup(tuple(model.trained().values()), 0.05)]
    engine = LocalEngine(groups, 1.0, model.trained())
    expected = pair_training(engine, model, 4, spoiled)
    progress = found["progress"]
    assert progress.skipped == expected.skipped > 0
    assert progress.num_updates == expected.num_updates > 0
    torch.testing.assert_close(
        torch.tensor(progress.losses),
        torch.tensor(expected.losses),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )
    for name, values in engine.state().items():
        assert found["state"][name] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
    assert found["shift"] < 1e-6
    assert found["totals"] == [3.0, 1.0]
    engine.restore({name: values + 1 for name, values in engine.state().items()})
    whole = float(model(torch.ones(1, SIZE + 1)).sum().detach())
    assert found["output"] == pytest.approx(whole, rel=1e-4)
