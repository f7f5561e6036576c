"""Groups cut into many pieces and sums added on the way: bytes do not depend on who does it.

With tiles and thresholds of models this small, every unit of large ones is handed out.
"""

from pathlib import Path

import pytest
from every_method import METHODS
from small_job import NUM_SHARDS, STRATEGIES, Made, assert_same, make, shards, small_skeleton
from worker_settings import worker_settings

from onecomp import schedule
from onecomp.executor import LocalExecutor
from onecomp.qep import QEPConfig
from onecomp.quantizer import CQ, GPTQ, QBB, RTN, JointQ, Quantizer, pieces
from onecomp.store import RunDirectory


@pytest.fixture
def small_units(monkeypatch) -> None:
    """Pieces of 128 rows, of which all are worth sending; sums of three are worth adding."""
    monkeypatch.setattr(pieces, "CPU_TILE", (128, 128))
    monkeypatch.setitem(schedule.WORTH_SENDING, "cpu", 0.0)
    monkeypatch.setattr(schedule, "WORTH_MERGING_BYTES", 0)
    monkeypatch.setattr(schedule, "DIRECT_SENDERS", 1)
    monkeypatch.setattr(schedule, "split_largest", lambda costs, _count: list(costs))
    monkeypatch.setattr("onecomp.crew.split_largest", lambda costs, _count: list(costs))


def methods(run: Path) -> set[str]:
    units = [unit for event in RunDirectory(run).events("units") for unit in event["units"]]
    return {unit["method"] for unit in units}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("small_units")
def test_any_number_of_workers_writes_the_same(tiny_model_dir, tmp_path, strategy):
    skeleton = small_skeleton(tiny_model_dir, num_layers=3)

    def quantize(num_workers: int) -> Made:
        run = tmp_path / str(num_workers)
        quantizer = GPTQ(wbits=4, groupsize=64, actorder=True, static_groups=True, mse=True)
        work = worker_settings(skeleton, quantizer, STRATEGIES[strategy], NUM_SHARDS, run)
        return make(work, LocalExecutor(num_workers), shards())

    one, many = quantize(1), quantize(5)
    assert methods(tmp_path / "5") >= {"merge", "prepare", "quantize_pieces", "join"}
    assert_same(many, one)


BY_ROWS = {name: new for name, new in METHODS.items() if new().row_separable} | {
    "cq of groups": lambda: CQ(groupsize=32, refine_iters=2),
    "jointq in order": lambda: JointQ(bits=3, group_size=16, actorder=True, num_restarts=1),
    "jointq along a path": lambda: JointQ(
        bits=3, group_size=16, lambda_mode="incremental_lambda", regularization_mode="identity",
        num_restarts=1,
    ),
    "qbb base by base": lambda: QBB(wbits=3, use_progressive_quantization=True, iters_per_basis=2),
}  # fmt: skip


@pytest.mark.parametrize("method", BY_ROWS)
@pytest.mark.usefixtures("small_units")
def test_rows_of_every_method_are_cut_without_a_trace(tiny_model_dir, tmp_path, method):
    skeleton, qep = small_skeleton(tiny_model_dir, num_layers=1), QEPConfig()

    def quantize(num_workers: int) -> Made:
        run, quantizer = tmp_path / str(num_workers), BY_ROWS[method]()
        used = qep if quantizer.flag_hessian else None
        work = worker_settings(skeleton, quantizer, used, NUM_SHARDS, run)
        given = shards() if quantizer.flag_calibration else []
        return make(work, LocalExecutor(num_workers), given)

    one, many = quantize(1), quantize(4)
    if BY_ROWS[method]().flag_hessian:
        assert "quantize_pieces" in methods(tmp_path / "4")
    assert_same(many, one)


@pytest.mark.parametrize(
    "quantizer", [RTN(groupsize=64), RTN(groupsize=64, include_layer_keywords=["down_proj"])]
)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_without_text_every_block_is_stored_once(
    tiny_model_dir, tmp_path, quantizer: Quantizer, num_workers
):
    skeleton = small_skeleton(tiny_model_dir, num_layers=4)
    work = worker_settings(skeleton, quantizer, None, 0, tmp_path / "run")
    make(work, LocalExecutor(num_workers), [])
    events = RunDirectory(tmp_path / "run").events("units")
    stored = [u["block"] for event in events for u in event["units"] if u["method"] == "store"]
    assert sorted(stored) == [0, 1, 2, 3]
