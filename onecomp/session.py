"""One job from its checks to its checkpoint: what ``Runner.run`` and the command line both do."""

import copy
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onecomp.calibration import CalibrationSamples, prepare_calibration_samples
from onecomp.calibration.shards import cut_shards
from onecomp.errors import InputError
from onecomp.executor import Executor
from onecomp.export.checkpoint import CONFIG, SINGLE_SHARD
from onecomp.export.save import CheckpointWriter, has_format
from onecomp.job import (
    QuantizationJob,
    differences,
    find_layers,
    log_coverage,
    require_same_identity,
)
from onecomp.log import format_duration
from onecomp.models import ModelLayout, Skeleton
from onecomp.pipeline import quantize_model
from onecomp.progress import Progress
from onecomp.quantizer import QuantizationResult, Quantizer
from onecomp.store import RunDirectory
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
    """Whether what the run directory holds is removed when the work starts."""
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
        run = RunDirectory(run_dir)
        if output is not None and not overwrite and not _is_being_installed(run, output):
            require_no_checkpoint(output)
        skeleton = Skeleton.build(job.model_config.source, job.model_config.torch_dtype)
        layout = find_layers(job.quantizer, skeleton)
        samples = samples or _samples(job)
        begin_anew = overwrite or not run.exists
        if not begin_anew:
            require_same_identity(run_dir, run.record(), job.record(samples))
        return cls(job, run, skeleton, layout, samples, output, begin_anew, evaluation_text)

    @classmethod
    def reopen(cls, run_dir: Path) -> "Session":
        """The session of an interrupted run, from its directory alone.

        Raises:
            InputError: No run, or a model that changed since.
        """
        run = RunDirectory(run_dir)
        record = run.record()
        job = QuantizationJob.from_record(record)
        skeleton = Skeleton.build(job.model_config.source, job.model_config.torch_dtype)
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
        output = None if record["output"] is None else Path(record["output"])
        layout = find_layers(job.quantizer, skeleton)
        return cls(
            job, run, skeleton, layout, samples, output, begin_anew=False,
            evaluation_text=record.get("evaluation_text"),
        )  # fmt: skip

    @property
    def is_finished(self) -> bool:
        """Whether every block is quantized and the checkpoint is in its place."""
        if not all(self.run.has_block(block.index) for block in self.layout.blocks):
            return False
        if self.output is None:
            return True
        return (self.output / CONFIG).is_file() and not self.run.checkpoint.exists()

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
            self.run.clear()
        record = self.job.record(self.samples)
        record["created"] = self.run.created()
        record["output"] = None if self.output is None else str(self.output.resolve())
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


def _samples(job: QuantizationJob) -> CalibrationSamples | None:
    if not job.quantizer.flag_calibration:
        return None
    tokenizer = job.model_config.load_tokenizer()
    return prepare_calibration_samples(job.calibration, tokenizer, job.model_config.load_model)


def require_no_checkpoint(output: Path) -> None:
    """Check that a directory holds no model.

    Raises:
        InputError: It does, or it is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(output, "is a file. Give a directory that does not exist yet.")
    if (output / CONFIG).exists() or any(output.glob("*.safetensors")):
        raise InputError(
            output,
            "already holds a checkpoint. Give another --output, or --overwrite to replace it "
            "when the new one is complete.",
        )


def _is_being_installed(run: RunDirectory, output: Path) -> bool:
    """Whether a run was interrupted while it moved its checkpoint to its place."""
    if (output / CONFIG).exists() or not run.exists or not run.checkpoint.is_dir():
        return False
    return run.record()["output"] == str(output.resolve())


def install_checkpoint(staging: Path, output: Path) -> None:
    """Move a complete checkpoint to its place; weights of an older one there are removed."""
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).unlink(missing_ok=True)  # no checkpoint until the last file is there
    new = sorted(staging.iterdir(), key=lambda path: path.name == CONFIG)
    stale = {*output.glob("model-*.safetensors"), output / SINGLE_SHARD}
    for path in stale - {output / new_path.name for new_path in new}:
        path.unlink(missing_ok=True)
    for path in new:
        shutil.move(path, output / path.name)
    staging.rmdir()
