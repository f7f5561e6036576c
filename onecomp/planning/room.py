"""Whether a run fits into what its executor has, asked before anything is written."""

import logging
import time
from dataclasses import replace
from pathlib import Path

from onecomp.calibration import CalibrationSamples
from onecomp.errors import UserError
from onecomp.executor import Executor
from onecomp.job import QuantizationJob
from onecomp.models import Skeleton
from onecomp.planning.amounts import size
from onecomp.planning.estimate import Estimate
from onecomp.planning.fit import compare, in_one_line, require_fit, shortages
from onecomp.planning.hardware import CPU, load_table
from onecomp.planning.request import Place, estimate_job
from onecomp.resources import Resources, free_disk
from onecomp.storage import AnyPath

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0
"""What a run that has just ended held is given back by then."""


def require_room(
    job: QuantizationJob,
    skeleton: Skeleton,
    samples: CalibrationSamples | None,
    executor: Executor,
    run_dir: AnyPath,
    *,
    has_checkpoint: bool,
    goes_on: bool,
) -> None:
    """Check that a run fits, as far as it is known what it needs and what there is.

    Args:
        job: What is made.
        skeleton: The model without weights.
        samples: Calibration tokens.
        executor: Where the work will run; not started yet.
        run_dir: Where the run directory is or will be.
        has_checkpoint: Whether a checkpoint is written.
        goes_on: Whether what is in the run directory is a part of what will be there.

    Raises:
        InputError: It does not fit; nothing was written.
    """
    resources = executor.resources()
    if resources is None:
        return
    try:
        estimate = _estimate(job, skeleton, samples, resources, has_checkpoint=has_checkpoint)
    except UserError as error:
        logger.warning("not compared with the memory and disk that there are: %s", error)
        return
    resources = _with_disk(resources, run_dir, goes_on)
    if shortages(estimate, resources):
        time.sleep(LOOK_AGAIN_S)
        resources = _with_disk(executor.resources() or resources, run_dir, goes_on)
    require_fit(estimate, resources, load_table())
    if compared := compare(estimate, resources):
        logger.info("needs %s", in_one_line(compared))
    needed, store = estimate.memory.object_store_bytes, resources.object_store
    if store is not None and needed > store:
        logger.warning(
            "the object store of the smallest node holds %s of the %s that are on their way at a "
            "time: the rest goes over its disk, which is slow",
            size(store), size(needed),
        )  # fmt: skip


def _estimate(
    job: QuantizationJob,
    skeleton: Skeleton,
    samples: CalibrationSamples | None,
    resources: Resources,
    *,
    has_checkpoint: bool,
) -> Estimate:
    """What the run needs; on any kind of GPU it is the same."""
    is_on_gpus = resources.has_gpus and job.model_config.device.startswith(("auto", "cuda"))
    gpu = next(kind for kind in load_table().devices if (kind != CPU) == is_on_gpus)
    place = Place(0 if resources.in_process else resources.num_workers, gpu=gpu)
    estimate = estimate_job(job, skeleton, samples, place)
    costs = replace(
        estimate.costs, num_workers=resources.num_workers, has_checkpoint=has_checkpoint
    )
    return replace(estimate, costs=costs)


def _with_disk(resources: Resources, run_dir: AnyPath, goes_on: bool) -> Resources:
    """With what is free on the disk of a local run directory, and what lies there already."""
    if not isinstance(run_dir, Path):
        return resources
    held = sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file()) if goes_on else 0
    return replace(resources, run_disk=free_disk(run_dir) + held)
