"""One job from its checks to its checkpoint: what ``Runner.run`` and the command line both do."""

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onecomp.calibration import CalibrationSamples, prepare_calibration_samples
from onecomp.calibration.config import SELF
from onecomp.calibration.shards import cut_shards
from onecomp.errors import InputError
from onecomp.executor import Executor
from onecomp.export.checkpoint import CONFIG
from onecomp.export.install import (
    install_checkpoint,
    require_apart,
    require_directory,
    require_no_checkpoint,
)
from onecomp.export.save import CheckpointWriter, has_format
from onecomp.job import (
    QuantizationJob,
    differences,
    find_layers,
    log_coverage,
    require_same_identity,
)
from onecomp.log import format_duration
from onecomp.models import (
    ModelLayout,
    ModelSource,
    Skeleton,
    require_known_tokens,
    require_positions,
    require_stored_tensors,
)
from onecomp.pipeline import quantize_model
from onecomp.progress import Progress
from onecomp.quantizer import QuantizationResult, Quantizer
from onecomp.store import RUN_FILE, RunDirectory
from onecomp.worker import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A job that passed every check, bound to its run directory."""

    job: QuantizationJob
    run: RunDirectory
    skeleton: Skeleton
    layout: ModelLayout
    samples: CalibrationSamples | None
    output: Path | None
    """Where the checkpoint goes; None keeps results only."""
    begin_anew: bool
    """Whether what an earlier run left in the directory is set aside when the work starts."""
    may_replace: bool = False
    """Whether a checkpoint that is in the output's place may be replaced."""
    evaluation_text: str | None = None
    """Text that the checkpoint is to be evaluated on; kept for whoever resumes the run."""

    @classmethod
    def open(
        cls,
        job: QuantizationJob,
        run_dir: Path,
        *,
        output: Path | None = None,
        overwrite: bool = False,
        samples: CalibrationSamples | None = None,
        evaluation_text: str | None = None,
    ) -> "Session":
        """Check everything that can be checked before any worker starts.

        Args:
            job: What to make.
            run_dir: New, or begun by the same job.
            output: New checkpoint directory.
            overwrite: Begin anew in a run directory that exists, and replace the checkpoint.
            samples: Calibration tokens; None makes them as the job says.
            evaluation_text: What to evaluate on afterwards, for the record.

        Raises:
            UserError: The first thing that does not fit; nothing was changed.
        """
        run, output = RunDirectory(_absolute(run_dir)), output and _absolute(output)
        _require_places(run, output, job.model_config.source, may_replace=overwrite)
        skeleton = _checked_skeleton(job)
        layout = find_layers(job.quantizer, skeleton)
        samples = samples or _samples(job, skeleton)
        if samples is not None:
            require_known_tokens(skeleton.model, samples.input_ids)
        begin_anew = overwrite or not run.exists
        if not begin_anew:
            require_same_identity(run_dir, run.record(), job.record(samples))
        return cls(
            job, run, skeleton, layout, samples, output, begin_anew, overwrite, evaluation_text
        )

    @classmethod
    def reopen(cls, run_dir: Path) -> "Session":
        """The session of an interrupted run, from its directory alone.

        Raises:
            InputError: No run, or a model that changed since.
        """
        run = RunDirectory(_absolute(run_dir))
        record = run.record()
        try:
            job = QuantizationJob.from_record(record)
            output = None if record["output"] is None else Path(record["output"])
            may_replace, evaluation_text = record["overwrite"], record["evaluation_text"]
        except (KeyError, TypeError) as error:
            raise InputError(
                run.path / RUN_FILE,
                f"does not describe a run of this version ({error!r}). Begin anew elsewhere.",
            ) from error
        if not _has_checkpoint_in_place(run, output):
            _require_places(run, output, job.model_config.source, may_replace=may_replace)
        skeleton = _checked_skeleton(job)
        samples = run.samples()
        now = job.record(samples)
        if changed := differences(record, now):
            raise InputError(run_dir, f"its inputs changed since it began ({'; '.join(changed)}).")
        for key in ("versions", "device"):
            if record[key] != now[key]:
                logger.warning(
                    "%s changed since the run began (%s -> %s): finished blocks are kept, but "
                    "equal bits are promised for equal versions and devices only",
                    key, record[key], now[key],
                )  # fmt: skip
        layout = find_layers(job.quantizer, skeleton)
        return cls(
            job, run, skeleton, layout, samples, output, begin_anew=False,
            may_replace=may_replace, evaluation_text=evaluation_text,
        )  # fmt: skip

    @property
    def is_finished(self) -> bool:
        """Whether every block is quantized and the checkpoint is in its place."""
        if self.begin_anew or not all(
            self.run.has_block(block.index) for block in self.layout.blocks
        ):
            return False
        return _has_checkpoint_in_place(self.run, self.output)

    def quantize(self, executor: Executor, *, report_progress: bool = True) -> None:
        """Quantize every block that is not finished, and put the checkpoint in its place.

        Args:
            executor: Where the work runs; its owner stops it.
            report_progress: A bar on a terminal, a log line per block elsewhere.
        """
        started = time.monotonic()
        self._begin()
        blocks = self.layout.blocks
        reused = sum(self.run.has_block(block.index) for block in blocks)
        if reused:
            logger.info("%d of %d blocks are finished already", reused, len(blocks))
        shards = [] if self.samples is None else cut_shards(self.samples, self.job.num_shards)
        with Progress(len(blocks), reused, silent=not report_progress) as progress:
            quantize_model(self._settings(len(shards)), shards, executor, progress)
        if self.output is not None:
            self._finish_checkpoint()
        self.run.drop_replaced()
        self.run.append(
            "finished",
            seconds=time.monotonic() - started,
            driver_bytes=executor.driver_bytes,
            workers=executor.num_workers,
        )
        logger.info(
            "quantized %d layers in %s, mean output error %s",
            len(self.layout.layer_names),
            format_duration(time.monotonic() - started),
            self.run.mean_output_error(),
        )

    def _begin(self) -> None:
        log_coverage(self.skeleton, self.layout)
        if self.output is not None and not has_format(self.job.quantizer):
            logger.warning(
                "%s has no checkpoint format: the checkpoint holds dequantized weights",
                self.job.quantizer.name,
            )
        if self.begin_anew:
            self.run.set_aside()
        record = self.job.record(self.samples)
        record["created"] = self.run.created()
        record["output"] = None if self.output is None else str(self.output)
        record["overwrite"] = self.may_replace
        record["evaluation_text"] = self.evaluation_text
        self.run.begin(record, self.samples)

    def writer(
        self, directory: Path, *, dequantized: bool, pack_weights: bool = True
    ) -> CheckpointWriter:
        """Writes this model's checkpoint to ``directory``."""
        return CheckpointWriter(directory, self.job.quantizer, dequantized, pack_weights)

    def export(self, writer: CheckpointWriter, results: Mapping[str, QuantizationResult]) -> None:
        """Write a whole checkpoint from results by layer name, one block in memory at a time."""
        writer.write_outer(self.skeleton)
        for index in range(len(self.skeleton.blocks)):
            prefix = self.skeleton.block_name(index) + "."
            of_block = {name: results[name] for name in results if name.startswith(prefix)}
            writer.write_block(self.skeleton, index, of_block)
        writer.finish(self.skeleton, list(results))

    def _settings(self, num_shards: int) -> WorkerSettings:
        return WorkerSettings(
            source=self.skeleton.source,
            dtype=self.skeleton.dtype,
            device=self.job.model_config.device,
            layout=self.layout,
            quantizer=_without_state(self.job.quantizer),
            qep=self.job.qep,
            num_shards=num_shards,
            run=self.run,
            writer=None if self.output is None else self._output_writer(),
        )

    def _output_writer(self) -> CheckpointWriter:
        return self.writer(self.run.checkpoint, dequantized=not has_format(self.job.quantizer))

    def _finish_checkpoint(self) -> None:
        self._output_writer().finish(self.skeleton, self.layout.layer_names)
        install_checkpoint(self.run.checkpoint, self.output)


def _without_state(quantizer: Quantizer) -> Quantizer:
    """The settings alone: results of an earlier run need not travel to the workers."""
    settings = copy.copy(quantizer)
    settings.results, settings.module_to_name = {}, {}
    return settings


def _checked_skeleton(job: QuantizationJob) -> Skeleton:
    """The model without weights; its files hold every one of them."""
    skeleton = Skeleton.build(job.model_config.source, job.model_config.torch_dtype)
    require_stored_tensors(skeleton)
    return skeleton


def _samples(job: QuantizationJob, skeleton: Skeleton) -> CalibrationSamples | None:
    if not job.quantizer.flag_calibration:
        return None
    require_positions(
        skeleton.model,
        job.calibration.max_length,
        may_extrapolate=job.calibration.dataset_name != SELF,
    )
    tokenizer = job.model_config.load_tokenizer()
    return prepare_calibration_samples(job.calibration, tokenizer, job.model_config.load_model)


def _absolute(path: Path) -> Path:
    """The path as every process understands it, whatever its working directory."""
    return path.expanduser().absolute()


def _require_places(
    run: RunDirectory, output: Path | None, source: ModelSource, *, may_replace: bool
) -> None:
    require_apart(output, run.path, source.directory)
    require_directory(run.path)
    if output is None:
        return
    require_directory(output)
    if not may_replace and not _wrote_part_of(run, output):
        require_no_checkpoint(output)


def _has_checkpoint_in_place(run: RunDirectory, output: Path | None) -> bool:
    return output is None or ((output / CONFIG).is_file() and not run.checkpoint.exists())


def _wrote_part_of(run: RunDirectory, output: Path) -> bool:
    """Whether the output holds what the run put there: all of it once, or some when it ended."""
    if (output / CONFIG).exists() or not run.exists or run.record()["output"] != str(output):
        return False
    return run.checkpoint.is_dir() or bool(run.events("finished"))
