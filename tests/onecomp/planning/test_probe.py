"""The probe: it measures every phase by the engine's code, and leaves nothing behind."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from onecomp.errors import ConfigError, InputError
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place, Request, make_estimate, probed
from onecomp.planning.shapes import TextShape
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, Quantizer

CARRIED = {"read", "forward", "sums", "merge", "factor", "search", "solve", "write"}


def request_of(directory: Path, method: Quantizer, *, qep: bool = False) -> Request:
    text = TextShape(4, 256) if method.flag_hessian else None
    model = PlannedModel.open(str(directory), "auto")
    return Request(model, method, text, QEPConfig() if qep else None)


def probe_of(request: Request, place: Place):
    return probed(make_estimate(request, place), request, place)


@pytest.fixture
def method() -> GPTQ:
    return GPTQ(groupsize=32, mse=True, weighted_mse=True, actorder=True, static_groups=True)


@pytest.mark.parametrize("qep", [True, False])
def test_every_phase_of_a_run_is_measured(tiny_model_dir, method, qep):
    request = request_of(tiny_model_dir("llama"), method, qep=qep)
    estimate, measured = probe_of(request, Place(2, gpu="CPU"))
    assert set(measured.corrections) == CARRIED | ({"correct"} if qep else set())
    assert all(value > 0 for value in measured.corrections.values())
    assert all(measured.rate(phase) > 0 for phase in measured.corrections)
    assert estimate.costs.hardware.corrections == measured.corrections


def test_the_estimate_of_what_was_probed_is_what_was_measured(tiny_model_dir, method):
    request = request_of(tiny_model_dir("llama"), method)
    estimate, measured = probe_of(request, Place(0, gpu="CPU"))
    for phase in ("sums", "forward"):
        found = estimate.costs.phase_s(phase, measured.work[phase])
        assert found == pytest.approx(measured.seconds[phase])


def test_a_method_without_calibration_is_measured(tiny_model_dir):
    request = request_of(tiny_model_dir("llama"), RTN(groupsize=32))
    _, measured = probe_of(request, Place(1, gpu="CPU"))
    assert set(measured.corrections) == {"search", "solve", "write"}


def test_a_model_without_weights_is_measured_by_its_shapes(tiny_model_dir, tmp_path, method):
    shutil.copy(tiny_model_dir("gemma3") / "config.json", tmp_path)
    _, measured = probe_of(request_of(tmp_path, method), Place(1, gpu="CPU"))
    assert set(measured.corrections) == CARRIED


def test_the_first_block_with_targets_is_measured(tiny_model_dir):
    method = GPTQ(groupsize=32, include_layer_keywords=["layers.1."])
    _, measured = probe_of(request_of(tiny_model_dir("llama"), method), Place(1, gpu="CPU"))
    assert measured.corrections["factor"] > 0


def test_nothing_is_left_behind(tiny_model_dir, method, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    num_threads = torch.get_num_threads()
    probe_of(request_of(tiny_model_dir("llama"), method), Place(2, gpu="CPU"))
    assert torch.get_num_threads() == num_threads
    assert list(tmp_path.iterdir()) == []


def test_another_device_than_this_machine_has_is_refused(tiny_model_dir, method):
    with pytest.raises(ConfigError, match=r"gpu=B200: a probe measures this machine"):
        probe_of(request_of(tiny_model_dir("llama"), method), Place(1, gpu="B200"))


def test_a_probe_that_would_take_hours_is_refused(llama_405b):
    method = GPTQ(groupsize=128)
    request = Request(
        PlannedModel.open(str(llama_405b), "auto"), method, TextShape(128, 2048), None
    )
    with pytest.raises(InputError, match=r"would take about \d+ minutes on this machine"):
        probe_of(request, Place(1, gpu="CPU"))
