"""The loss's squared derivative by each output of each layer, over all workers.

Shards are measured by ``gradients.GradientWorker`` in any order, and each writes a file of its own;
the files are added in the order of the shards, so that no bit depends on who measured what.
"""

import logging
from collections import deque
from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from onecomp.calibration.shards import CalibrationShard
from onecomp.errors import WorkerError
from onecomp.executor import Executor, Ref
from onecomp.losses import Patience
from onecomp.storage import AnyPath, local_file
from onecomp.survey.gradients import SQUARES, GradientWorker, shard_file
from onecomp.watch import Unit, Watch
from onecomp.worker import WorkerSettings

logger = logging.getLogger(__name__)

CURVATURE = "curvature"
MOST_SHARDS = 16
"""Means of squares need fewer tokens than Hessians do."""


def measure_curvature(
    settings: WorkerSettings,
    shards: Sequence[CalibrationShard],
    executor: Executor,
    patience: Patience,
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss by each output, float64 ``(out,)``, by layer name.

    Args:
        settings: Those of the run; files go below its directory, and those that are there count.
        shards: The first 16 of them are measured.
        executor: Where the work runs; its workers are made anew.
        patience: How many losses of workers are too many.

    Returns:
        Layers that no token reached are missing.
    """
    directory = settings.run.path / CURVATURE
    taken = shards[:MOST_SHARDS]
    losses = 0
    while True:
        missing = [s for s in taken if not (directory / shard_file(s.index)).is_file()]
        if not missing:
            return _means([directory / shard_file(shard.index) for shard in taken])
        executor.start(GradientWorker, settings)
        try:
            _measure(missing, directory, executor, patience, len(settings.layout.blocks))
        except WorkerError as error:
            losses += 1
            if not executor.survives_losses or losses > patience.retries:
                raise
            logger.warning("%s; the shards that are not measured are handed out again", error)


def _measure(
    shards: Sequence[CalibrationShard],
    directory: AnyPath,
    executor: Executor,
    patience: Patience,
    num_blocks: int,
) -> None:
    """One shard in the hands of each worker until all are measured."""
    watch = Watch(executor, patience.unit_timeout_s * num_blocks)  # a call goes through all blocks
    waiting, running = deque(shards), dict[Ref, int]()
    idle = list(executor.workers)
    while waiting or running:
        while waiting and idle:
            worker = idle.pop()
            call = watch.call(worker, Unit("measure"), waiting.popleft(), directory)
            running[call.values[0]] = worker
        for ref in watch.wait_for_any(list(running)):
            idle.append(running.pop(ref))
            watch.fetch([ref])  # raises what the call raised


def _means(paths: Sequence[AnyPath]) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for path in paths:
        with local_file(path) as local, safe_open(local, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a file is no mapping
                name, _, kind = key.rpartition("|")
                sums = squares if kind == SQUARES else rows
                value = file.get_tensor(key).to(torch.float64)
                sums[name] = sums[name] + value if name in sums else value
    return {name: total / rows[name] for name, total in squares.items()}
