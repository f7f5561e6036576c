"""Every method makes the same bytes in this process and on workers of Ray."""

from collections.abc import Callable
from pathlib import Path

import pytest
from every_method import METHODS
from shared_cluster import FirstWorkers
from small_job import Made, assert_same, make, shards, small_skeleton
from worker_settings import worker_settings

from actors.executor import RayExecutor
from onecomp.executor import Executor, LocalExecutor
from onecomp.models import Skeleton
from onecomp.qep import QEPConfig
from onecomp.quantizer import Quantizer
from onecomp.quantizer.several import Several

NUM_SHARDS = 9
WHOLE_LAYERS = [name for name, new in METHODS.items() if not new().row_separable]
BY_ROWS = [name for name in METHODS if name not in WHOLE_LAYERS]
TOGETHER = [names for names in (BY_ROWS, WHOLE_LAYERS) if names]


@pytest.fixture(scope="module")
def skeleton(tiny_model_dir: Callable[..., Path]) -> Skeleton:
    return small_skeleton(tiny_model_dir)


def made(
    skeleton: Skeleton, quantizer: Quantizer, qep: QEPConfig | None, run: Path, executor: Executor
) -> Made:
    settings = worker_settings(skeleton, quantizer, qep, NUM_SHARDS, run)
    return make(settings, executor, shards() if quantizer.flag_calibration else [])


def several(names: list[str]) -> Several:
    return Several(quantizers=[METHODS[name](name=name) for name in names])


@pytest.fixture(scope="module")
def alone(skeleton, tmp_path_factory) -> list[Made]:
    """Methods that solve rows, and those that solve whole layers, by one worker here."""
    root = tmp_path_factory.mktemp("alone")
    return [
        made(skeleton, several(names), None, root / str(i), LocalExecutor(1))
        for i, names in enumerate(TOGETHER)
    ]


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("together", range(len(TOGETHER)))
def test_on_the_original_models_inputs(
    skeleton, alone, tmp_path, ray_executor: RayExecutor, together, num_workers
):
    quantizer = several(TOGETHER[together])
    executor = FirstWorkers(ray_executor, num_workers)
    assert_same(made(skeleton, quantizer, None, tmp_path / "run", executor), alone[together])


@pytest.mark.ray
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name]().flag_hessian])
def test_with_errors_propagated(skeleton, tmp_path, ray_executor: RayExecutor, method):
    here, on_ray = (
        made(skeleton, METHODS[method](), QEPConfig(), tmp_path / name, executor)
        for name, executor in (
            ("here", LocalExecutor(1)),
            ("on Ray", FirstWorkers(ray_executor, 2)),
        )
    )
    assert_same(on_ray, here)
