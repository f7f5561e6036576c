"""`quantize` repeated where it has ended: nothing is left to do, and nothing of others is lost."""

import json
import logging
from pathlib import Path

import pytest
from command_line import done, invoke

from onecomp.store import RunDirectory


@pytest.fixture
def command(tiny_model_dir, text, tmp_path) -> list[object]:
    """A quick run in this process, to ``out`` and ``out.run``."""
    counts = ["--num-calibration-samples", 8, "--max-length", 48, "--num-workers", 0]
    options = ["--calibration-dataset", text, "--quantizer", "rtn", *counts]
    return ["quantize", tiny_model_dir("llama"), "--output", tmp_path / "out", *options]


def refused(*arguments: object) -> str:
    """What a command says that is refused as bad input."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), (result.output, result.exception)
    return result.stderr


def files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_finished_run_has_nothing_left_to_do(command, tmp_path, caplog):
    """As of a script that is run again, or a job that is tried again."""
    done(*command)
    before = files(tmp_path)
    with caplog.at_level(logging.INFO):
        assert done(*command) == f"{tmp_path / 'out'}\n"
    assert "nothing is left to do" in caplog.text
    assert files(tmp_path) == before


def test_the_evaluation_of_a_finished_run_is_made_up_for(command, text, tmp_path):
    done(*command)
    assert done(*command, "--eval", text) == f"{tmp_path / 'out'}\n"
    run = RunDirectory(tmp_path / "out.run")
    assert {event["what"] for event in run.events("evaluation")} == {"original", "quantized"}
    assert len(run.events("finished")) == 1


def test_another_configuration_is_refused_with_what_differs(command, tmp_path):
    done(*command)
    before = files(tmp_path)
    said = refused(*command, "--wbits", 3)
    assert f"{tmp_path / 'out.run'}: belongs to another configuration (" in said
    assert "quantizer.wbits: 4 -> 3)" in said
    assert files(tmp_path) == before


def test_a_checkpoint_that_its_run_has_not_finished_is_kept(command, tmp_path):
    """As with --overwrite, killed before its first block: what is there is an older checkpoint."""
    done(*command)
    run = tmp_path / "out.run"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"overwrite": True}))
    (run / "blocks" / "00001.safetensors").unlink()
    before = files(tmp_path)
    assert f"error: {tmp_path / 'out'}: already holds a checkpoint." in refused(*command)
    assert files(tmp_path) == before
