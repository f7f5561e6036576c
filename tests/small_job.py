"""A small job that takes every path of the loop, and its bytes: shared by several tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from worker_settings import worker_settings

from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import CalibrationShard, cut_shards
from onecomp.executor import Executor
from onecomp.losses import Patience
from onecomp.models import ModelSource, Skeleton
from onecomp.pipeline import quantize_model
from onecomp.progress import Progress
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ
from onecomp.worker import WorkerSettings

NUM_SHARDS = 9
LENGTH = 128
"""Shards have 2 or 3 samples: more tokens than half of 256, some of them less than half of 768."""
STRATEGIES = {"full-precision inputs": None, "error propagation": QEPConfig()}


@dataclass(frozen=True)
class Made:
    """What a run left, and what it took to get there."""

    files: dict[str, bytes]
    results: dict[str, Tensor]
    driver_bytes: int


def small_skeleton(tiny_model_dir: Callable[..., Path], num_layers: int = 2) -> Skeleton:
    directory = tiny_model_dir(
        "llama", hidden_size=256, intermediate_size=768, num_layers=num_layers
    )
    return Skeleton.build(ModelSource.open(directory), torch.float32)


def samples(count: int = 19) -> CalibrationSamples:
    """Random tokens; two samples end in padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (count, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[4, 100:] = 0
    mask[11, 7:] = 0
    return CalibrationSamples(ids, mask)


def settings(skeleton: Skeleton, qep: QEPConfig | None, run: Path) -> WorkerSettings:
    quantizer = GPTQ(wbits=4, groupsize=64, actorder=True, static_groups=True, mse=True)
    return worker_settings(skeleton, quantizer, qep, NUM_SHARDS, run)


def shards(count: int = 19) -> list[CalibrationShard]:
    return cut_shards(samples(count), NUM_SHARDS)


def make(
    settings: WorkerSettings,
    executor: Executor,
    held: Sequence[CalibrationShard],
    patience: Patience | None = None,
) -> Made:
    """Quantize to the end; stops the executor."""
    before = executor.driver_bytes
    try:
        with Progress(len(settings.layout.blocks), silent=True) as progress:
            quantize_model(settings, held, executor, progress, patience)
    finally:
        executor.stop()
    files = sorted(settings.run.checkpoint.iterdir())
    results = settings.run.results()
    return Made(
        {path.name: path.read_bytes() for path in files},
        {name: results[name].dequantize() for name in results},
        executor.driver_bytes - before,
    )


def assert_same(found: Made, expected: Made) -> None:
    assert found.files.keys() == expected.files.keys()
    for name, content in expected.files.items():
        assert found.files[name] == content, name
    assert found.results.keys() == expected.results.keys()
    for name, weight in expected.results.items():
        assert torch.equal(found.results[name], weight), name
