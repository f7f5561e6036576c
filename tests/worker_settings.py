"""Settings of a run's workers, for tests that call the loop without a session."""

from pathlib import Path

import torch

from onecomp.export.save import CheckpointWriter, has_format
from onecomp.job import find_layers
from onecomp.models import Skeleton
from onecomp.qep import QEPConfig
from onecomp.quantizer import Quantizer
from onecomp.store import RunDirectory
from onecomp.worker import WorkerSettings


def worker_settings(
    skeleton: Skeleton, quantizer: Quantizer, qep: QEPConfig | None, num_shards: int, run: Path
) -> WorkerSettings:
    """For a run that begins in ``run`` and writes its checkpoint to ``run / "checkpoint"``."""
    directory = RunDirectory(run)
    directory.begin({}, None)
    return WorkerSettings(
        skeleton.source,
        torch.float32,
        "cpu",
        find_layers(quantizer, skeleton),
        quantizer,
        qep,
        num_shards,
        directory,
        CheckpointWriter(directory.checkpoint, quantizer, not has_format(quantizer)),
    )
