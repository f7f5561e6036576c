"""Training adapters: what a step computes, over whatever engine carries it out."""

import math
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from onecomp.errors import ConfigError
from onecomp.models import ModelConfig
from onecomp.post_process.engine import Engine, LocalEngine, ParameterGroup
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.answers import Answer, Answers
from onecomp.post_process.lora.losses import LoraLoss
from onecomp.post_process.lora.student import AdaptedModel, adapted_model
from onecomp.post_process.lora.teaching import Teaching
from onecomp.post_process.lora.tokens import TokenFile
from onecomp.post_process.training import Course, Progress, Samples, Task, Training, share

TOKEN_FILE = "tokens.arrow"
TEACHER_FOLDER = "teacher"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraJob:
    """A training of adapters, apart from the model; the same for all workers."""

    directory: Path
    """Holds the samples, and what is kept of the teacher's answers."""
    model_config: ModelConfig
    """The original model, and the device to compute on."""
    targets: tuple[str, ...]
    """Full names of the layers that get an adapter."""
    config: LoraConfig
    """PEFT's settings, which name the same layers."""
    teaching: Teaching
    loss: LoraLoss
    course: Course
    """Its samples are the first ones of the file; those behind them are held out."""
    lr: float
    weight_decay: float
    max_grad_norm: float
    uses_bf16: bool | None
    seed: int

    def tokens(self) -> TokenFile:
        """All samples."""
        return TokenFile(self.directory / TOKEN_FILE)

    def answers(self, rank: int, world_size: int) -> Answers | None:
        """The teacher's; what is kept of them is written here for this rank's samples."""
        tokens = self.tokens()
        mine = range(rank, len(tokens), world_size)
        return self.teaching.answers(tokens, self.directory / TEACHER_FOLDER, mine)

    def local_engine(self, student: AdaptedModel) -> LocalEngine:
        """AdamW on the adapters, in this process."""
        parameters = adapter_parameters(student.model)
        group = ParameterGroup(tuple(parameters.values()), self.lr, self.weight_decay)
        return LocalEngine([group], self.max_grad_norm, parameters)


def split_samples(process: str, num_samples: int, held_out_ratio: float) -> int:
    """How many samples are trained on; the rest, at least one, is held out.

    Raises:
        ConfigError: Fewer than two samples.
    """
    if num_samples < 2:
        raise ConfigError(
            process,
            [
                f"{num_samples} sample(s): one is held out, so that at least 2 are needed. Give "
                "more text."
            ],
        )
    return num_samples - max(1, int(num_samples * held_out_ratio))


def train_adapter(job: LoraJob, model: PreTrainedModel) -> Progress:
    """Train the adapters of a model in this process; afterwards they are the best found.

    Args:
        job: Samples, losses and settings.
        model: On the CPU, with fresh adapters.
    """
    answers = job.answers(rank=0, world_size=1)
    with adapted_model(model, job.model_config, uses_bf16=job.uses_bf16, seed=job.seed) as student:
        engine = job.local_engine(student)
        return Training(engine, job.course, lora_task(job, student, answers, engine)).run()


def lora_task(job: LoraJob, student: AdaptedModel, answers: Answers | None, engine: Engine) -> Task:
    """Losses by numbers of samples; held-out samples are judged one by one, without padding.

    Args:
        job: Samples and losses.
        student: The model, its adapters the same on every rank.
        answers: The teacher's; None where the loss does not ask it.
        engine: Knows which samples are this rank's.
    """
    tokens, blocks, num_train = job.tokens(), job.teaching.question.blocks, job.course.num_samples

    def loss(numbers: Samples) -> Tensor:
        batch = tokens.batch(numbers).to(student.device)
        answer = Answer() if answers is None else answers.of(numbers, batch)
        return job.loss(student.outputs(batch, blocks), batch, answer)

    def held_out() -> tuple[float, int]:
        mine = share(len(tokens) - num_train, engine)
        with student.judged():
            losses = [float(loss([num_train + number])) for number in mine]
        return math.fsum(losses), len(mine)

    return Task(loss=loss, held_out=held_out)
