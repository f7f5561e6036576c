"""What a gang's teacher says: kept in files that all ranks share, or asked of a sharded model."""

from collections.abc import Sequence

import deepspeed
import torch
from jaxtyping import Int
from torch import Tensor, distributed

from onecomp.models import ModelConfig
from onecomp.post_process.deepspeed_config import EngineConfig
from onecomp.post_process.deepspeed_engine import partition
from onecomp.post_process.distillation import WholeDistribution
from onecomp.post_process.gang_job import STREAMED, TEACHER_FOLDER, GangJob
from onecomp.post_process.gang_student import load_original
from onecomp.post_process.teacher import Teacher, cache_teacher


class ShardedTeacher(Teacher):
    """Holds a part of the original model on each rank (ZeRO-3), and asks it in every step.

    All ranks ask in step.

    Args:
        model_config: The original model.
        input_ids: All samples.
        device: Where it computes.
    """

    def __init__(
        self, model_config: ModelConfig, input_ids: Int[Tensor, "all length"], device: torch.device
    ):
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "memory_efficient_linear": False,
            },
        }
        config = EngineConfig(stage=3, deepspeed=settings)
        original = load_original(model_config, device, lambda module: partition(module, config))
        self.model, *_ = deepspeed.initialize(model=original.model, config=settings)
        self.input_ids, self.device = input_ids, device

    def distribution(self, samples: Sequence[int]) -> WholeDistribution:
        """All logits."""
        ids = self.input_ids[list(samples)].to(self.device)
        with torch.no_grad():
            return WholeDistribution(self.model(input_ids=ids, use_cache=False).logits)


def gang_teacher(
    job: GangJob, input_ids: Int[Tensor, "all length"], device: torch.device
) -> Teacher | None:
    """The teacher in the form that the job says; None where the loss does not ask it.

    Streamed, every rank carries its share of the samples through the original model, one block in
    memory at a time, and all of them read what all have kept.
    """
    if not job.weights.distill:
        return None
    if job.teacher != STREAMED:
        return ShardedTeacher(job.model_config, input_ids, device)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    teacher = cache_teacher(
        job.model_config,
        input_ids,
        job.directory / TEACHER_FOLDER,
        device=device,
        temperature=job.weights.temperature,
        samples=range(rank, len(input_ids), world_size),
    )
    distributed.barrier()
    return teacher
