"""Training the whole quantized model by several workers: Ray Train and DeepSpeed."""

import logging
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError
from onecomp.export.live import save_live_model
from onecomp.models import ModelConfig
from onecomp.post_process.base import (
    CheckpointProcess,
    Outcome,
    record,
    require_bare,
    require_trainable,
)
from onecomp.post_process.deepspeed_config import (
    StepSettings,
    batch_problems,
    config_problems,
    engine_config,
    read_config,
)
from onecomp.post_process.distillation import LossWeights
from onecomp.post_process.gang import Gang, GangRequest, default_gang, fresh_directory
from onecomp.post_process.gang_job import (
    AUTO,
    NO,
    PROGRESS_FILE,
    SAVE_STRATEGIES,
    SHARDED,
    STEPS,
    STREAMED,
    TEACHERS,
    GangJob,
    write_samples,
)
from onecomp.post_process.gang_result import gang_outcome, read_progress, write_patches
from onecomp.post_process.global_ptq import weight_problems
from onecomp.post_process.history import report_history, report_problems
from onecomp.post_process.patching import patch_live
from onecomp.post_process.samples import TrainingSamples, training_samples
from onecomp.post_process.schedules import Schedule
from onecomp.post_process.student import StudentRates, TrainsDecisions
from onecomp.post_process.teacher import cache_is_smaller
from onecomp.post_process.training import Course
from onecomp.quantizer.checks import positive_problems, ratio_problems, whole_problems
from onecomp.storage import TemporaryPath, remove_tree

logger = logging.getLogger(__name__)

LOOP = "onecomp.post_process.gang_worker:train"
DEFAULT_SAVE_STEPS = 500
CHECKPOINT_FOLDER = "checkpoint"


@dataclass
class GlobalPTQDistributed(TrainsDecisions, CheckpointProcess):
    """`GlobalPTQ` as a Ray Train job with DeepSpeed: same loss, same loop, several workers.

    Every worker reads the student from its checkpoint, block by block. With ZeRO-3 it keeps its
    share only, codes included, so that two workers hold half each; where codes or signs are
    trained, the best state besides, in the CPU's memory, up to 8 bytes a weight. The loss curve in
    float32 does not depend on how a step's samples are spread over workers and micro-batches.

    A worker that is lost is replaced, and all go on from the last checkpoint of the training; with
    more than one worker there is one after every epoch, whatever ``save_strategy`` says.

    Args:
        name: Name for messages.
        temperature: Divides the logits of both models.
        w_distill: Weight of the divergence from the original model, in nats per token.
        w_ntp: Weight of the next token's cross entropy.
        gptq_lr: Learning rate of scales of integer codes, absolute.
        dbf_lr: Learning rate of the scales of signs (DBF, Onebit).
        calibration_config: Text; None for 128 samples of C4. An eighth of it is held out.
        epochs: Passes over the training samples.
        per_device_train_batch_size: Samples of a micro-batch, on each worker.
        gradient_accumulation_steps: Micro-batches of a step, on each worker.
        warmup_ratio: Share of all steps in which the learning rate rises.
        max_grad_norm: Largest norm of all gradients together.
        lr_scheduler_type: Any of ``transformers.SchedulerType`` that follows the step number.
        use_gradient_checkpointing: Compute blocks again on the way back instead of keeping what
            is inside them.
        bf16: Compute in bfloat16; what is trained stays float32.
        deepspeed_config: JSON file, or dict, of DeepSpeed; None for ZeRO-1. Values that this class
            has as well are ``"auto"`` there, or equal.
        output_dir: Keeps the checkpoints of the training; every node sees it. None for a
            temporary directory. `onecomp postprocess` has a run directory instead.
        logging_steps: Steps between progress lines.
        report_to: Integrations of Transformers that get the curves at the end; "none" for none.
        save_strategy: ``no``, ``epoch`` or ``steps``; the last two checkpoints are kept.
        save_steps: Steps between checkpoints, with ``steps``; None for 500.
        eval_interval: Epochs between evaluations.
        num_workers: At least 1; None for one on each GPU of the cluster, or one on a CPU.
        address: Ray cluster; None for ``RAY_ADDRESS``, or one on this machine.
        teacher: ``streamed``: the original model's most probable tokens are kept in files, each
            worker asking for its share of the samples, one block in memory at a time;
            ``sharded``: the original model is held in ZeRO-3 shards and asked in every step;
            ``auto``: whichever takes less room.
        lr_scheduler_kwargs: Further arguments of the scheduler.
        max_failures: How often lost workers are replaced before the run fails.
        gptq_optimize_intweight: Train integer codes, too.
        gptq_intweight_lr: Their learning rate, relative: in units in which a fresh latent code lies
            0.01 from where its code changes.
        optimize_binary: Train the signs of DBF and Onebit layers, too.
        binary_lr: Their learning rate, likewise.

    Raises:
        ConfigError: Settings out of range, or a DeepSpeed configuration that is not valid or
            contradicts them; all of them listed.
    """

    places: ClassVar[frozenset[str]] = frozenset(
        {
            "address",
            "logging_steps",
            "max_failures",
            "output_dir",
            "report_to",
            "save_steps",
            "save_strategy",
        }
    )
    temperature: float = 1.0
    w_distill: float = 1.0
    w_ntp: float = 0.0
    gptq_lr: float = 1e-5
    dbf_lr: float = 5e-5
    calibration_config: CalibrationConfig | None = None
    epochs: int = 5
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    use_gradient_checkpointing: bool = True
    bf16: bool = True
    deepspeed_config: str | Path | dict[str, Any] | None = None
    output_dir: str | None = None
    logging_steps: int = 1
    report_to: str | list[str] | None = "none"
    save_strategy: str = NO
    save_steps: int | None = None
    eval_interval: int = 1
    _: KW_ONLY
    num_workers: int | None = None
    address: str | None = None
    teacher: str = AUTO
    lr_scheduler_kwargs: dict[str, Any] | None = None
    max_failures: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*self._number_problems(), *self._choice_problems()]
        config, unreadable = read_config(self.deepspeed_config)
        if not problems:
            unreadable = unreadable or config_problems(config, self._step_settings())
        if problems + unreadable:
            raise ConfigError(type(self).__name__, problems + unreadable)
        if self.save_steps is not None and self.save_strategy != STEPS:
            logger.warning(
                "save_steps=%s has no effect with save_strategy=%r; set it to 'steps'",
                self.save_steps, self.save_strategy,
            )  # fmt: skip

    def _number_problems(self) -> list[str]:
        counts = (
            "epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_interval",
        )
        given = [] if self.save_steps is None else ["save_steps"]
        rates = ("temperature", "gptq_lr", "dbf_lr", "max_grad_norm")
        return [
            *whole_problems({name: getattr(self, name) for name in [*counts, *given]}, 1),
            *self._worker_problems(),
            *whole_problems({"max_failures": self.max_failures}, 0),
            *positive_problems({name: getattr(self, name) for name in rates}),
            *ratio_problems({"warmup_ratio": self.warmup_ratio}),
            *weight_problems(self.w_distill, self.w_ntp),
            *self.latent_problems(),
        ]

    def _worker_problems(self) -> list[str]:
        """What is wrong with the number of workers; elsewhere 0 stands for this process."""
        if self.num_workers is None:
            return []
        if self.num_workers == 0:
            return [
                "num_workers=0: must be at least 1. To train in this process, use GlobalPTQ "
                "(on the command line global_ptq)."
            ]
        return whole_problems({"num_workers": self.num_workers}, 1)

    def _choice_problems(self) -> list[str]:
        problems = [
            f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}."
            for name, choices in (("save_strategy", SAVE_STRATEGIES), ("teacher", TEACHERS))
            if getattr(self, name) not in choices
        ]
        if ratio_problems({"warmup_ratio": self.warmup_ratio}):
            return problems
        return [*problems, *self._schedule().problems(), *report_problems(self.report_to)]

    def run(self, quantized_model: PreTrainedModel, model_config: ModelConfig) -> None:
        """Train the model in place; on the CPU and in evaluation mode afterwards."""
        layers = require_trainable(self, quantized_model, model_config)
        require_bare(self, layers)
        samples = training_samples(str(self.name), self.calibration_config, model_config)
        temporary = None if self.output_dir else TemporaryPath("onecomp-gang-")
        with self._gang(model_config) as gang:
            self._require_fit(gang, samples)
            if temporary and not gang.is_one_machine:
                raise ConfigError(
                    str(self.name),
                    ["output_dir is needed on a cluster: a directory that every node sees."],
                )
            work = temporary.path if temporary else fresh_directory(Path(str(self.output_dir)))
            checkpoint = work / CHECKPOINT_FOLDER
            try:
                save_live_model(quantized_model, checkpoint)
                outcome = self._train(gang, checkpoint, work, model_config, samples)
            finally:
                remove_tree(checkpoint)
        if outcome.executed:
            patch_live(layers, work)
        record(quantized_model, self, outcome)
        self._report(work)

    def improve(self, checkpoint: Path, work: Path, model_config: ModelConfig) -> Outcome:
        """Train a checkpoint directory; no process holds more of the model than its share.

        Raises:
            ConfigError: ``output_dir`` is set, or the settings do not fit the workers.
        """
        if self.output_dir is not None:
            raise ConfigError(
                str(self.name),
                [
                    f"output_dir={self.output_dir!r}: a checkpoint is trained in the run directory "
                    "beside --output, and nowhere else. Leave output_dir out."
                ],
            )
        samples = training_samples(str(self.name), self.calibration_config, model_config)
        work = work.absolute()
        with self._gang(model_config) as gang:
            self._require_fit(gang, samples)
            outcome = self._train(gang, checkpoint.absolute(), work, model_config, samples)
        self._report(work)
        return outcome

    def _gang(self, model_config: ModelConfig) -> Gang:
        return default_gang(
            GangRequest(
                num_workers=self.num_workers,
                address=self.address,
                uses_gpus=model_config.device == AUTO or model_config.device.startswith("cuda"),
                max_failures=self.max_failures,
            )
        )

    def _require_fit(self, gang: Gang, samples: TrainingSamples) -> None:
        """Find out what cannot work before anything is written or started."""
        config, _ = read_config(self.deepspeed_config)
        problems = batch_problems(config, self._step_settings(), gang.num_workers)
        if problems:
            raise ConfigError(str(self.name), problems)
        self._course(len(samples.train)).steps_per_epoch(gang.num_workers)

    def _train(
        self,
        gang: Gang,
        checkpoint: Path,
        work: Path,
        model_config: ModelConfig,
        samples: TrainingSamples,
    ) -> Outcome:
        started = time.monotonic()
        job = self._job(checkpoint, work, model_config, samples)
        if not (work / PROGRESS_FILE).exists():
            write_samples(work, samples)
            gang.run(LOOP, job, work)
        if read_progress(work).improved:
            write_patches(job)
        return gang_outcome(work, job.engine.stage, time.monotonic() - started)

    def _report(self, work: Path) -> None:
        """Tell the integrations, last: by now no error of theirs can cost the training."""
        try:
            report_history(read_progress(work), self.report_to, work)
        except Exception as error:  # noqa: BLE001 - integrations raise classes of their own
            logger.warning(
                "report_to=%r did not get the curves (%s: %s); the result is not affected",
                self.report_to, type(error).__name__, error,
            )  # fmt: skip

    def _job(
        self, checkpoint: Path, work: Path, model_config: ModelConfig, samples: TrainingSamples
    ) -> GangJob:
        config, _ = read_config(self.deepspeed_config)
        teacher = self.teacher
        if teacher == AUTO:
            is_smaller = cache_is_smaller(model_config, samples.all.numel())
            teacher = STREAMED if is_smaller else SHARDED
        return GangJob(
            directory=work,
            checkpoint=checkpoint,
            model_config=model_config,
            course=self._course(len(samples.train)),
            weights=LossWeights(self.w_distill, self.w_ntp, self.temperature),
            rates=StudentRates(
                codes_scale=self.gptq_lr, signs_scale=self.dbf_lr, latents=self.latents
            ),
            uses_bf16=self.bf16,
            gradient_checkpointing=self.use_gradient_checkpointing,
            engine=engine_config(config, self._step_settings()),
            teacher=teacher,
            save_strategy=self.save_strategy,
            save_steps=self.save_steps or DEFAULT_SAVE_STEPS,
        )

    def _course(self, num_samples: int) -> Course:
        return Course(
            num_samples=num_samples,
            epochs=self.epochs,
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            schedule=self._schedule(),
            eval_interval=self.eval_interval,
            seed=0 if self.calibration_config is None else self.calibration_config.seed,
            logging_steps=self.logging_steps,
        )

    def _schedule(self) -> Schedule:
        kind = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        return Schedule(kind, self.warmup_ratio, self.lr_scheduler_kwargs or {})

    def _step_settings(self) -> StepSettings:
        return StepSettings(
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_grad_norm=self.max_grad_norm,
            gptq_lr=self.gptq_lr,
            bf16=self.bf16,
        )
