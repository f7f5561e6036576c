"""Training small adapters beside the frozen quantized layers: the processes that users name."""

import logging
import time
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path

from peft import LoraConfig
from transformers import PreTrainedModel

from onecomp.errors import ConfigError
from onecomp.models import ModelConfig
from onecomp.models.config import DTYPES
from onecomp.post_process.base import PostQuantizationProcess, record, require_trainable
from onecomp.post_process.gang import GangRequest
from onecomp.post_process.global_ptq import outcome_of
from onecomp.post_process.lora.adapter import (
    adapter_parameters,
    adapters_on_trial,
    require_no_adapters,
    save_adapter,
    target_names,
    targeted_layers,
)
from onecomp.post_process.lora.answers import KL, Kept, Question
from onecomp.post_process.lora.gang import train_together
from onecomp.post_process.lora.losses import LoraLoss
from onecomp.post_process.lora.outputs import blocks_of
from onecomp.post_process.lora.settings import problems_of
from onecomp.post_process.lora.teaching import Teaching, teacher_config
from onecomp.post_process.lora.text import TextSource, samples_of
from onecomp.post_process.lora.tokens import TokenFile, write_tokens
from onecomp.post_process.lora.train import TOKEN_FILE, LoraJob, split_samples, train_adapter
from onecomp.post_process.samples import HELD_OUT_RATIO
from onecomp.post_process.schedules import Schedule
from onecomp.post_process.training import Course, Progress
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.storage import TemporaryPath

logger = logging.getLogger(__name__)


@dataclass
class PostProcessLoraSFT(PostQuantizationProcess):
    """Trains LoRA adapters on a quantized model, whose own weights stay as they are.

    The loss is a weighted sum of the next token's cross entropy, the distance from a teacher's
    logits, and the distance from its hidden states. The adapters with the lowest loss on held-out
    samples are kept, in the model and, as PEFT's own files, in ``output_dir``; if none is better
    than no adapter, the model stays as it was and nothing is written.

    Args:
        name: Name for messages.
        dataset_name: Dataset on the Hub, or a local one.
        dataset_config_name: Its configuration.
        data_files: Local files, all of one kind: json, jsonl, csv, txt (one sample a line) or
            parquet; one, several, or one for each split. Patterns are allowed.
        train_split: Split to train on, as ``datasets`` understands it.
        text_column: Column of text, or of conversations (lists of messages with ``role`` and
            ``content``), which the tokenizer's chat template renders; all of it is learnt.
            Without such a column, ``messages`` and ``conversations`` are looked for.
        max_train_samples: Samples that are used at most, held-out ones included; None for all.
        max_length: Tokens of a sample; longer ones are cut.
        shuffle_seed: Seed of everything random: order of samples, first adapters, dropout.
        lr: Peak learning rate; it falls to nothing in a line.
        epochs: Passes over the training samples.
        batch_size: Samples of a micro-batch.
        gradient_accumulation_steps: Micro-batches of an update.
        weight_decay: Of AdamW.
        warmup_ratio: Share of all updates in which the learning rate rises.
        logging_steps: Updates between lines of the log.
        lora_r: Rank of the adapters.
        lora_alpha: Adapters count ``lora_alpha / lora_r`` times.
        lora_dropout: Dropout in front of adapters, in training only.
        target_modules: Last names of the quantized layers that get an adapter; None for the usual
            projections of attention and MLP.
        output_dir: Where the adapter's files go; None writes none.
        use_bf16: Compute in bfloat16; None for where the device is fast at it. Adapters are
            float32.
        sft_loss_weight: Weight of the next token's cross entropy.
        teacher_loss_weight: Weight of the distance from the teacher's logits.
        teacher_loss_type: ``"kl"`` for the divergence of distributions, ``"mse"`` for the squared
            difference of logits.
        teacher_temperature: Divides logits in the divergence.
        teacher_model_id: Teacher on the Hub; None for the original model.
        teacher_model_path: Teacher in a directory.
        teacher_dtype: Its precision; None for the original's, float32 on a CPU.
        teacher_device: Where it computes; None for the student's.
        cache_teacher_outputs: Ask it once and keep what it says in files, instead of asking in
            every step: of the divergence the most probable tokens, of ``"mse"`` all logits.
        teacher_cache_dtype: Type of what is kept; None for float16.
        intermediate_block_loss_weight: Weight of the distance from its hidden states.
        cache_intermediate_outputs: Keep those in files too.
        intermediate_block_indices: Blocks whose output counts; None for all.
        intermediate_cache_dtype: Type of what is kept; None for float16.
        held_out_ratio: Share of the samples that is held out to judge by, at least one sample.
        max_grad_norm: Largest norm of all gradients together.
        num_workers: Processes that train together as a Ray job; None, 0 or 1 for this one.

    Raises:
        ConfigError: Settings out of range, all of them listed.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    train_split: str = "train"
    text_column: str = "text"
    max_train_samples: int | None = None
    max_length: int = 1024
    shuffle_seed: int = 42
    lr: float = 1e-4
    epochs: int = 4
    batch_size: int = 1
    gradient_accumulation_steps: int = 16
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    logging_steps: int = 10
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    output_dir: str | None = None
    use_bf16: bool | None = None
    sft_loss_weight: float = 1.0
    teacher_loss_weight: float = 0.0
    teacher_loss_type: str = KL
    teacher_temperature: float = 1.0
    teacher_model_id: str | None = None
    teacher_model_path: str | None = None
    teacher_dtype: str | None = None
    teacher_device: str | None = None
    cache_teacher_outputs: bool = False
    teacher_cache_dtype: str | None = None
    intermediate_block_loss_weight: float = 0.0
    cache_intermediate_outputs: bool = False
    intermediate_block_indices: tuple[int, ...] | None = None
    intermediate_cache_dtype: str | None = None
    _: KW_ONLY
    held_out_ratio: float = HELD_OUT_RATIO
    max_grad_norm: float = 1.0
    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := problems_of(asdict(self)):
            raise ConfigError(type(self).__name__, problems)

    def run(self, quantized_model: PreTrainedModel, model_config: ModelConfig) -> None:
        """Train adapters and leave the best in the model, on the CPU and in evaluation mode."""
        targets = self._targets(quantized_model, model_config)
        teaching = self._teaching(quantized_model, model_config)
        files = TemporaryPath("onecomp-lora-")
        tokens = self._tokens(model_config, files.path)
        teaching.check_room(tokens, files.path)
        job = LoraJob(
            directory=files.path,
            model_config=model_config,
            targets=tuple(targets),
            config=self._lora_config(target_names(quantized_model, targets)),
            teaching=teaching,
            loss=self._loss,
            course=self._course(len(tokens)),
            lr=self.lr,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            uses_bf16=self.use_bf16,
            seed=self.shuffle_seed,
        )
        started = time.monotonic()
        with adapters_on_trial(quantized_model, targets, job.config, job.seed) as trial:
            progress = self._train(job, quantized_model)
            if progress.improved:
                self._save(quantized_model)
                trial.keep()
        self._record(quantized_model, progress, time.monotonic() - started)

    def _train(self, job: LoraJob, model: PreTrainedModel) -> Progress:
        if self._world_size == 1:
            return train_adapter(job, model)
        device = job.model_config.device
        uses_gpus = device == "auto" or device.startswith("cuda")
        request = GangRequest(num_workers=self._world_size, uses_gpus=uses_gpus)
        return train_together(
            job, model, request, None if self.output_dir is None else Path(self.output_dir)
        )

    @property
    def _world_size(self) -> int:
        return self.num_workers or 1

    def _save(self, model: PreTrainedModel) -> None:
        if self.output_dir is not None:
            save_adapter(model, Path(self.output_dir))
            logger.info(
                "adapter: %s; load it with PeftModel.from_pretrained(model, directory)",
                self.output_dir,
            )

    def _record(self, model: PreTrainedModel, progress: Progress, seconds: float) -> None:
        outcome = outcome_of(progress, seconds)
        if not outcome.executed:
            logger.warning("%s: %s", self.name, outcome.reason)
        parameters = adapter_parameters(model).values()
        details = {"adapter_parameters": sum(p.numel() for p in parameters), **outcome.details}
        record(model, self, replace(outcome, details=details))

    def _targets(self, model: PreTrainedModel, model_config: ModelConfig) -> dict[str, QuantLinear]:
        layers = require_trainable(self, model, model_config)
        require_no_adapters(str(self.name), model)
        return targeted_layers(str(self.name), layers, self.target_modules)

    def _lora_config(self, names: list[str]) -> LoraConfig:
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=names,
            task_type="CAUSAL_LM",
        )

    def _teaching(self, model: PreTrainedModel, model_config: ModelConfig) -> Teaching:
        blocks: tuple[int, ...] = ()
        if self.intermediate_block_loss_weight:
            found = blocks_of(model, model_config)
            blocks = tuple(self.intermediate_block_indices or range(len(found)))
        teaching = Teaching(
            process=str(self.name),
            teacher=teacher_config(
                model_config,
                model_id=self.teacher_model_id,
                path=self.teacher_model_path,
                dtype=self.teacher_dtype,
                device=self.teacher_device,
            ),
            float32_on_cpu=self.teacher_dtype is None,
            question=Question(self.teacher_loss_type if self.teacher_loss_weight else None, blocks),
            keeps_logits=self.cache_teacher_outputs,
            keeps_hidden=self.cache_intermediate_outputs,
            kept=Kept(
                DTYPES[self.teacher_cache_dtype or "float16"],
                DTYPES[self.intermediate_cache_dtype or "float16"],
                self.teacher_temperature,
            ),
        )
        teaching.check(model, model_config)
        return teaching

    def _tokens(self, model_config: ModelConfig, directory: Path) -> TokenFile:
        source = TextSource(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            data_files=self.data_files,
            split=self.train_split,
            text_column=self.text_column,
            max_samples=self.max_train_samples,
            max_length=self.max_length,
            seed=self.shuffle_seed,
        )
        samples = samples_of(source, model_config.load_tokenizer(), directory / "datasets")
        return write_tokens(directory / TOKEN_FILE, samples)

    def _course(self, num_samples: int) -> Course:
        course = Course(
            num_samples=split_samples(str(self.name), num_samples, self.held_out_ratio),
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulation=self.gradient_accumulation_steps,
            schedule=Schedule("linear", self.warmup_ratio),
            seed=self.shuffle_seed,
            logging_steps=self.logging_steps,
        )
        course.steps_per_epoch(self._world_size)  # too few samples are found before any work
        return course

    @property
    def _loss(self) -> LoraLoss:
        return LoraLoss(
            next_token=self.sft_loss_weight,
            teacher=self.teacher_loss_weight,
            teacher_type=self.teacher_loss_type,
            temperature=self.teacher_temperature,
            hidden=self.intermediate_block_loss_weight,
        )


@dataclass
class PostProcessLoraTeacherSFT(PostProcessLoraSFT):
    """:class:`PostProcessLoraSFT` that also learns from a teacher's logits."""

    teacher_loss_weight: float = 1.0


@dataclass
class PostProcessLoraTeacherOnlySFT(PostProcessLoraSFT):
    """:class:`PostProcessLoraSFT` that learns from a teacher's logits alone."""

    sft_loss_weight: float = 0.0
    teacher_loss_weight: float = 1.0
