"""The script of a Ray job, run directly: from any directory, refusals, a clean stop."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ray_head import ROOT, own_environment
from tiny_models import sample_text

SECONDS = 400


def run(directory: Path, *words: object) -> subprocess.Popen:
    """The script with nothing of ours on Python's path but what it puts there itself."""
    environment = {n: v for n, v in own_environment().items() if n != "PYTHONPATH"}
    return subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            BARE,
            str(ROOT / "deploy" / "onecomp_job.py"),
            *map(str, words),
        ],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


BARE = f"""
import runpy, sys
sys.path.append({sysconfig.get_paths()["purelib"]!r})
assert {str(ROOT)!r} not in sys.path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts a script without the .pth file of an editable installation."""


def test_it_needs_no_installation_and_refuses_what_would_be_lost(tmp_path):
    process = run(tmp_path, "quantize", "org/model", "--output", "out", "--run-dir", "/r")
    output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("error: onecomp as a Ray job: output 'out' is relative, but a job")
    assert "an absolute path that every node sees, or a URL such as s3://bucket/run." in errors


def test_what_the_command_line_refuses_has_its_status(tmp_path):
    process = run(tmp_path, "quantize", "org/model", "--output", "/out", "--wbits", "four")
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert "--wbits" in errors


@pytest.mark.slow
@pytest.mark.parametrize("again", ["resume", "the same command"])
def test_sigterm_stops_a_run_that_can_be_resumed(tiny_model_dir, tmp_path, again):
    """By hand, or by what tries a job again, which may even do so when it has succeeded."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(sample_text(1000))
    model = tiny_model_dir("llama", num_layers=40, hidden_size=192)  # time for the signal to arrive
    words = ["quantize", model, "--output", out]
    words += ["--calibration-dataset", text, "--num-calibration-samples", 8, "--max-length", 64]
    process = run(tmp_path, *words, "--num-workers", 0)
    assert process.stderr is not None
    for line in process.stderr:
        if "block   2/40" in line:
            process.terminate()
            break
    errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 143
    assert (
        f"stopped by SIGTERM; finished blocks are kept, go on with: onecomp resume {out}.run"
        in (errors)
    )
    assert not (out / "config.json").exists()
    words = ["resume", f"{out}.run"] if again == "resume" else words
    process = run(tmp_path, *words, "--num-workers", 0)
    errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, errors
    assert "block   1/40" not in errors
    assert (out / "config.json").exists()
    process = run(tmp_path, *words, "--num-workers", 0)
    errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, errors
    assert "nothing is left to do" in errors
