"""What each worker of a gang does to train adapters; imported by workers only."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from onecomp.errors import InputError
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.export.load import load_quantized_model
from onecomp.models import ModelConfig
from onecomp.post_process.engine import LocalEngine
from onecomp.post_process.gang import GangMember
from onecomp.post_process.gang_device import device_of_rank
from onecomp.post_process.lora.adapter import adapter_parameters, adapters_on_trial
from onecomp.post_process.lora.gang import CHECKPOINT_FOLDER, TRAINED_FILE
from onecomp.post_process.lora.replicated import ReplicatedEngine
from onecomp.post_process.lora.student import adapted_model
from onecomp.post_process.lora.train import LoraJob, lora_task
from onecomp.post_process.training import Checkpoints, Progress, Training

NOW_FILE, BEST_FILE, MOMENTS_FILE = "now.safetensors", "best.safetensors", "moments.safetensors"
PROGRESS_FILE = "progress.json"


def train(job: LoraJob, member: GangMember) -> dict[str, Any]:
    """Train adapters together with the other ranks; rank 0 leaves them in the job's directory.

    Returns:
        Where training ended, as plain JSON values.

    Raises:
        InputError: This node does not see the job's directory.
    """
    checkpoint = job.directory / CHECKPOINT_FOLDER
    if not checkpoint.is_dir():
        raise InputError(
            checkpoint,
            f"does not exist on node {socket.gethostname()}. Set output_dir to a directory that "
            "every node sees.",
        )
    model, _ = load_quantized_model(
        checkpoint, device_map="cpu", trust_remote_code=job.model_config.trust_remote_code
    )
    layers = {name: model.get_submodule(name) for name in job.targets}
    with adapters_on_trial(model, layers, job.config, job.seed):
        return asdict(_train(_on_this_rank(job), member, model))


def _on_this_rank(job: LoraJob) -> LoraJob:
    """The job with this rank's own GPU, for the teacher too, wherever it names one."""
    return replace(
        job,
        model_config=_placed(job.model_config),
        teaching=replace(job.teaching, teacher=_placed(job.teaching.teacher)),
    )


def _placed(model_config: ModelConfig) -> ModelConfig:
    return replace(model_config, device=str(device_of_rank(model_config)))


def _train(job: LoraJob, member: GangMember, model: PreTrainedModel) -> Progress:
    answers = job.answers(member.rank, member.world_size)
    distributed.barrier()  # each rank has kept its share of the teacher's answers
    with adapted_model(
        model, job.model_config, uses_bf16=job.uses_bf16, seed=job.seed + member.rank
    ) as student:
        local = job.local_engine(student)
        engine = ReplicatedEngine(local, list(adapter_parameters(model).values()))
        task = lora_task(job, student, answers, engine)
        training = Training(engine, job.course, task, EpochCheckpoints(job, member, local))
        resume(training, local, member)
        progress = training.run()
        if member.rank == 0:
            write_shard(job.directory, TRAINED_FILE, engine.state())
    distributed.barrier()
    return progress


class EpochCheckpoints(Checkpoints):
    """Saves after every epoch but the last; all ranks are in the same state.

    Args:
        job: Has the number of epochs.
        member: Saves.
        engine: Whose state is saved.
    """

    def __init__(self, job: LoraJob, member: GangMember, engine: LocalEngine):
        self.job, self.member, self.engine = job, member, engine

    def due(self, progress: Progress, *, epoch_ended: bool) -> bool:
        """After an epoch that is not the last."""
        return epoch_ended and progress.epoch < self.job.course.epochs

    def save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """What is trained, now and at its best, and the optimizer's moments."""

        def write(folder: Path) -> None:
            if self.member.rank == 0:
                write_shard(folder, NOW_FILE, self.engine.state())
                write_shard(folder, BEST_FILE, best)
                write_shard(folder, MOMENTS_FILE, self.engine.moments())
                write_json(folder / PROGRESS_FILE, asdict(progress))

        self.member.save(write)


def resume(training: Training, engine: LocalEngine, member: GangMember) -> None:
    """Go on where the last checkpoint was made, if there is one."""
    if member.restored is None:
        return
    found = json.loads((member.restored / PROGRESS_FILE).read_text(encoding="utf-8"))
    engine.restore(load_file(member.restored / NOW_FILE))
    engine.restore_moments(load_file(member.restored / MOMENTS_FILE))
    training.resume(Progress(**found), load_file(member.restored / BEST_FILE))
