"""Whole runs whose directory, or whose checkpoint, lies in an object store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import sample_text
from typer.testing import CliRunner

from onecomp.cli import app
from onecomp.lease import hold
from onecomp.storage import AnyPath, children, open_path
from onecomp.store import RunDirectory

NUM_BLOCKS = 2
SECONDS = 240


@pytest.fixture(scope="session")
def options(tiny_model_dir: Callable[..., Path], tmp_path_factory) -> list[str]:
    """The quantize command without its places."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sample_text(1500))
    samples = ["--max-length", "32", "--num-calibration-samples", "16"]
    model = tiny_model_dir("llama", num_layers=NUM_BLOCKS)
    return ["quantize", str(model), "--calibration-dataset", str(text), *samples]


@pytest.fixture(scope="session")
def expected(options, tmp_path_factory) -> dict[str, bytes]:
    """Files of the checkpoint that a run on local storage makes."""
    output = tmp_path_factory.mktemp("local") / "out"
    finish(*options, "--output", str(output), "--num-workers", "0")
    return contents(output)


def finish(*arguments: object) -> str:
    """Run a command to its end, in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "onecomp", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(directory: AnyPath) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in children(directory)}


def names(directory: AnyPath) -> list[str]:
    return [path.name for path in children(directory)]


def events(run: AnyPath, kind: str) -> list[dict]:
    return RunDirectory(run).events(kind)


def test_a_run_in_an_object_store_makes_the_same_checkpoint(options, expected, s3, tmp_path):
    run, output = s3 / "deep" / "run", tmp_path / "out"
    finish(*options, "--output", output, "--run-dir", run, "--num-workers", "0")
    assert contents(output) == expected
    assert names(run) == ["blocks", "calibration.safetensors", "events", "report.html", "run.json"]
    assert len(names(run / "blocks")) == NUM_BLOCKS
    assert [event["block"] for event in events(run, "block")] == [*range(NUM_BLOCKS)]
    finish("resume", run)
    assert len(events(run, "finished")) == 1, "nothing was left to do"


@pytest.mark.slow
def test_run_and_checkpoint_may_both_lie_there(options, expected, s3):
    finish(*options, "--output", s3 / "out", "--num-workers", "0")
    assert contents(s3 / "out") == expected
    assert names(s3) == ["out", "out.run"]
    verified = json.loads(finish("verify", s3 / "out", "--json").splitlines()[-1])
    assert verified["ok"]
    again = CliRunner().invoke(app, [*options, "--output", str(s3 / "out"), "--wbits", "3"])
    assert again.exit_code == 2
    assert f"error: {s3}out.run: belongs to another configuration (" in again.stderr
    assert "quantizer.wbits: 4 -> 3" in again.stderr
    finish(*options, "--output", s3 / "out", "--wbits", "3", "--overwrite", "--num-workers", "0")
    assert names(s3 / "out") == [*expected]
    assert contents(s3 / "out") != expected
    assert "replaced" not in names(s3 / "out.run")


@pytest.mark.parametrize("kind", [pytest.param("s3", marks=pytest.mark.slow), "file"])
def test_the_checkpoint_alone_may_lie_elsewhere(kind, options, expected, tmp_path, request):
    there = request.getfixturevalue("s3") if kind == "s3" else f"file://{tmp_path}/"
    output, run = f"{there}out", f"file://{tmp_path}/run"
    finish(*options, "--output", output, "--run-dir", run, "--num-workers", "0")
    assert contents(open_path(output)) == expected
    assert (tmp_path / "run" / "events.jsonl").is_file()


def test_the_memory_of_one_process_is_a_store(options, expected, tmp_path):
    run, output = f"memory://{os.urandom(4).hex()}/run", tmp_path / "out"
    finish(*options, "--output", output, "--run-dir", run, "--num-workers", "0")
    assert contents(output) == expected


def test_a_run_in_use_is_refused_before_anything_is_touched(options, s3, tmp_path):
    command = [*options, "--output", str(tmp_path / "out"), "--overwrite", "--num-workers", "0"]
    for run in (tmp_path / "run", s3 / "run"):
        with hold(run):
            refused = CliRunner().invoke(app, [*command, "--run-dir", str(run)])
            assert refused.exit_code == 2
            assert f"error: {run}: is in use by another driver (host " in refused.stderr
            assert names(run) == ["lease-000001.json"]
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["--run-dir", "--output"])
def test_a_bucket_that_does_not_exist_is_bad_input(place, options, s3, tmp_path):
    places = {"--run-dir": f"{tmp_path}/run", "--output": f"{tmp_path}/out"}
    places[place] = "s3://no-such-bucket/x"
    refused = CliRunner().invoke(app, [*options, *(x for pair in places.items() for x in pair)])
    assert refused.exit_code == 2
    assert "error: s3://no-such-bucket/x: cannot be written (FileNotFoundError: " in refused.stderr
    assert names(tmp_path) == []


def kill_when(process: subprocess.Popen, path: AnyPath) -> None:
    """SIGKILL as soon as ``path`` appears."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} never appeared"
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_in_an_object_store_is_resumed_when_its_driver_was_killed(
    options, expected, s3, tmp_path
):
    run, output = s3 / "run", tmp_path / "out"
    command = [*options, "--output", output, "--run-dir", run, "--num-workers", "0"]
    kill_when(start(*command), run / "blocks" / "00000.safetensors")
    assert not output.exists()
    finish("resume", run, "--num-workers", "0")
    assert contents(output) == expected
    made = [event["block"] for event in events(run, "block")]
    assert sorted(made) == [*range(NUM_BLOCKS)]
    assert not any(name.startswith("lease") for name in names(run))


@pytest.mark.slow
@pytest.mark.ray
def test_ray_workers_write_to_an_object_store(options, expected, s3):
    run, output = s3 / "run", s3 / "out"
    process = start(*options, "--output", output, "--run-dir", run, "--num-workers", "2")
    _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log
    assert contents(output) == expected
    assert events(run, "finished")[0]["workers"] == 2


@pytest.mark.slow
@pytest.mark.ray
def test_the_memory_of_one_process_is_no_store_for_several(options, tmp_path):
    process = start(
        *options, "--output", tmp_path / "out", "--run-dir", "memory://run", "--num-workers", "2"
    )
    _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, log
    assert "memory:// is seen by one process: give --num-workers 0" in log
