"""Where a session reads and writes, and what it says of the model."""

import logging
from pathlib import Path

import pytest

from onecomp import GPTQ, RTN, CalibrationConfig, LocalExecutor, ModelConfig
from onecomp.errors import InputError
from onecomp.job import QuantizationJob
from onecomp.session import Session
from onecomp.worker import Worker


def job(model: Path, quantizer: GPTQ | RTN) -> QuantizationJob:
    config = ModelConfig(str(model), dtype="float32", device="cpu")
    return QuantizationJob(config, quantizer, CalibrationConfig("unused.txt"))


def test_places_do_not_depend_on_the_working_directory(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Session.open(job(tiny_model_dir(), RTN()), Path("run"), output=Path("out"))
    assert (session.run.path, session.output) == (tmp_path / "run", tmp_path / "out")


def test_a_worker_that_does_not_see_the_run_directory_stops_the_run(tiny_model_dir, tmp_path):
    """As on a node without the storage that the driver writes to."""
    session = Session.open(job(tiny_model_dir(), RTN()), tmp_path / "run")
    with pytest.raises(InputError, match="is not seen by worker 3 on "):
        Worker(3, session._settings(0))


def test_the_share_of_quantized_weights_is_said(tiny_model_dir, tmp_path, caplog):
    method = RTN(exclude_layer_keywords=["down_proj"])
    session = Session.open(job(tiny_model_dir(), method), tmp_path / "run")
    executor = LocalExecutor(1)
    with caplog.at_level(logging.INFO):
        session.quantize(executor, report_progress=False)
    executor.stop()
    total = sum(p.numel() for b in session.skeleton.blocks for p in b.parameters() if p.ndim == 2)
    share = 100 * sum(group.num_weights for group in session.layout.groups) / total
    assert 50 < share < 90
    assert f"{share:.1f} % of the weights in the decoder blocks" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
