"""Estimates: bounds that hold, and memory, disk and network that follow the shapes."""

import pytest

from onecomp.calibration import CalibrationConfig
from onecomp.executor import LocalExecutor
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN
from onecomp.session import Session

GIB = 2**30


@pytest.mark.parametrize("qep", [True, False])
@pytest.mark.parametrize("num_workers", [1, 8, 64])
def test_a_run_takes_its_share_of_the_work_or_the_longest_chain(
    llama_405b, estimate_of, qep, num_workers
):
    estimate = estimate_of(llama_405b, qep=qep, num_workers=num_workers)
    work = estimate.wall_s - estimate.settings.startup_s
    assert work == max(estimate.work_s / num_workers, estimate.chain_s)
    assert sum(phase.seconds for phase in estimate.phases) == pytest.approx(estimate.work_s)


def test_more_workers_take_less_time_and_less_memory_each(llama_405b, estimate_of):
    few, many = (estimate_of(llama_405b, num_workers=n) for n in (4, 16))
    assert many.wall_s < few.wall_s
    few_held, many_held = (e.memory.worker.parts["suspended passes"] for e in (few, many))
    assert many_held == pytest.approx(few_held / 4)


def test_error_propagation_costs_more_of_everything(llama_405b, estimate_of):
    with_it, without = (estimate_of(llama_405b, qep=qep) for qep in (True, False))
    assert with_it.work_s > without.work_s
    assert with_it.chain_s > 2 * without.chain_s
    assert with_it.memory.device_bytes > without.memory.device_bytes


def test_suspended_passes_are_those_that_the_documentation_counts(llama_405b, estimate_of):
    """Two hidden states and an intermediate one, and two of the other stream, per token."""
    estimate = estimate_of(llama_405b, num_workers=8)
    assert estimate.memory.worker.what.endswith("down_proj")
    tokens, hidden, inner = 128 * 2048 / 8, 16384, 53248
    expected = tokens * 2 * (4 * hidden + inner)
    assert estimate.memory.worker.parts["suspended passes"] == pytest.approx(expected)


def test_a_single_worker_sends_nothing(tiny_model_dir, estimate_of):
    estimate = estimate_of(tiny_model_dir("llama"), num_workers=1)
    assert all(not estimate.network_bytes(kind) for kind in estimate.costs.model.kinds)


def test_the_least_possible_is_a_matrix_of_each_worker_but_the_owner(llama_405b, estimate_of):
    estimate = estimate_of(llama_405b, num_workers=8)
    [kind] = estimate.costs.model.kinds
    down = kind.groups[-1]
    symmetric = estimate.sums_sent_bytes(kind, down) / 7
    assert 0.5 < symmetric / (4 * down.in_features**2) < 0.56


def test_a_method_without_calibration_has_no_text_and_no_chain(deepseek_v3, estimate_of):
    estimate = estimate_of(deepseek_v3, quantizer=RTN(groupsize=128))
    assert {phase.name for phase in estimate.phases} == {"read", "search", "solve", "write"}
    assert estimate.memory.worker.parts.keys() == {"weights of the group", "rows being solved"}
    assert estimate.memory.calibration_bytes == 0


def test_the_price_is_of_all_workers_for_all_the_time(llama_405b, estimate_of):
    estimate = estimate_of(llama_405b, price=2.0)
    assert estimate.cost == pytest.approx(2.0 * 8 * estimate.wall_s / 3600)
    assert estimate_of(llama_405b).cost is None


@pytest.mark.parametrize(
    "quantizer", [GPTQ(groupsize=32, actorder=True, static_groups=True), RTN(groupsize=32)]
)
def test_the_run_directory_takes_as_much_as_is_said(
    tiny_model_dir, estimate_of, text, tmp_path, quantizer
):
    directory = tiny_model_dir("llama", hidden_size=128, intermediate_size=512, num_layers=2)
    job = QuantizationJob(
        ModelConfig(str(directory), dtype="float32"),
        quantizer,
        CalibrationConfig(str(text), 64, 8, strategy="concat_chunk"),
        QEPConfig() if quantizer.flag_hessian else None,
    )
    session = Session.open(job, tmp_path / "run", output=tmp_path / "out")
    executor = LocalExecutor(1)
    session.quantize(executor, report_progress=False)
    executor.stop()
    memory = estimate_of(directory, samples=8, length=64, quantizer=quantizer, gpu="CPU").memory
    results = sum(path.stat().st_size for path in (tmp_path / "run" / "blocks").iterdir())
    assert results == pytest.approx(memory.results_bytes, rel=0.1)
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert checkpoint == pytest.approx(memory.checkpoint_bytes, rel=0.05)
