"""What a gang saves on the way, and how it goes on from there."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from onecomp.errors import ConfigError
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.post_process.deepspeed_engine import DeepSpeedEngine
from onecomp.post_process.gang import GangMember
from onecomp.post_process.gang_job import EPOCH, PROGRESS_FILE, STEPS, GangJob
from onecomp.post_process.training import Checkpoints, Progress, Training

logger = logging.getLogger(__name__)

NOW_FILE, BEST_FILE = "now.safetensors", "best.safetensors"


class GangCheckpoints(Checkpoints):
    """Saves through the gang, as often as the job says.

    A gang of several workers is more likely to lose one, and saves every epoch in any case.

    Args:
        job: Has the strategy.
        member: Saves.
        engine: Whose state is saved.
    """

    def __init__(self, job: GangJob, member: GangMember, engine: DeepSpeedEngine):
        self.job, self.member, self.engine = job, member, engine

    def due(self, progress: Progress, *, epoch_ended: bool) -> bool:
        """Whether the strategy says so; the last state of all is not saved unasked."""
        strategy = self.job.save_strategy
        if epoch_ended:
            is_last = progress.epoch == self.job.course.epochs
            return strategy == EPOCH or (self.member.world_size > 1 and not is_last)
        num_steps = progress.num_updates + progress.skipped
        return strategy == STEPS and num_steps % self.job.save_steps == 0

    def save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """Each rank its moments; rank 0 what is trained, now and at its best."""
        now, moments = self.engine.state(), self.engine.moments()

        def write(folder: Path) -> None:
            write_shard(folder, _moments_file(self.member.rank), moments)
            if self.member.rank == 0:
                write_shard(folder, NOW_FILE, now)
                write_shard(folder, BEST_FILE, best)
                record = {**asdict(progress), "world_size": self.member.world_size}
                write_json(folder / PROGRESS_FILE, record)

        self.member.save(write)


def resume(training: Training, engine: DeepSpeedEngine, member: GangMember) -> None:
    """Go on where the last checkpoint was made, if there is one.

    Raises:
        ConfigError: A gang of another size made it.
    """
    if member.restored is None:
        return
    found = json.loads((member.restored / PROGRESS_FILE).read_text(encoding="utf-8"))
    world_size = found.pop("world_size")
    if world_size != member.world_size:
        raise ConfigError(
            "GlobalPTQDistributed",
            [
                f"the last checkpoint is of {world_size} worker(s), but there are "
                f"{member.world_size}. Repeat `onecomp postprocess` with the same --num-workers "
                "(without it: with as many GPUs as then), or with --overwrite to begin anew. In "
                "Python, give another output_dir."
            ],
        )
    engine.restore(_tensors(member.restored / NOW_FILE))
    engine.restore_moments(_tensors(member.restored / _moments_file(member.rank)))
    logger.info("resumed behind epoch %d, step %d", found["epoch"], found["step"])
    training.resume(Progress(**found), dict(_tensors(member.restored / BEST_FILE)))


def _moments_file(rank: int) -> str:
    return f"moments-{rank:05d}.safetensors"


def _tensors(path: Path) -> Mapping[str, Tensor]:
    return load_file(path)
