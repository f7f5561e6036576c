"""Asked of a real run: while it works, after its driver was killed, after it was resumed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from driver_process import has_ended, start_driver
from typer.testing import CliRunner

from onecomp.cli import app
from onecomp.status import RunStatus, read_status

NUM_BLOCKS = 12
SECONDS = 180
RESUME = ("resume", "--num-workers", "0")


def look_and_kill(command: list[str], run: Path) -> tuple[dict, int]:
    """Status of a run that has two blocks, and its driver, which is killed."""
    log = run.with_name("log.txt")
    process = start_driver(command, log)
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "blocks" / "00001.safetensors").exists():
            assert not has_ended(process), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)  # so that it is as it was when we look
        return ask(run), process.pid
    finally:
        process.kill()
        process.join()


def ask(run: Path) -> dict:
    answer = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


def statuses_during(run: Path, work: Callable[[], object]) -> list[RunStatus]:
    """What is said of the run while this process works on it."""
    ended, seen = threading.Event(), []

    def look() -> None:
        while not ended.wait(0.2):
            seen.append(read_status(run))

    observer = threading.Thread(target=look)
    observer.start()
    try:
        work()
    finally:
        ended.set()
        observer.join()
    return seen


def test_a_run_is_told_alive_dead_resumed_and_finished(tiny_model_dir, text, tmp_path):
    model = tiny_model_dir("llama", num_layers=NUM_BLOCKS, intermediate_size=512)
    output, run = tmp_path / "out", tmp_path / "out.run"
    samples = ["--num-calibration-samples", "32", "--max-length", "64"]
    data = ["--calibration-dataset", str(text), *samples]
    command = ["quantize", str(model), "--output", str(output), *data, "--num-workers", "0"]

    found, pid = look_and_kill(command, run)
    assert found["state"] == "running"
    assert found["driver"]["pid"] == pid
    blocks = found["blocks"]
    assert 2 <= blocks["done"] < blocks["total"] == NUM_BLOCKS
    assert blocks["in_work"] == blocks["done"]
    assert blocks["pace_s"] > 0
    assert found["workers"]["present"] >= 1
    assert found["product"]["method"] == "GPTQ"
    assert found["product"]["output"] == str(output)

    dead = ask(run)
    assert (dead["state"], dead["driver"]["is_gone"]) == ("interrupted", True)
    assert dead["blocks"]["done"] == blocks["done"]
    assert dead["blocks"]["eta_s"] is None

    seen = statuses_during(run, lambda: CliRunner().invoke(app, [*RESUME, str(run)]))
    alive = [status for status in seen if status.state == "running"]
    assert {status.attempts for status in alive} == {2}
    assert {status.driver and status.driver.pid for status in alive} == {os.getpid()}
    assert alive[-1].blocks.done > dead["blocks"]["done"]
    done = ask(run)
    assert (done["state"], done["attempts"], done["driver"]) == ("finished", 2, None)
    assert done["blocks"]["done"] == done["blocks"]["total"] == NUM_BLOCKS
    assert done["blocks"]["by_last_driver"] == NUM_BLOCKS - dead["blocks"]["done"]
    assert done["workers"]["lost"] == 0
