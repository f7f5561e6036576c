"""Where a session reads and writes, and what it says of the model."""

import logging
from pathlib import Path

import pytest

from onecomp import GPTQ, RTN, CalibrationConfig, LocalExecutor, ModelConfig
from onecomp.errors import InputError
from onecomp.job import QuantizationJob
from onecomp.lease import LeaseLostError
from onecomp.session import Session
from onecomp.worker import Worker, WorkerSettings


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
        Worker(3, session._settings(session.run, 0))


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


def quantized(model: Path, run: object, **options: object) -> Session:
    session = Session.open(job(model, RTN()), run, **options)
    executor = LocalExecutor(1)
    session.quantize(executor, report_progress=False)
    executor.stop()
    return session


def test_a_session_looks_and_its_work_holds_the_directory(tiny_model_dir, tmp_path, monkeypatch):
    session = Session.open(job(tiny_model_dir(), RTN()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    seen = []

    def look(settings: WorkerSettings, *_others: object) -> None:
        seen.append(settings.run)
        with pytest.raises(InputError, match="is in use by another driver"):
            Session.open(job(tiny_model_dir(), RTN()), tmp_path / "run")
        with pytest.raises(InputError, match="is in use by another driver"):
            Session.reopen(tmp_path / "run")
        settings.run.require_lease()
        settings.run.require_visible()

    monkeypatch.setattr("onecomp.session.quantize_model", look)
    session.quantize(LocalExecutor(1), report_progress=False)
    assert seen[0].run_id == session.run.record()["run_id"]
    with pytest.raises(LeaseLostError):
        seen[0].require_lease()


def test_a_session_that_lost_a_race_does_not_undo_the_winners_work(tiny_model_dir, tmp_path):
    late = Session.open(job(tiny_model_dir(), RTN()), tmp_path / "run")
    quantized(tiny_model_dir(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="was changed by another driver since this one looked"):
        late.quantize(LocalExecutor(1), report_progress=False)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_a_run_keeps_its_name_until_it_is_begun_anew(tiny_model_dir, tmp_path):
    names = [
        quantized(tiny_model_dir(), tmp_path / "run", overwrite=overwrite).run.record()["run_id"]
        for overwrite in (False, False, True)
    ]
    assert names[0] == names[1] != names[2]


def test_a_driver_that_lost_its_run_puts_no_checkpoint_in_place(
    tiny_model_dir, tmp_path, monkeypatch
):
    def lose(settings: WorkerSettings, *_others: object) -> None:
        (tmp_path / "run" / "lease-000009.json").write_text("{}")

    monkeypatch.setattr("onecomp.session.quantize_model", lose)
    session = Session.open(job(tiny_model_dir(), RTN()), tmp_path / "run", output=tmp_path / "out")
    with pytest.raises(LeaseLostError):
        session.quantize(LocalExecutor(1), report_progress=False)
    assert not (tmp_path / "out").exists()
    assert session.run.events("finished") == []


def test_a_resumed_run_tells_what_its_killed_driver_could_not(tiny_model_dir, tmp_path):
    run = quantized(tiny_model_dir(), tmp_path / "run").run
    told = run.read_block(0)
    run.write_block(0, told, [{"event": "block", "block": 0, "output_error": 0.25}])
    (tmp_path / "run" / "events.jsonl").unlink()
    quantized(tiny_model_dir(), tmp_path / "run")
    errors = {event["block"]: event["output_error"] for event in run.events("block")}
    assert errors == {0: 0.25, 1: None}  # the second as its worker wrote it
