"""Training adapters by several workers together, each with the whole quantized model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from onecomp.errors import ConfigError
from onecomp.export.live import save_live_model
from onecomp.post_process.gang import Gang, GangRequest, default_gang, fresh_directory
from onecomp.post_process.lora.adapter import adapter_parameters
from onecomp.post_process.lora.train import TOKEN_FILE, LoraJob
from onecomp.post_process.training import Progress
from onecomp.storage import remove_tree

LOOP = "onecomp.post_process.lora.gang_worker:train"
CHECKPOINT_FOLDER = "checkpoint"
TRAINED_FILE = "trained.safetensors"


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
    with default_gang(request) as gang, _shared_directory(job, gang, output_dir) as shared:
        placed = replace(job, directory=shared)
        job.teaching.check_room(job.tokens(), shared)
        save_live_model(model, shared / CHECKPOINT_FOLDER)
        progress = Progress(**gang.run(LOOP, placed, shared))
        trained = load_file(shared / TRAINED_FILE)
        for name, parameter in adapter_parameters(model).items():
            parameter.data.copy_(trained[name])
    return progress


@contextmanager
def _shared_directory(job: LoraJob, gang: Gang, output_dir: Path | None) -> Iterator[Path]:
    """Where every worker sees the samples: beside the adapter, if there are several machines.

    There it is a new directory, which is gone after the context, with errors too.
    """
    if gang.is_one_machine:
        yield job.directory
        return
    if output_dir is None:
        raise ConfigError(
            job.teaching.process,
            [
                "output_dir=None: the workers are on several machines and need a directory that "
                "all of them see. Set output_dir to one."
            ],
        )
    shared = fresh_directory(output_dir)
    try:
        shutil.copy(job.directory / TOKEN_FILE, shared / TOKEN_FILE)
        yield shared
    finally:
        remove_tree(shared)
