"""When a gang saves what it needs to go on, and which gang may go on from there."""

import json
from pathlib import Path

import pytest

from onecomp.errors import ConfigError
from onecomp.models import ModelConfig
from onecomp.post_process.deepspeed_config import EngineConfig
from onecomp.post_process.deepspeed_engine import DeepSpeedEngine
from onecomp.post_process.distillation import LossWeights
from onecomp.post_process.gang import GangMember
from onecomp.post_process.gang_checkpoints import GangCheckpoints, resume
from onecomp.post_process.gang_job import PROGRESS_FILE, GangJob
from onecomp.post_process.student import StudentRates
from onecomp.post_process.training import Course, Progress, Training

EPOCHS, STEPS_PER_EPOCH, SAVE_STEPS = 3, 4, 3
ENGINE = object.__new__(DeepSpeedEngine)
"""Never asked: there is no process group that it could belong to."""


def member(world_size: int, restored: Path | None = None) -> GangMember:
    return GangMember(0, world_size, restored, lambda _write: None)


@pytest.fixture
def model_config(tiny_model_dir) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir()), dtype="float32", device="cpu")


def saved(strategy: str, world_size: int, model_config: ModelConfig) -> tuple[list[int], list[int]]:
    """Epochs after which, and steps behind which, there is a checkpoint."""
    job = GangJob(
        directory=Path("work"),
        checkpoint=Path("checkpoint"),
        model_config=model_config,
        course=Course(num_samples=STEPS_PER_EPOCH * world_size, epochs=EPOCHS),
        weights=LossWeights(),
        rates=StudentRates(codes_scale=1e-5, signs_scale=1e-5),
        uses_bf16=False,
        gradient_checkpointing=False,
        engine=EngineConfig(stage=1, deepspeed={}),
        teacher="streamed",
        save_strategy=strategy,
        save_steps=SAVE_STEPS,
    )
    checkpoints, progress = GangCheckpoints(job, member(world_size), ENGINE), Progress()
    epochs, steps = [], []
    for epoch in range(1, EPOCHS + 1):
        for _ in range(STEPS_PER_EPOCH):
            progress.num_updates += 1
            if checkpoints.due(progress, epoch_ended=False):
                steps.append(progress.num_updates)
        progress.epoch = epoch
        if checkpoints.due(progress, epoch_ended=True):
            epochs.append(epoch)
    return epochs, steps


@pytest.mark.parametrize(
    ("strategy", "alone", "steps"),
    [("no", [], []), ("epoch", [1, 2, 3], []), ("steps", [], [3, 6, 9, 12])],
)
def test_several_workers_save_after_every_epoch_whatever_the_strategy(
    model_config, strategy, alone, steps
):
    assert saved(strategy, 1, model_config) == (alone, steps)
    epochs, of_two = saved(strategy, 2, model_config)
    assert epochs[:2] == [1, 2]
    assert epochs[2:] == alone[2:]
    assert of_two == steps


def test_a_gang_of_another_size_is_told_what_it_can_do(tmp_path):
    (tmp_path / PROGRESS_FILE).write_text(json.dumps({"world_size": 4}))
    with pytest.raises(ConfigError) as caught:
        resume(object.__new__(Training), ENGINE, member(2, tmp_path))
    [problem] = caught.value.problems
    assert problem.startswith("the last checkpoint is of 4 worker(s), but there are 2. ")
    assert "with the same --num-workers (without it: with as many GPUs as then)" in problem
    assert "--overwrite to begin anew" in problem
    assert problem.endswith("In Python, give another output_dir.")
