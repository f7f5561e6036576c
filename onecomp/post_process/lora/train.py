"""Training adapters: what a step computes, over whatever engine carries it out."""

import math
from dataclasses import dataclass

from torch import Tensor

from onecomp.errors import ConfigError
from onecomp.post_process.engine import Engine, LocalEngine, ParameterGroup
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.answers import Answer, Answers
from onecomp.post_process.lora.losses import LoraLoss
from onecomp.post_process.lora.student import AdaptedModel
from onecomp.post_process.lora.tokens import TokenFile
from onecomp.post_process.training import Course, Progress, Samples, Task, Training, share


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What adapters learn from."""

    tokens: TokenFile
    """Training samples, and behind them the held-out ones."""
    num_train: int
    loss: LoraLoss
    blocks: tuple[int, ...]
    """Blocks whose hidden states the loss compares."""
    answers: Answers | None
    """The teacher's; None where the loss does not ask it."""


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


def train_adapter(
    student: AdaptedModel, material: Material, course: Course, engine: Engine
) -> Progress:
    """Train the adapters of a model; afterwards they are the best that were found.

    Args:
        student: The model, its adapters the same on every rank.
        material: Samples and losses.
        course: How often and how fast.
        engine: Carries out the steps; it trains ``adapter_parameters``.
    """
    return Training(engine, course, lora_task(student, material, engine)).run()


def lora_task(student: AdaptedModel, material: Material, engine: Engine) -> Task:
    """Losses by numbers of samples; held-out samples are judged one by one, without padding."""

    def loss(numbers: Samples) -> Tensor:
        batch = material.tokens.batch(numbers).to(student.device)
        answer = Answer() if material.answers is None else material.answers.of(numbers, batch)
        return material.loss(student.outputs(batch, material.blocks), batch, answer)

    def held_out() -> tuple[float, int]:
        mine = share(len(material.tokens) - material.num_train, engine)
        with student.judged():
            losses = [float(loss([material.num_train + number])) for number in mine]
        return math.fsum(losses), len(mine)

    return Task(loss=loss, held_out=held_out)


def local_engine(
    student: AdaptedModel, *, lr: float, weight_decay: float, max_grad_norm: float
) -> LocalEngine:
    """AdamW on the adapters, in this process.

    Args:
        student: The model.
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        max_grad_norm: Largest norm of all gradients together.
    """
    parameters = adapter_parameters(student.model)
    group = ParameterGroup(tuple(parameters.values()), lr, weight_decay)
    return LocalEngine([group], max_grad_norm, parameters)
