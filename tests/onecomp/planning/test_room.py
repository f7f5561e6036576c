"""A run that cannot fit is refused before anything is written; what nobody knows is not."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from memory_limit import NEEDS_LIMITS, limited_command, memory_group
from tiny_models import sample_text

from onecomp import GPTQ, CalibrationConfig, LocalExecutor, ModelConfig, Runner
from onecomp.errors import InputError
from onecomp.job import QuantizationJob
from onecomp.planning.room import require_room
from onecomp.resources import Resources, WorkerResources
from onecomp.session import Session

MIB = 2**20
GIB = 2**30


class Offering(LocalExecutor):
    """Threads of this process that have what a test says they have, or nobody knows."""

    def __init__(self, offered: Resources | None):
        super().__init__(1)
        self.offered, self.is_started = offered, False

    def resources(self) -> Resources | None:
        return self.offered

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        self.is_started = True
        super().start(make_worker, *arguments)


def offer(host_memory: float | None, **more: object) -> Resources:
    worker = WorkerResources("this process", None, host_memory)
    return Resources((worker,), **{"in_process": True, **more})


@pytest.fixture
def job(tiny_model_dir, text) -> QuantizationJob:
    calibration = CalibrationConfig(str(text), 64, 8, strategy="concat_chunk")
    config = ModelConfig(str(tiny_model_dir("llama")), dtype="float32")
    return QuantizationJob(config, GPTQ(groupsize=32), calibration)


def refusal(session: Session, offered: Resources) -> str:
    """The message; nothing was begun."""
    executor = Offering(offered)
    with pytest.raises(InputError) as caught:
        session.quantize(executor, report_progress=False)
    assert not executor.is_started
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_too_little_memory_is_refused_and_nothing_is_written(job, tmp_path):
    session = Session.open(job, tmp_path / "run", output=tmp_path / "out")
    message = refusal(session, offer(100 * MIB))
    assert message.startswith(f"{job.model_config.source.model_id}: needs 0.6 GiB of memory, the ")
    assert "the smallest host (this process) has 0.1 GiB; use " in message
    assert list(tmp_path.iterdir()) == []


def test_the_python_api_refuses_too(job, tmp_path):
    runner = Runner(
        job.model_config, job.quantizer, calibration_config=job.calibration,
        executor=Offering(offer(100 * MIB)), run_dir=tmp_path / "run", report_progress=False,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"needs 0\.6 GiB of memory"):
        runner.run()
    assert list(tmp_path.iterdir()) == []


def test_on_ray_memory_is_of_each_worker(job, tmp_path):
    session = Session.open(job, tmp_path / "run")
    offered = offer(100 * MIB, in_process=False, num_workers=2, object_store=1)
    message = refusal(session, offered)
    assert "of host memory per worker, the smallest host " in message
    assert " and needs 0.0 GiB of object store, the smallest node has 0.0 GiB" in message
    assert "--num-workers" not in message  # more workers would share the same memory


def test_a_run_that_fits_says_what_was_compared(job, tmp_path, caplog):
    session = Session.open(job, tmp_path / "run")
    executor = Offering(offer(10 * GIB))
    with caplog.at_level(logging.INFO):
        session.quantize(executor, report_progress=False)
    executor.stop()
    [line] = [r.message for r in caplog.records if r.name == "onecomp.planning.room"]
    assert line.startswith("needs 57")
    assert " MiB of 10.0 GiB memory, " in line
    assert line.endswith(" GiB run directory")


def test_what_is_not_known_stops_nobody(job, tmp_path, caplog):
    session = Session.open(job, tmp_path / "run")
    executor = Offering(None)
    with caplog.at_level(logging.INFO):
        session.quantize(executor, report_progress=False)
    executor.stop()
    assert [r for r in caplog.records if r.name == "onecomp.planning.room"] == []


def test_a_full_object_store_is_slow_but_no_obstacle(job, tmp_path, caplog):
    session = Session.open(job, tmp_path / "run")
    offered = offer(10 * GIB, in_process=False, object_store=10, spill_disk=GIB)
    check(session, offered)
    [warning] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("the object store of the smallest node holds 10 B of the ")


def check(session: Session, offered: Resources) -> None:
    require_room(
        session.job, session.skeleton, session.samples, Offering(offered), session.run.path,
        has_checkpoint=False, goes_on=not session.begin_anew,
    )  # fmt: skip


def test_a_model_that_cannot_be_planned_is_quantized_all_the_same(job, tmp_path, caplog):
    """As one whose blocks compute something else for every input."""
    session = Session.open(job, tmp_path / "run")
    kept = session.skeleton.blocks[0].forward
    session.skeleton.blocks[0].forward = undecided
    try:
        check(session, offer(1))
    finally:
        session.skeleton.blocks[0].forward = kept
    [warning] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("not compared with the memory and disk that there are: ")
    assert "cannot be run without weights" in warning


def undecided(hidden: torch.Tensor, **_: object) -> torch.Tensor:
    return hidden + 1 if hidden.sum() > 0 else hidden


def test_what_a_resumed_run_has_written_is_not_needed_again(job, tmp_path, monkeypatch):
    monkeypatch.setattr("onecomp.planning.room.free_disk", lambda path: 0)
    session = Session.open(job, tmp_path / "run")
    assert "of run directory, the smallest disk has 0.0 GiB" in refusal(session, offer(GIB))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "calibration.safetensors").write_bytes(bytes(MIB))
    assert "the smallest disk has 0.0 GiB" in refusal(session, offer(GIB))  # it is set aside
    check(replace(session, begin_anew=False), offer(GIB))


def test_a_device_that_the_job_does_not_use_is_not_compared(tiny_model_dir, job, tmp_path):
    worker = WorkerResources("this process", 1, 10 * GIB)
    session = Session.open(job, tmp_path / "run")
    offered = Resources((worker,), in_process=True, has_gpus=True)
    assert "needs 0.6 GiB of GPU memory per worker" in refusal(session, offered)
    config = ModelConfig(str(tiny_model_dir("llama")), dtype="float32", device="cpu")
    on_cpu = QuantizationJob(config, job.quantizer, job.calibration)
    check(Session.open(on_cpu, tmp_path / "run"), offered)


@pytest.mark.parametrize("family", ["gemma3", "opt", "phi3", "qwen3"])
def test_families_are_planned_as_they_are_quantized(family, tiny_model_dir, job, tmp_path, caplog):
    config = ModelConfig(str(tiny_model_dir(family)), dtype="float32")
    mine = QuantizationJob(config, GPTQ(groupsize=32), job.calibration)
    session = Session.open(mine, tmp_path / "run")
    parameters = dict(session.skeleton.model.named_parameters())
    check(session, offer(10 * GIB))
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    after = dict(session.skeleton.model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


@NEEDS_LIMITS
def test_the_command_line_refuses_within_a_containers_limit(tiny_model_dir, tmp_path):
    """128 samples of 480 tokens wait in front of the last group of a block."""
    model = tiny_model_dir("llama", hidden_size=256, intermediate_size=1024)
    (tmp_path / "text.txt").write_text(sample_text(20000))
    options = ["--calibration-dataset", tmp_path / "text.txt", "--num-calibration-samples", 128]
    command = [
        *[sys.executable, "-m", "onecomp", "quantize", model, "--output", tmp_path / "out"],
        *[*options, "--max-length", 480, "--num-workers", 0],
    ]
    with memory_group(900 * MIB) as group:
        ran = subprocess.run(
            [*limited_command(group), *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    [said] = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    found = re.search(
        r"needs (.*) GiB of memory, the smallest host \(this process\) has (.*) GiB;", said
    )
    assert found is not None, said
    needed, available = map(float, found.groups())
    assert available < 1.2 < needed
    assert "; use --num-calibration-samples " in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
