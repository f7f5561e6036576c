"""A run that is killed goes on where it was, and makes what an undisturbed run makes."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver_process import has_ended, start_driver
from tiny_models import sample_text
from typer.testing import CliRunner

from onecomp.cli import app

NUM_BLOCKS = 6
SECONDS = 180


@pytest.fixture(scope="session")
def command(tiny_model_dir: Callable[..., Path], tmp_path_factory) -> list[str]:
    """The quantize command without its output."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sample_text(3000))
    model = tiny_model_dir("llama", num_layers=NUM_BLOCKS)
    options = ["--wbits", "4", "--calibration-dataset", str(text), "--max-length", "64"]
    samples = ["--num-calibration-samples", "32"]
    return ["quantize", str(model), *options, *samples, "--num-workers", "0"]


def finish(*arguments: str) -> None:
    """Run a command to its end, in this process."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def kill_when(command: list[str], log: Path, path: Path) -> None:
    """SIGKILL for a driver as soon as ``path`` appears."""
    process = start_driver(command, log)
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert not has_ended(process), log.read_text()
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.001)
    process.kill()
    process.join()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def block_file(run: Path, index: int) -> Path:
    return run / "blocks" / f"{index:05d}.safetensors"


@pytest.fixture(scope="session")
def undisturbed(command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(*command, "--output", str(output))
    return output


def killed(command: list[str], output: Path, block: int) -> Path:
    """Run directory of a run that was killed when it had finished a block.

    The last block leaves a moment until the checkpoint is in its place; a run that gets there
    before the signal is thrown away and begun anew.
    """
    run = output.with_name("out.run")
    for _attempt in range(5):
        whole = [*command, "--output", str(output)]
        kill_when(whole, output.with_name("log.txt"), block_file(run, block))
        if not output.exists():
            return run
        shutil.rmtree(output)
        shutil.rmtree(run)
    raise AssertionError(f"every run was over before it was killed at block {block}")


@pytest.fixture(scope="session")
def killed_early(command, tmp_path_factory) -> Path:
    """Run directory of a run that has its second block."""
    return killed(command, tmp_path_factory.mktemp("early") / "out", 1)


@pytest.fixture
def early(killed_early, tmp_path_factory) -> Iterator[Path]:
    """The same; whatever a test does to it is undone."""
    kept = tmp_path_factory.mktemp("kept") / "run"
    shutil.copytree(killed_early, kept)
    yield killed_early
    for path in (killed_early, killed_early.with_name("out")):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kept, killed_early)


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_killed_at_its_second_block_is_resumed(early, undisturbed):
    assert not block_file(early, NUM_BLOCKS - 1).exists()
    kept = block_file(early, 0).stat().st_mtime_ns
    finish("resume", str(early), "--num-workers", "0")
    assert files(early.with_name("out")) == files(undisturbed)
    assert block_file(early, 0).stat().st_mtime_ns == kept
    made = [event["block"] for event in events(early, "block")]
    assert len(made) == len(set(made)) <= NUM_BLOCKS


def test_the_same_command_goes_on_where_the_run_was(early, undisturbed, command):
    kept = block_file(early, 0).stat().st_mtime_ns
    output = early.with_name("out")
    finish(*command, "--output", str(output))
    assert files(output) == files(undisturbed)
    assert block_file(early, 0).stat().st_mtime_ns == kept


def test_a_damaged_record_is_named(early, capfd):
    (early / "run.json").write_text("{")
    done = CliRunner().invoke(app, ["resume", str(early)])
    assert done.exit_code == 2
    assert f"error: {early / 'run.json'}: cannot be read (" in done.stderr


def test_a_run_killed_behind_its_last_block_is_resumed_once(command, undisturbed, tmp_path):
    output = tmp_path / "out"
    run = killed(command, output, NUM_BLOCKS - 1)
    finish("resume", str(run), "--num-workers", "0")
    assert files(output) == files(undisturbed)
    before = {p: p.stat().st_mtime_ns for p in [*output.rglob("*"), *run.rglob("*")]}
    finish("resume", str(run))
    assert {p: p.stat().st_mtime_ns for p in [*output.rglob("*"), *run.rglob("*")]} == before


def test_an_old_checkpoint_does_not_make_a_run_look_finished(undisturbed, tmp_path):
    """With --overwrite, killed when every block was there and the checkpoint not in its place."""
    output, run = tmp_path / "out", tmp_path / "out.run"
    shutil.copytree(undisturbed.with_name("out.run"), run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"output": str(output), "overwrite": True}))
    shutil.copytree(undisturbed, run / "checkpoint")
    (run / "checkpoint" / "config.json").unlink()
    for name in (".tmpA1b2", ".model-00002-of-00007.safetensors.12.tmp"):
        (run / "checkpoint" / name).write_text("as a killed writer leaves it")
    output.mkdir()
    (output / "config.json").write_text("{}")
    finish("resume", str(run), "--num-workers", "0")
    assert files(output) == files(undisturbed)


def test_resume_does_not_replace_the_checkpoint_of_others(early):
    output = early.with_name("out")
    output.mkdir()
    (output / "config.json").write_text("{}")
    refused = CliRunner().invoke(app, ["resume", str(early), "--num-workers", "0"])
    assert refused.exit_code == 2
    assert f"error: {output}: already holds a checkpoint." in refused.stderr
    assert files(output) == {"config.json": b"{}"}


def test_a_run_without_error_propagation_is_resumed_over_holes(command, tmp_path):
    """Its blocks are in flight two at a time: a later one may be there without an earlier one."""
    plain = [*command, "--no-qep", "--output"]
    finish(*plain, str(tmp_path / "whole"))
    run = killed(plain[:-1], tmp_path / "out", 2)
    block_file(run, 1).unlink()
    (run / "checkpoint" / "model-00003-of-00007.safetensors").unlink()
    finish("resume", str(run), "--num-workers", "0")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("again", ["resume", "quantize"])
def test_a_run_killed_while_its_checkpoint_moves_is_completed(
    command, undisturbed, tmp_path, again
):
    """Half of the files are in their place, config.json is still to come."""
    output, run = tmp_path / "out", tmp_path / "out.run"
    shutil.copytree(undisturbed.with_name("out.run"), run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"output": str(output)}))
    for number, path in enumerate(sorted(undisturbed.iterdir())):
        is_moved = number % 2 and path.name != "config.json"
        place = output if is_moved else run / "checkpoint"
        place.mkdir(exist_ok=True)
        shutil.copy(path, place)
    resume = ["resume", str(run), "--num-workers", "0"]
    finish(*(resume if again == "resume" else [*command, "--output", str(output)]))
    assert files(output) == files(undisturbed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_executor")  # its cluster is used, with two workers of its own
def test_a_run_killed_in_one_process_is_resumed_on_two_ray_workers(early, undisturbed):
    finish("resume", str(early), "--num-workers", "2")
    assert files(early.with_name("out")) == files(undisturbed)
    [finished] = events(early, "finished")
    assert finished["workers"] == 2
