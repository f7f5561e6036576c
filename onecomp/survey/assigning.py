"""Which child each layer gets: measured, decided, and stored.

RUN/
  survey/             run.json, blocks/, curvature/: what each candidate would do to each layer
  assignment.json     which child each layer has; present means decided
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import cut_shards
from onecomp.errors import InputError
from onecomp.executor import Executor
from onecomp.export.checkpoint import write_json
from onecomp.losses import Patience
from onecomp.models.layout import ModelLayout
from onecomp.pipeline import quantize_model
from onecomp.progress import Progress
from onecomp.quantizer.autobit import Assignment, AutoBitQuantizer, SurveyResult
from onecomp.quantizer.autobit.assigning import NOTABLE_BITS
from onecomp.quantizer.autobit.heatmap import save_heatmap
from onecomp.storage import remove_tree
from onecomp.store import ASSIGNMENT_FILE, SURVEY, RunDirectory
from onecomp.survey.curvature import measure_curvature
from onecomp.worker import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SurveyPlan:
    """How a survey runs.

    Args:
        samples: Makes the survey's calibration tokens; None for a method that reads no text.
        num_shards: Calibration shards; None for the usual number.
        executor: Where the work runs.
        patience: When to give up on lost or hanging workers.
        silent: Show no progress.
    """

    samples: Callable[[], CalibrationSamples | None]
    num_shards: int | None
    executor: Executor
    patience: Patience
    silent: bool


def assign(method: AutoBitQuantizer, settings: WorkerSettings, plan: SurveyPlan) -> None:
    """Give a method its assignment: the one that the run directory holds, else a new one.

    Args:
        method: Its ``assignment`` is set.
        settings: Those of the run's workers, for the method.
        plan: How to measure.

    Raises:
        ConfigError: No assignment keeps to the target.
        InputError: What is stored is damaged.
    """
    shapes = shapes_of(settings.layout)
    path = settings.run.path / ASSIGNMENT_FILE
    if path.is_file():
        method.assignment = _stored(settings.run)
    else:
        started, method.assignment = time.monotonic(), None
        found = method.assign_unmeasured(shapes)
        found = found or method.assign(shapes, measure(method, settings, plan))
        settings.run.require_lease()
        write_json(path, found.record())
        settings.run.append(
            "assigned", average_bits=found.average_bits, target_bits=found.target_bits,
            seconds=time.monotonic() - started,
        )  # fmt: skip
        method.assignment = found
    _report(method, method.assignment)


def shapes_of(layout: ModelLayout) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of every layer."""
    return {name: shape for group in layout.groups for name, shape in group.shapes.items()}


def measure(
    method: AutoBitQuantizer, settings: WorkerSettings, plan: SurveyPlan
) -> dict[str, list[float]]:
    """The error that each candidate makes of each layer; infinite where it is not for the layer."""
    survey = method.survey()
    samples = plan.samples() if survey.flag_calibration else None
    run = _survey_directory(settings.run, samples)
    shards = [] if samples is None else cut_shards(samples, plan.num_shards)
    settings = replace(
        settings, quantizer=survey, qep=None, writer=None, run=run, num_shards=len(shards)
    )
    logger.info(
        "surveying %d candidates for %d layers",
        len(survey.quantizers), len(settings.layout.layer_names),
    )  # fmt: skip
    with Progress(len(settings.layout.blocks), len(run.block_files()), silent=plan.silent) as shown:
        quantize_model(settings, shards, plan.executor, shown, plan.patience)
    curvature: Mapping[str, Tensor] = {}
    if survey.flag_hessian and method.use_curvature_b:
        curvature = measure_curvature(settings, shards, plan.executor, plan.patience)
    results = run.results()
    usual = torch.cat(list(curvature.values())).mean() if curvature else torch.tensor(1.0)
    return {name: _errors(results[name], curvature.get(name, usual)) for name in results}


def _survey_directory(run: RunDirectory, samples: CalibrationSamples | None) -> RunDirectory:
    """Where the survey keeps what it finds; what an earlier one found of the same text goes on."""
    survey = RunDirectory(run.path / SURVEY, run_id=run.run_id)
    record = {
        "run_id": run.run_id,
        "created": run.created(),
        "calibration": None if samples is None else samples.content_hash(),
    }
    if not survey.exists or survey.record() != record:
        remove_tree(survey.path)
        survey.begin(record, None)
    return survey


def _errors(result: SurveyResult, curvature: Tensor) -> list[float]:
    """Change of the loss, to second order, by each candidate: over all tokens that the layer sees.

    Args:
        result: Errors of the rows; a layer that no token reached counts as one token.
        curvature: Of the loss by each output, or by all alike.
    """
    by_row = result.errors.double() * curvature
    return (by_row.sum(dim=1) * (max(result.num_tokens, 1) / 2)).tolist()


def _stored(run: RunDirectory) -> Assignment:
    path = run.path / ASSIGNMENT_FILE
    try:
        return Assignment.from_record(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            path, f"cannot be read ({error!r}). Begin anew in another directory."
        ) from error


def _report(method: AutoBitQuantizer, found: Assignment) -> None:
    """Log what was decided, and draw it if that was asked for."""
    counts = [
        f"{found.num_layers()[number]} x {child.name}" for number, child in method.used_children()
    ]
    average, target = found.average_bits, found.target_bits
    known = "unknown" if average is None else f"{average:.3f}"
    wanted = "" if target is None else f" of {target:.3f}"
    logger.info("assigned %s%s bits a weight with scales: %s", known, wanted, ", ".join(counts))
    if target is not None and (average or 0.0) < target - NOTABLE_BITS:
        reason = (
            "DBF has no room for more"
            if found.dbf_bits
            else "none nearer to it has a smaller error"
        )
        logger.warning("the assignment takes %s bits a weight of %.3f: %s", known, target, reason)
    if method.save_path is not None:
        _draw(found, method.save_path)


def _draw(found: Assignment, path: str) -> None:
    """A picture that cannot be written is no reason to lose a run."""
    try:
        save_heatmap(found, path)
    except OSError as error:
        logger.warning("save_path=%s: the assignment was not drawn (%s)", path, error)
