"""What the workers of a gang are told; what they leave in its directory."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from onecomp.export.checkpoint import write_shard
from onecomp.models import ModelConfig
from onecomp.post_process.deepspeed_config import EngineConfig
from onecomp.post_process.distillation import LossWeights
from onecomp.post_process.samples import TrainingSamples
from onecomp.post_process.student import StudentRates
from onecomp.post_process.training import Course

SAMPLES_FILE = "samples.safetensors"
TEACHER_FOLDER = "teacher"
TRAINED_FILE = "trained.safetensors"
PROGRESS_FILE = "progress.json"

AUTO, STREAMED, SHARDED = "auto", "streamed", "sharded"
TEACHERS = (AUTO, STREAMED, SHARDED)
NO, EPOCH, STEPS = "no", "epoch", "steps"
SAVE_STRATEGIES = (NO, EPOCH, STEPS)


@dataclass(frozen=True, kw_only=True)
class GangJob:
    """A training of one checkpoint; the same for all workers."""

    directory: Path
    """Every node sees it: samples, the teacher's answers, the result."""
    checkpoint: Path
    """The quantized model."""
    model_config: ModelConfig
    """The original one."""
    course: Course
    """Samples, epochs and schedule."""
    weights: LossWeights
    rates: StudentRates
    uses_bf16: bool
    gradient_checkpointing: bool
    engine: EngineConfig
    teacher: str
    """One of ``STREAMED`` and ``SHARDED``."""
    save_strategy: str
    save_steps: int


def write_samples(directory: Path, samples: TrainingSamples) -> None:
    """Leave the tokens where every worker finds them."""
    tensors = {"train": samples.train, "held_out": samples.held_out}
    write_shard(directory, SAMPLES_FILE, tensors)


def read_samples(directory: Path) -> TrainingSamples:
    """The tokens of :func:`write_samples`."""
    return TrainingSamples(**load_file(directory / SAMPLES_FILE))
