"""Block-wise training as a post-process: of a live model, or of a checkpoint directory."""

import logging
import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError
from onecomp.executor import Executor, default_executor
from onecomp.export.live import save_live_model
from onecomp.models import ModelConfig, Skeleton
from onecomp.post_process.base import (
    PATCHES,
    CheckpointProcess,
    Outcome,
    keeps_zero_points,
    record,
    require_bare,
    require_trainable,
)
from onecomp.post_process.blockwise.span import Rates
from onecomp.post_process.blockwise.student_blocks import Patches, QuantizedBlocks
from onecomp.post_process.blockwise.tuner import (
    STUDENT,
    TEACHER,
    TunerSettings,
    shards_of,
)
from onecomp.post_process.blockwise.tuning import Phase, Tuning
from onecomp.post_process.latents import SCALES_ALONE, LatentRates
from onecomp.post_process.patching import patch_live
from onecomp.post_process.samples import TrainingSamples, training_samples
from onecomp.quantizer.checks import positive_problems, whole_problems
from onecomp.storage import TemporaryPath

logger = logging.getLogger(__name__)

ROLLED_BACK = "the whole model was no better on held-out samples; rolled back"


@dataclass
class BlockWisePTQ(CheckpointProcess):
    """Trains one block after the other to give what the original block gives.

    The inputs of a block are those that the model trained so far produces; what it should give is
    what the original model has there, so that earlier errors are corrected, too. Behind the last
    block that is the original model's answers: their divergence is what counts in the end, and
    there it can be had without the rest of the model.

    Per block the state with the lowest held-out error is kept. Behind each phase (single blocks,
    pairs, answering blocks) the whole model is judged by its divergence from the original on
    held-out samples, and the phase is undone if that did not fall.

    Scales are always trained; ``optimize_binary`` and ``gptq_optimize_intweight`` also train signs
    and codes by way of latents. Learning rates are relative, so that one value serves all models:
    those of scales are shares of a layer's mean scale, those of latents count in units in which a
    fresh latent lies ``1 / k_smooth`` from where its sign or code changes.

    Args:
        name: Name for messages.
        lr: Learning rate of scales and latent signs of DBF and Onebit layers.
        epochs: Passes over the training samples for each block.
        cbq_enable: Train pairs of neighbouring blocks afterwards (cross-block quantization), of
            those in front of the answering ones.
        gptq_lr: Learning rate of scales of integer codes, and of zero points of asymmetric grids.
        gptq_optimize_intweight: Train integer codes, but of answering blocks.
        gptq_intweight_lr: Their learning rate.
        grad_clip: Largest norm of a step's gradient.
        optimize_binary: Train signs, but of answering blocks.
        k_smooth: Sharpness of the smooth sign, and inverse latent scale.
        cbq_epochs: Passes for each pair; 0 for ``epochs``.
        cbq_lr: Learning rate in pairs, of everything that is trained.
        calibration_config: Text; None for 128 samples of C4. An eighth of it is held out.
        batch_size: Samples of a step. They are shared out over the workers, so that more workers
            than this have nothing to do; the result does not depend on how many there are.
        targets: ``teacher``: original blocks see the original model's hidden states;
            ``student``: those of the model trained so far, so that only a block's own error counts
            (answers are always the original model's).
        binary_lr: Learning rate of latent signs alone; None for ``lr``.
        answering_blocks: So many of the last blocks are held and trained together for the answers,
            after all others; of them scales and zero points alone. Use more for models that were
            quantized with error propagation: block by block there is little left to gain.
        use_mixed_precision: Train in bfloat16; what is trained stays float32.
        num_workers: 0 for this process, N for Ray workers, None to choose.
        address: Ray cluster.

    Raises:
        ConfigError: Settings out of range, all of them listed.
    """

    places: ClassVar[frozenset[str]] = frozenset({"num_workers", "address"})
    lr: float = 1e-4
    epochs: int = 10
    cbq_enable: bool = False
    gptq_lr: float = 1e-3
    gptq_optimize_intweight: bool = False
    gptq_intweight_lr: float = 1e-4
    grad_clip: float = 1.0
    optimize_binary: bool = True
    k_smooth: float = 100.0
    cbq_epochs: int = 0
    cbq_lr: float = 5e-5
    calibration_config: CalibrationConfig | None = None
    _: KW_ONLY
    batch_size: int = 4
    targets: str = TEACHER
    binary_lr: float | None = None
    answering_blocks: int = 1
    use_mixed_precision: bool = False
    num_workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = ("lr", "gptq_lr", "gptq_intweight_lr", "cbq_lr", "grad_clip", "k_smooth")
        counts = ("epochs", "batch_size", "answering_blocks")
        problems = [
            *positive_problems({name: getattr(self, name) for name in rates}),
            *positive_problems({} if self.binary_lr is None else {"binary_lr": self.binary_lr}),
            *whole_problems({name: getattr(self, name) for name in counts}, 1),
            *whole_problems({"cbq_epochs": self.cbq_epochs}, 0),
        ]
        if self.targets not in (TEACHER, STUDENT):
            problems.append(f"targets={self.targets!r}: must be {TEACHER!r} or {STUDENT!r}.")
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def run(self, quantized_model: PreTrainedModel, model_config: ModelConfig) -> None:
        """Train the model in place; on the CPU and in evaluation mode afterwards."""
        layers = require_trainable(self, quantized_model, model_config)
        require_bare(self, layers)
        samples = self._samples(model_config)
        place = TemporaryPath("onecomp-blockwise-")
        save_live_model(quantized_model, place.path / "checkpoint")
        outcome = self._improve(place.path / "checkpoint", place.path, model_config, samples)
        if outcome.executed:
            patch_live(layers, place.path)
        record(quantized_model, self, outcome)

    def improve(self, checkpoint: Path, work: Path, model_config: ModelConfig) -> Outcome:
        """Train the blocks of a checkpoint one by one; spans that are finished stay."""
        return self._improve(checkpoint, work, model_config, self._samples(model_config))

    def _samples(self, model_config: ModelConfig) -> TrainingSamples:
        samples = training_samples(str(self.name), self.calibration_config, model_config)
        if len(samples.train) < self.batch_size:
            raise ConfigError(
                str(self.name),
                [
                    f"{len(samples.train)} training samples are fewer than batch_size="
                    f"{self.batch_size}. Use more samples, or a smaller batch_size."
                ],
            )
        return samples

    def _improve(
        self, checkpoint: Path, work: Path, model_config: ModelConfig, samples: TrainingSamples
    ) -> Outcome:
        started = time.monotonic()
        patches = Patches(work / PATCHES)
        earlier = sum(notes["seconds"] for notes in patches.notes())
        executor = default_executor(self.num_workers, address=self.address)
        executor.limit(self.batch_size)
        try:
            tuning = self._tuning(executor, checkpoint, patches, model_config, samples)
            before, after = tuning.run()
        finally:
            executor.stop()
        return _outcome(before, after, tuning, time.monotonic() - started + earlier)

    def _tuning(
        self,
        executor: Executor,
        checkpoint: Path,
        patches: Patches,
        model_config: ModelConfig,
        samples: TrainingSamples,
    ) -> Tuning:
        settings = TunerSettings(
            source=model_config.source,
            dtype=model_config.training_dtype,
            device=model_config.device,
            checkpoint=checkpoint,
            patches=patches,
            targets=self.targets,
            grad_clip=self.grad_clip,
            uses_bf16=self.use_mixed_precision,
        )
        skeleton = Skeleton.build(model_config.source, settings.dtype)
        blocks = QuantizedBlocks(checkpoint, skeleton, patches)
        num_blocks = len(skeleton.blocks)
        return Tuning(
            executor=executor,
            settings=settings,
            shards=shards_of(samples.train, samples.held_out, self.batch_size),
            phases=self._phases(num_blocks, trains_zero_points=keeps_zero_points(blocks.config)),
            trainable=[i for i in range(num_blocks) if blocks.layer_names(i)],
            num_blocks=num_blocks,
            seed=0 if self.calibration_config is None else self.calibration_config.seed,
        )

    def _phases(self, num_blocks: int, *, trains_zero_points: bool) -> list[Phase]:
        rates = Rates(
            codes_scale=self.gptq_lr,
            signs_scale=self.lr,
            latents=LatentRates(
                codes=self.gptq_intweight_lr if self.gptq_optimize_intweight else 0.0,
                signs=(self.binary_lr or self.lr) if self.optimize_binary else 0.0,
                smoothing=self.k_smooth,
            ),
            zero_points=self.gptq_lr if trains_zero_points else 0.0,
        )
        together = min(self.answering_blocks, num_blocks)
        alone = num_blocks - together
        if self.cbq_enable and alone < 2:
            logger.warning("cbq_enable: fewer than two blocks are trained alone, so no pair is")
        ways = [
            Phase(number=0, starts=range(alone), span=1, epochs=self.epochs, rates=rates),
            Phase(
                number=1,
                starts=range(alone - 1 if self.cbq_enable else 0),
                span=2,
                epochs=self.cbq_epochs or self.epochs,
                rates=rates.at(self.cbq_lr),
            ),
            Phase(
                number=2,
                starts=range(alone, alone + 1),
                span=together,
                epochs=self.epochs,
                rates=replace(rates, latents=SCALES_ALONE),
            ),
        ]
        return [phase for phase in ways if phase.starts]


def _outcome(before: float, after: float, tuning: Tuning, seconds: float) -> Outcome:
    is_better, reports = after < before, tuning.reports
    kept = [report for report in reports if report.phase not in tuning.undone]
    skipped = sum(report.skipped for report in reports)
    reason = "" if is_better else ROLLED_BACK
    if reason and skipped:
        reason += f"; {skipped} steps were skipped: not finite"
    logger.info("divergence from the original, held out: %.4f -> %.4f nats a token", before, after)
    return Outcome(
        executed=is_better,
        reason=reason,
        held_out_before=before,
        held_out_after=min(before, after),
        seconds=round(seconds, 1),
        details={
            "spans": len(kept),
            "improved_spans": sum(report.after < report.before for report in kept),
            "changed_decisions": sum(report.changed for report in kept),
            "trained_decisions": sum(report.decisions for report in kept),
            "skipped_steps": skipped,
            "phases_undone": len(tuning.undone),
            "spans_given_up": sum(report.gave_up for report in reports),
        },
    )
