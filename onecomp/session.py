"""One job from its checks to its checkpoint: what ``Runner.run`` and the command line both do."""

import copy
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from upath import UPath

from onecomp.calibration import CalibrationConfig, CalibrationSamples, prepare_calibration_samples
from onecomp.calibration.config import SELF
from onecomp.calibration.shards import CalibrationShard, cut_shards
from onecomp.errors import InputError
from onecomp.executor import Executor
from onecomp.export.install import install_checkpoint, require_no_checkpoint
from onecomp.export.save import CheckpointWriter, has_format
from onecomp.job import (
    QuantizationJob,
    differences,
    find_layers,
    log_coverage,
    require_same_identity,
)
from onecomp.lease import LeaseLostError, require_free
from onecomp.log import format_duration
from onecomp.losses import Patience
from onecomp.models import (
    ModelLayout,
    Skeleton,
    require_known_tokens,
    require_positions,
    require_stored_tensors,
)
from onecomp.pipeline import quantize_model
from onecomp.places import (
    find_run,
    found_run_id,
    has_checkpoint_in_place,
    has_own_checkpoint,
    require_places,
)
from onecomp.planning.room import require_room
from onecomp.progress import Progress
from onecomp.quantizer import AutoBitQuantizer, QuantizationResult, Quantizer
from onecomp.schedule import useful_workers
from onecomp.storage import AnyPath, open_path
from onecomp.store import RUN_FILE, RunDirectory
from onecomp.survey import SurveyPlan, assign
from onecomp.worker import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A job that passed every check, bound to its run directory."""

    job: QuantizationJob
    run: RunDirectory
    """With the ``run_id`` that was found in it."""
    skeleton: Skeleton
    layout: ModelLayout
    samples: CalibrationSamples | None
    output: AnyPath | None
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
        run_dir: str | Path | UPath,
        *,
        output: str | Path | UPath | None = None,
        overwrite: bool = False,
        samples: CalibrationSamples | None = None,
        evaluation_text: str | None = None,
    ) -> "Session":
        """Check everything that can be checked before any worker starts.

        What the same job has begun in the run directory goes on; if it ended, nothing is left.

        Args:
            job: What to make.
            run_dir: New, or begun by the same job; a local path or a URL, as ``output``.
            output: New checkpoint directory.
            overwrite: Begin anew in a run directory that exists, and replace the checkpoint.
            samples: Calibration tokens; None makes them as the job says.
            evaluation_text: What to evaluate on afterwards, for the record.

        Raises:
            UserError: The first thing that does not fit; nothing was changed.
        """
        run, output = find_run(run_dir), None if output is None else open_path(output)
        require_free(run.path)
        may_be_done = not overwrite and has_own_checkpoint(run, output)
        require_places(run, output, job.model_config.source, may_replace=overwrite or may_be_done)
        skeleton = _checked_skeleton(job)
        layout = find_layers(job.quantizer, skeleton)
        samples = samples or _samples(job, skeleton)
        if samples is not None:
            require_known_tokens(skeleton.model, samples.input_ids)
        begin_anew = overwrite or not run.exists
        if not begin_anew:
            require_same_identity(run.path, run.record(), job.record(samples))
        session = cls(
            job, run, skeleton, layout, samples, output, begin_anew, overwrite, evaluation_text
        )
        if may_be_done and not session.is_finished:
            require_no_checkpoint(output)
        return session

    @classmethod
    def reopen(cls, run_dir: str | Path | UPath) -> "Session":
        """The session of an interrupted run, from its directory alone.

        Raises:
            InputError: No run, one that a driver works on, or a model that changed since.
        """
        run = find_run(run_dir)
        record = run.record()
        require_free(run.path)
        try:
            job = QuantizationJob.from_record(record)
            output = None if record["output"] is None else open_path(record["output"])
            may_replace, evaluation_text = record["overwrite"], record["evaluation_text"]
        except (KeyError, TypeError) as error:
            raise InputError(
                run.path / RUN_FILE,
                f"does not describe a run of this version ({error!r}). Begin anew elsewhere.",
            ) from error
        if not has_checkpoint_in_place(run, output):
            require_places(run, output, job.model_config.source, may_replace=may_replace)
        skeleton = _checked_skeleton(job)
        samples = run.samples()
        now = job.record(samples)
        if changed := differences(record, now):
            raise InputError(run.path, f"its inputs changed since it began ({'; '.join(changed)}).")
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
        finished = self.run.block_files()
        if self.begin_anew or not all(block.index in finished for block in self.layout.blocks):
            return False
        return has_checkpoint_in_place(self.run, self.output)

    @cached_property
    def _shards(self) -> list[CalibrationShard]:
        """The samples as workers will hold them."""
        return [] if self.samples is None else cut_shards(self.samples, self.job.num_shards)

    def quantize(
        self,
        executor: Executor,
        *,
        report_progress: bool = True,
        patience: Patience | None = None,
    ) -> None:
        """Quantize every block that is not finished, and put the checkpoint in its place.

        Args:
            executor: Where the work runs; its owner stops it.
            report_progress: A bar on a terminal, a log line per block elsewhere.
            patience: When to give up on workers that are lost or hang.

        Raises:
            InputError: The run does not fit into what the executor has; nothing was changed.
        """
        executor.limit(useful_workers(len(self._shards), self.layout.blocks))
        require_room(
            self.job, self.skeleton, self.samples, executor, self.run.path,
            has_checkpoint=self.output is not None, goes_on=not self.begin_anew,
        )  # fmt: skip
        with self.run.lease() as held:
            run = self._begin(held)
            with _end_noted(run):
                self._quantize(run, executor, report_progress, patience)

    def _quantize(
        self,
        run: RunDirectory,
        executor: Executor,
        report_progress: bool,
        patience: Patience | None,
    ) -> None:
        """``quantize`` in a directory that is this driver's alone."""
        started = time.monotonic()
        blocks, finished = self.layout.blocks, run.block_files()
        reused = sum(block.index in finished for block in blocks)
        if reused:
            logger.info("%d of %d blocks are finished already", reused, len(blocks))
        run.append(
            "started", blocks=len(blocks), finished=reused, workers=executor.num_workers,
            executor=executor.describe(),
        )  # fmt: skip
        settings = self._settings(run, len(self._shards))
        if isinstance(self.job.quantizer, AutoBitQuantizer):
            plan = SurveyPlan(
                self._survey_samples, self.job.num_shards, executor, patience or Patience(),
                silent=not report_progress,
            )  # fmt: skip
            assign(self.job.quantizer, settings, plan)
            settings = self._settings(run, len(self._shards))
        if self.output is not None and not has_format(self.job.quantizer):
            logger.warning(
                "%s has no checkpoint format: the checkpoint holds dequantized weights",
                self.job.quantizer.name,
            )
        with Progress(len(blocks), reused, silent=not report_progress) as progress:
            quantize_model(settings, self._shards, executor, progress, patience)
        run.require_lease()
        if self.output is not None:
            self._finish_checkpoint()
        run.drop_replaced()
        run.append(
            "finished",
            seconds=time.monotonic() - started,
            driver_bytes=executor.driver_bytes,
            workers=executor.num_workers,
        )
        logger.info(
            "quantized %d layers in %s, mean output error %s",
            len(self.layout.layer_names),
            format_duration(time.monotonic() - started),
            run.mean_output_error(),
        )

    def _survey_samples(self) -> CalibrationSamples | None:
        """The run's calibration tokens, or what the method asks for in their place."""
        own = cast(AutoBitQuantizer, self.job.quantizer).calibration_config
        return self.samples if own is None else _read_samples(own, self.job, self.skeleton)

    def _begin(self, run: RunDirectory) -> RunDirectory:
        """Write what is being made; the directory as workers are to find it."""
        if found_run_id(run) != self.run.run_id:
            raise InputError(
                run.path, "was changed by another driver since this one looked at it. Try again."
            )
        log_coverage(self.skeleton, self.layout)
        if self.begin_anew:
            run.set_aside()
        run_id = None if self.begin_anew else self.run.run_id
        record = self.job.record(self.samples)
        record["run_id"] = run_id or uuid.uuid4().hex
        record["created"] = run.created()
        record["output"] = None if self.output is None else str(self.output)
        record["overwrite"] = self.may_replace
        record["evaluation_text"] = self.evaluation_text
        run.begin(record, self.samples)
        run.repair_journal()
        return replace(run, run_id=record["run_id"])

    def writer(
        self,
        directory: AnyPath,
        *,
        dequantized: bool,
        pack_weights: bool = True,
        quantizer: Quantizer | None = None,
    ) -> CheckpointWriter:
        """Writes this model's checkpoint to ``directory``; by default with the job's method."""
        method = quantizer or self.job.quantizer
        return CheckpointWriter(directory, method, dequantized, pack_weights)

    def export(self, writer: CheckpointWriter, results: Mapping[str, QuantizationResult]) -> None:
        """Write a whole checkpoint from results by layer name, one block in memory at a time."""
        writer.write_outer(self.skeleton)
        for index in range(len(self.skeleton.blocks)):
            prefix = self.skeleton.block_name(index) + "."
            of_block = {name: results[name] for name in results if name.startswith(prefix)}
            writer.write_block(self.skeleton, index, of_block)
        writer.finish(self.skeleton, list(results))

    def _settings(self, run: RunDirectory, num_shards: int) -> WorkerSettings:
        return WorkerSettings(
            source=self.skeleton.source,
            dtype=self.skeleton.dtype,
            device=self.job.model_config.device,
            layout=self.layout,
            quantizer=_without_state(self.job.quantizer),
            qep=self.job.qep,
            num_shards=num_shards,
            run=run,
            writer=None if self.output is None else self._output_writer(),
        )

    def _output_writer(self) -> CheckpointWriter:
        return self.writer(self.run.checkpoint, dequantized=not has_format(self.job.quantizer))

    def _finish_checkpoint(self) -> None:
        self._output_writer().finish(self.skeleton, self.layout.layer_names)
        install_checkpoint(self.run.checkpoint, self.output)


@contextmanager
def _end_noted(run: RunDirectory) -> Iterator[None]:
    """Note in the journal why a driver ends before its run does."""
    try:
        yield
    except LeaseLostError:  # nothing here is this driver's any more
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        run.append("stopped", signal="SIGINT" if isinstance(stop, KeyboardInterrupt) else "SIGTERM")
        raise
    except Exception as error:
        run.append("failed", error=str(error))
        raise


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
    return _read_samples(job.calibration, job, skeleton) if job.quantizer.flag_calibration else None


def _read_samples(
    calibration: CalibrationConfig, job: QuantizationJob, skeleton: Skeleton
) -> CalibrationSamples:
    require_positions(
        skeleton.model,
        calibration.max_length,
        may_extrapolate=calibration.dataset_name != SELF,
    )
    tokenizer = job.model_config.load_tokenizer()
    return prepare_calibration_samples(calibration, tokenizer, job.model_config.load_model)
