"""The same job writes the same bytes, however many workers do it, in one process or on Ray."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_cluster import FirstWorkers
from small_job import (
    LENGTH,
    NUM_SHARDS,
    STRATEGIES,
    Made,
    assert_same,
    make,
    settings,
    shards,
    small_skeleton,
)

from actors.executor import RayExecutor
from onecomp.executor import LocalExecutor
from onecomp.models import Skeleton
from onecomp.statistics import FewRows, GroupStatistics
from onecomp.worker import Worker


@pytest.fixture(scope="session")
def skeleton(tiny_model_dir: Callable[..., Path]) -> Skeleton:
    return small_skeleton(tiny_model_dir)


@pytest.fixture(scope="session")
def alone(skeleton, tmp_path_factory) -> dict[str, Made]:
    """By strategy, what one worker in this process makes."""
    root = tmp_path_factory.mktemp("alone")
    return {
        name: make(settings(skeleton, qep, root / name), LocalExecutor(1), shards())
        for name, qep in STRATEGIES.items()
    }


def test_the_run_has_uneven_shards_and_sends_sums_as_well_as_rows(skeleton, tmp_path):
    cut = shards()
    assert len(cut) == NUM_SHARDS
    assert {len(shard.input_ids) for shard in cut} == {2, 3}
    work = settings(skeleton, None, tmp_path / "run")
    worker = Worker(0, work)
    worker.hold(*cut)
    worker.begin_block(0)
    groups = work.layout.blocks[0].groups
    sent = worker.observe([group.index for group in groups])
    kinds = {
        group.in_features: {type(part.content) for part in parts}
        for group, parts in zip(groups, sent, strict=True)
    }
    assert kinds == {256: {GroupStatistics}, 768: {GroupStatistics, FewRows}}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_in_this_process_write_what_one_writes(skeleton, alone, tmp_path, strategy):
    work = settings(skeleton, STRATEGIES[strategy], tmp_path / "run")
    made = make(work, LocalExecutor(2), shards())
    assert len(made.files) == 3
    assert_same(made, alone[strategy])


def test_error_propagation_makes_something_else(alone):
    plain, propagated = alone["full-precision inputs"], alone["error propagation"]
    assert any(not torch.equal(plain.results[n], propagated.results[n]) for n in plain.results)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_workers_on_ray_write_what_one_process_writes(
    skeleton, alone, tmp_path, ray_executor: RayExecutor, strategy, num_workers
):
    work = settings(skeleton, STRATEGIES[strategy], tmp_path / "run")
    made = make(work, FirstWorkers(ray_executor, num_workers), shards())
    assert_same(made, alone[strategy])
    assert made.driver_bytes > 0
    group = work.layout.blocks[0].groups[0]
    smallest_tensor = group.in_features * min(group.out_features)  # codes, one byte each
    token_bytes = 16 * 19 * LENGTH  # ids and mask, int64
    assert made.driver_bytes - token_bytes < smallest_tensor * len(work.layout.blocks)


@pytest.mark.ray
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_more_text_the_driver_sees_the_tokens_only(
    skeleton, tmp_path, ray_executor: RayExecutor, strategy
):
    counted = []
    for count in (19, 38):
        work = settings(skeleton, STRATEGIES[strategy], tmp_path / str(count))
        counted.append(make(work, FirstWorkers(ray_executor, 2), shards(count)).driver_bytes)
    assert counted[1] - counted[0] < 16 * 19 * LENGTH + 1000
