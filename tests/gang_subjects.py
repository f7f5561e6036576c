"""Tiny quantized checkpoints for gangs, and their training in this process to compare with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.executor import LocalExecutor
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.models import ModelConfig
from onecomp.post_process.distillation import LossWeights
from onecomp.post_process.engine import LocalEngine
from onecomp.post_process.gang_job import TRAINED_FILE
from onecomp.post_process.gang_result import read_progress
from onecomp.post_process.gang_student import held_bytes, load_student
from onecomp.post_process.global_ptq import distillation_task
from onecomp.post_process.global_ptq_distributed import GlobalPTQDistributed
from onecomp.post_process.latents import SCALES_ALONE, LatentRates
from onecomp.post_process.samples import training_samples
from onecomp.post_process.schedules import Schedule
from onecomp.post_process.student import Student, StudentRates
from onecomp.post_process.teacher import cache_teacher
from onecomp.post_process.training import Course, Progress, Training
from onecomp.quantizer import Quantizer
from onecomp.runner import Runner

WHOLE_CONFIG = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
"""Shards the smallest parameters, too; otherwise a tiny model has nothing to shard."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A quantized checkpoint, the model that it was made of, and text."""

    checkpoint: Path
    model_config: ModelConfig
    text: CalibrationConfig

    def load(self) -> PreTrainedModel:
        return load_quantized_model(self.checkpoint, device_map=None)[0]

    def process(self, **settings: object) -> GlobalPTQDistributed:
        """Two epochs of float32 steps of two samples, on two workers; teacher as `train_here`."""
        defaults = {
            "calibration_config": self.text,
            "epochs": 2,
            "gptq_lr": 1e-3,
            "dbf_lr": 1e-3,
            "bf16": False,
            "num_workers": 2,
            "teacher": "streamed",
        }
        return GlobalPTQDistributed(**{**defaults, **settings})


@dataclass(frozen=True, eq=False)
class Curve:
    """A training in this process."""

    progress: Progress
    trained: dict[str, Tensor]
    held_bytes: int


def train_here(subject: Subject, directory: Path, latents: LatentRates = SCALES_ALONE) -> Curve:
    """What ``Subject.process`` does, with one worker that accumulates two samples a step."""
    samples = training_samples("test", subject.text, subject.model_config)
    cpu = torch.device("cpu")
    model = load_student(
        subject.checkpoint, subject.model_config, latents, cpu, lambda _module: None
    )
    student = Student(model.model, model.layers, uses_bf16=False)
    course = Course(
        num_samples=len(samples.train),
        epochs=2,
        accumulation=2,
        schedule=Schedule("cosine", 0.1),
        seed=subject.text.seed,
    )
    groups = student.groups(
        StudentRates(codes_scale=1e-3, signs_scale=1e-3, latents=latents),
        course.epochs * course.steps_per_epoch(1),
    )
    engine = LocalEngine(groups, 1.0, student.parameters())
    teacher = cache_teacher(subject.model_config, samples.all, directory, device=cpu)
    task = distillation_task(student, samples, teacher, LossWeights(), engine)
    progress = Training(engine, course, task).run()
    return Curve(progress, engine.state(), held_bytes(model.model))


def same_curve(work: Path, here: Curve, tolerance: float = 1e-4) -> None:
    """Check that a gang's losses, and what it trained, are those of a training in this process."""
    found = read_progress(work)
    expected = here.progress
    for mine, theirs in (
        (found.losses, expected.losses),
        (found.evaluations, expected.evaluations),
    ):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=tolerance)
    assert len(found.losses) == found.num_updates == expected.num_updates
    trained = load_file(work / TRAINED_FILE)
    assert trained.keys() == here.trained.keys()
    for name, values in here.trained.items():
        torch.testing.assert_close(trained[name], values, rtol=1e-2, atol=tolerance)


def make_subject(
    model_dir: Path, text: Path, root: Path, quantizer: Quantizer, **settings: object
) -> Subject:
    """Quantize a model and write it.

    Args:
        model_dir: The model.
        text: A file of words.
        root: New directory.
        quantizer: How.
        settings: Of the text.
    """
    config = ModelConfig(path=str(model_dir), dtype="float32", device="cpu")
    sizes = {"max_length": 48, "num_calibration_samples": 9, **settings}
    words = CalibrationConfig(str(text), strategy="concat_chunk", **sizes)
    runner = Runner(
        model_config=config,
        quantizer=quantizer,
        calibration_config=words,
        run_dir=root / "run",
        executor=LocalExecutor(),
    )
    runner.run()
    model, _ = runner.create_quantized_model()
    save_live_model(model, root / "model", source_dir=config.source.directory)
    return Subject(root / "model", config, words)
