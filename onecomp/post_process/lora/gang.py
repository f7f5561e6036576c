"""Training adapters by several workers together, each with the whole quantized model."""

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from onecomp.errors import ConfigError
from onecomp.export.live import save_live_model
from onecomp.post_process.gang import Gang, GangRequest, default_gang
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.train import TOKEN_FILE, LoraJob
from onecomp.post_process.training import Progress

LOOP = "onecomp.post_process.lora.gang_worker:train"
CHECKPOINT_FOLDER = "checkpoint"
TRAINED_FILE = "trained.safetensors"
SHARED_FOLDER = "training"


def train_together(
    job: LoraJob, model: PreTrainedModel, request: GangRequest, output_dir: Path | None
) -> Progress:
    """Train the adapters of a model as a Ray Train job; afterwards they are the best found.

    Each worker reads the model from a checkpoint that is written here.

    Args:
        job: Samples, losses and settings.
        model: On the CPU, with fresh adapters.
        request: Which workers are wanted.
        output_dir: Where the adapter goes; on a cluster of several machines all of them see it.

    Raises:
        ConfigError: A cluster of several machines, and no directory that they share.
        InputError: The teacher's answers do not fit the disk.
    """
    with default_gang(request) as gang:
        shared = _shared_directory(job, gang, output_dir)
        placed = replace(job, directory=shared)
        job.teaching.check_room(job.tokens(), shared)
        save_live_model(model, shared / CHECKPOINT_FOLDER)
        progress = Progress(**gang.run(LOOP, placed, shared))
        trained = load_file(shared / TRAINED_FILE)
        for name, parameter in adapter_parameters(model).items():
            parameter.data.copy_(trained[name])
        if shared != job.directory:
            shutil.rmtree(shared)
    return progress


def _shared_directory(job: LoraJob, gang: Gang, output_dir: Path | None) -> Path:
    """Where every worker sees the samples: beside the adapter, if there are several machines."""
    if gang.is_one_machine:
        return job.directory
    if output_dir is None:
        raise ConfigError(
            job.teaching.process,
            [
                "output_dir=None: the workers are on several machines and need a directory that "
                "all of them see. Set output_dir to one."
            ],
        )
    shared = output_dir / SHARED_FOLDER
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    shutil.copy(job.directory / TOKEN_FILE, shared / TOKEN_FILE)
    return shared
