"""Training the whole quantized model at once against the original model."""

import math
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError
from onecomp.models import ModelConfig
from onecomp.post_process.base import Outcome, PostQuantizationProcess, record, require_trainable
from onecomp.post_process.distillation import LossWeights, training_loss
from onecomp.post_process.engine import Engine, LocalEngine
from onecomp.post_process.samples import TrainingSamples, training_samples
from onecomp.post_process.student import Student, StudentRates, TrainsDecisions, student_of
from onecomp.post_process.teacher import Teacher, cache_bytes, cache_teacher, require_room
from onecomp.post_process.training import (
    Course,
    Progress,
    Samples,
    Task,
    Training,
    share,
    warmup_then_cosine,
)
from onecomp.quantizer.checks import as_number, positive_problems, ratio_problems, whole_problems
from onecomp.storage import TemporaryPath


@dataclass
class GlobalPTQ(TrainsDecisions, PostQuantizationProcess):
    """Trains scales, and zero points of asymmetric grids, of the whole model in this process.

    Codes and signs are trained on request. They take 16 bytes a weight, and up to 8 more in the
    CPU's memory for the best state; scales take next to nothing.

    The loss is the divergence of the quantized model's next-token distribution from the original
    model's, in nats per token. The state with the lowest loss on held-out samples is kept, rounded
    as the checkpoint stores it; if none is better than the beginning, the model stays as it was.

    The original model is never held beside the student: one block of it at a time tells its most
    probable tokens beforehand, which are kept in temporary files (1.5 kB a token).

    Args:
        name: Name for messages.
        epochs: Passes over the training samples.
        gptq_lr: Learning rate of scales of integer codes, absolute.
        temperature: Divides the logits of both models.
        grad_clip: Largest norm of all gradients together.
        dbf_lr: Learning rate of the scales of signs (DBF, Onebit).
        calibration_config: Text; None for 128 samples of C4. An eighth of it is held out.
        warmup_ratio: Share of all steps in which the learning rate rises.
        min_lr_ratio: Where the cosine ends, as a share of the peak.
        eval_interval: Epochs between evaluations.
        use_gradient_checkpointing: Compute blocks again on the way back instead of keeping what
            is inside them.
        early_stopping_patience: Evaluations without gain after which training ends; 0: never.
        use_mixed_precision: Compute in bfloat16; what is trained stays float32.
        grad_accum_steps: Samples of a step.
        w_distill: Weight of the divergence.
        w_ntp: Weight of the next token's cross entropy.
        gptq_optimize_intweight: Train integer codes, too.
        gptq_intweight_lr: Their learning rate, relative: in units in which a fresh latent code lies
            0.01 from where its code changes.
        optimize_binary: Train the signs of DBF and Onebit layers, too.
        binary_lr: Their learning rate, likewise.

    Raises:
        ConfigError: Settings out of range, all of them listed.
        InputError: The disk has no room for the original model's answers.
    """

    epochs: int = 5
    gptq_lr: float = 1e-5
    temperature: float = 1.0
    grad_clip: float = 1.0
    dbf_lr: float = 5e-5
    calibration_config: CalibrationConfig | None = None
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.01
    eval_interval: int = 1
    use_gradient_checkpointing: bool = True
    early_stopping_patience: int = 0
    use_mixed_precision: bool = False
    grad_accum_steps: int = 1
    _: KW_ONLY
    w_distill: float = 1.0
    w_ntp: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("epochs", "eval_interval", "grad_accum_steps")
        rates = ("gptq_lr", "dbf_lr", "temperature", "grad_clip")
        problems = [
            *whole_problems({name: getattr(self, name) for name in counts}, 1),
            *whole_problems({"early_stopping_patience": self.early_stopping_patience}, 0),
            *positive_problems({name: getattr(self, name) for name in rates}),
            *ratio_problems({"warmup_ratio": self.warmup_ratio, "min_lr_ratio": self.min_lr_ratio}),
            *weight_problems(self.w_distill, self.w_ntp),
            *self.latent_problems(),
        ]
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def run(self, quantized_model: PreTrainedModel, model_config: ModelConfig) -> None:
        """Train the model in place; on the CPU and in evaluation mode afterwards."""
        require_trainable(self, quantized_model, model_config)
        samples = training_samples(str(self.name), self.calibration_config, model_config)
        course = self._course(len(samples.train))
        course.steps_per_epoch(world_size=1)  # too few samples are found before any work
        started = time.monotonic()
        answers = TemporaryPath("onecomp-teacher-")
        teacher = self._teacher(samples, model_config, answers.path)
        with student_of(
            quantized_model,
            model_config,
            latents=self.latents,
            uses_bf16=self.use_mixed_precision,
            gradient_checkpointing=self.use_gradient_checkpointing,
        ) as student:
            progress = self._train(student, samples, teacher, course)
        record(quantized_model, self, outcome_of(progress, time.monotonic() - started))

    def _teacher(
        self, samples: TrainingSamples, model_config: ModelConfig, directory: Path
    ) -> Teacher | None:
        """The original model's answers; None where the loss does not ask for them."""
        if not self.w_distill:
            return None
        num_tokens = samples.all.numel()
        require_room(
            str(self.name),
            f"the original model's answers to {num_tokens} tokens take",
            cache_bytes(num_tokens),
            directory,
            remedy="or use fewer or shorter samples",
        )
        return cache_teacher(
            model_config,
            samples.all,
            directory,
            device=model_config.get_device(),
            temperature=self.temperature,
        )

    def _train(
        self, student: Student, samples: TrainingSamples, teacher: Teacher | None, course: Course
    ) -> Progress:
        num_steps = course.epochs * course.steps_per_epoch(world_size=1)
        rates = StudentRates(
            codes_scale=self.gptq_lr, signs_scale=self.dbf_lr, latents=self.latents
        )
        groups = student.groups(rates, num_steps)
        engine = LocalEngine(groups, self.grad_clip, student.parameters())
        task = distillation_task(student, samples, teacher, self._weights, engine)
        return Training(engine, course, task).run()

    @property
    def _weights(self) -> LossWeights:
        return LossWeights(self.w_distill, self.w_ntp, self.temperature)

    def _course(self, num_samples: int) -> Course:
        return Course(
            num_samples=num_samples,
            name=str(self.name),
            epochs=self.epochs,
            accumulation=self.grad_accum_steps,
            schedule=warmup_then_cosine(self.warmup_ratio, self.min_lr_ratio),
            eval_interval=self.eval_interval,
            patience=self.early_stopping_patience,
            seed=0 if self.calibration_config is None else self.calibration_config.seed,
        )


def weight_problems(w_distill: float, w_ntp: float) -> list[str]:
    """What is wrong with the weights of a loss."""
    if not (as_number(w_distill) >= 0 and as_number(w_ntp) >= 0):
        return [f"w_distill={w_distill}, w_ntp={w_ntp}: weights must be numbers, 0 or more."]
    if not w_distill and not w_ntp:
        return ["w_distill and w_ntp are both 0: nothing would be trained. Raise one of them."]
    return []


def distillation_task(
    student: Student,
    samples: TrainingSamples,
    teacher: Teacher | None,
    weights: LossWeights,
    engine: Engine,
) -> Task:
    """Losses of a student by numbers of samples; held-out ones are numbered behind the others."""
    ids, num_train = samples.all, len(samples.train)

    def loss(numbers: Samples) -> Tensor:
        batch = ids[numbers].to(student.device)
        told = None if teacher is None else teacher.distribution(numbers)
        return training_loss(student.logits(batch), batch, told, weights)

    def held_out() -> tuple[float, int]:
        count, total = len(samples.held_out), 0.0
        mine = share(count, engine)
        with torch.no_grad():
            for turn in range(math.ceil(count / engine.world_size)):
                # All ranks compute in step; those without a sample of their own repeat the last.
                number = mine[turn] if turn < len(mine) else count - 1
                value = float(loss([num_train + number]))
                total += value if turn < len(mine) else 0.0
        return total, len(mine)

    return Task(loss=loss, held_out=held_out)


def outcome_of(progress: Progress, seconds: float) -> Outcome:
    """What is recorded of a training."""
    reason = progress.gave_up
    if not progress.improved and not reason:
        reason = "no state was better on held-out samples than the beginning; nothing changed"
        if progress.skipped:
            reason += f" ({progress.skipped} steps were skipped: not finite)"
    return Outcome(
        executed=progress.improved,
        reason=reason,
        held_out_before=progress.initial,
        held_out_after=min(progress.best, progress.initial),
        seconds=round(seconds, 1),
        details={
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "updates": progress.num_updates,
            "skipped_steps": progress.skipped,
            "stopped_early": progress.stopped_early,
        },
    )
