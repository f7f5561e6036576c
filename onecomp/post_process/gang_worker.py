"""What each worker of a gang does: its part of a training; imported by workers only.

Importing DeepSpeed takes seconds, so that nothing else imports this module.
"""

import socket
from dataclasses import asdict
from typing import Any

import torch
from torch import distributed

from onecomp.errors import InputError
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.post_process.deepspeed_engine import DeepSpeedEngine, partition, start_deepspeed
from onecomp.post_process.gang import GangMember
from onecomp.post_process.gang_checkpoints import GangCheckpoints, resume
from onecomp.post_process.gang_device import device_of_rank
from onecomp.post_process.gang_job import PROGRESS_FILE, TRAINED_FILE, GangJob, read_samples
from onecomp.post_process.gang_student import held_bytes, load_student
from onecomp.post_process.gang_teacher import gang_teacher
from onecomp.post_process.global_ptq import distillation_task
from onecomp.post_process.student import Student
from onecomp.post_process.training import Progress, Training


def train(job: GangJob, member: GangMember) -> dict[str, Any]:
    """Train a checkpoint together with the other ranks; the result lies in the job's directory.

    Returns:
        Where training ended, and the most bytes of weights that a rank held, as plain JSON values.

    Raises:
        InputError: This node does not see the checkpoint.
    """
    if not job.checkpoint.is_dir():
        raise InputError(
            job.checkpoint,
            f"does not exist on node {socket.gethostname()}. Checkpoint and output (in Python: "
            "output_dir) must lie where every node sees them.",
        )
    device = device_of_rank(job.model_config)
    start_deepspeed(device)
    return _train(job, member, device)


def _train(job: GangJob, member: GangMember, device: torch.device) -> dict[str, Any]:
    samples = read_samples(job.directory)
    teacher = gang_teacher(job, samples.all, device)
    sharded = load_student(
        job.checkpoint,
        job.model_config,
        job.rates.latents,
        device,
        lambda module: partition(module, job.engine),
    )
    held = held_bytes(sharded.model)
    with sharded.checkpointed(enabled=job.gradient_checkpointing):
        student = Student(sharded.model, sharded.layers, job.uses_bf16)
        num_steps = job.course.epochs * job.course.steps_per_epoch(member.world_size)
        groups = student.groups(job.rates, num_steps)
        engine = DeepSpeedEngine(sharded.model, groups, student.parameters(), job.engine)
        student = Student(engine.model, sharded.layers, job.uses_bf16)
        task = distillation_task(student, samples, teacher, job.weights, engine)
        training = Training(engine, job.course, task, GangCheckpoints(job, member, engine))
        resume(training, engine, member)
        progress = training.run()
    return _leave_result(job, engine, progress, _most(held, device))


def _leave_result(
    job: GangJob, engine: DeepSpeedEngine, progress: Progress, held: int
) -> dict[str, Any]:
    state = engine.state()
    result = {**asdict(progress), "held_bytes": held, "num_workers": engine.world_size}
    if engine.rank == 0:
        write_shard(job.directory, TRAINED_FILE, state)
        write_json(job.directory / PROGRESS_FILE, result)
    distributed.barrier()
    return result


def _most(number: int, device: torch.device) -> int:
    most = torch.tensor(number, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)
