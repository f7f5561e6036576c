"""Drivers and workers are killed again and again; the checkpoint is that of an undisturbed run."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ray
from driver_process import has_ended, start_driver
from tiny_models import sample_text
from typer.testing import CliRunner

from onecomp.cli import app
from onecomp.store import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_executor")]

SECONDS = 300
"""For anything that should happen."""
COUNTS = ["1", "2", "1:2"]
"""Workers of a driver."""
NOBODY = 2**22
"""Linux numbers its processes below this."""


def command(model: Path, text: Path, output: Path, *options: str) -> list[str]:
    samples = ["--num-calibration-samples", "24", "--max-length", "64"]
    fixed = ["--calibration-dataset", str(text), "--wbits", "4", *samples, *options]
    return ["quantize", str(model), "--output", str(output), *fixed]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Chaos:
    """One run, its drivers, and someone who kills them and their workers.

    Args:
        run: The run directory.
        seed: Of every choice.
    """

    def __init__(self, run: Path, seed: int):
        self.run, self.random = RunDirectory(run), random.Random(seed)
        self.killed = {"driver": 0, "worker": 0}
        self.driver: BaseProcess | None = None
        self.log = run.with_name("log.txt")

    def go_on(self, *arguments: str) -> None:
        """Start a driver on the tests' cluster."""
        address = ray.get_runtime_context().gcs_address
        words = [*arguments, "--num-workers", self.random.choice(COUNTS), "--address", address]
        self.driver = start_driver(words, self.log)

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Until it has happened; the driver must live that long."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert not has_ended(self.driver), self.log.read_text()
            assert time.monotonic() < deadline, "nothing happens"
            time.sleep(0.01)

    def strike(self, victim: str) -> None:
        """Let the run get on by nothing, a group or a block, then kill its driver or a worker."""
        kind, count = self.random.choice([("worker", 1), ("block", 1), ("units", 2)])
        seen = len(self.run.events(kind))
        self.wait_for(lambda: len(self.run.events(kind)) >= seen + count)
        time.sleep(self.random.uniform(0, 0.1))  # about the time of a block
        if victim == "driver":
            self.killed["driver"] += self.kill(self.driver.pid)
            self.driver.join(SECONDS)
        else:
            self.wait_for(self.workers)
            self.killed["worker"] += self.kill(self.random.choice(self.workers() or [NOBODY]))

    def victims(self, kills: int) -> list[str]:
        """Workers and drivers in equal shares, in a random order."""
        both = [("worker", "driver")[number % 2] for number in range(kills)]
        return self.random.sample(both, kills)

    def workers(self) -> list[int]:
        """Processes of the last driver's workers."""
        began = self.run.events("started")[-1]["time"]
        events = [e for e in self.run.events("worker") if e["pid"] and e["time"] >= began]
        pids = [e["pid"] for e in events if e["change"] == "joined"]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def kill(self, pid: int) -> bool:
        """Whether it was there to be killed."""
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    @property
    def count(self) -> int:
        """Processes killed so far."""
        return sum(self.killed.values())


@pytest.mark.parametrize(
    ("kills", "num_layers", "options"),
    [
        (3, 6, []),
        pytest.param(20, 80, [], marks=pytest.mark.slow),
        pytest.param(6, 40, ["--no-qep"], marks=pytest.mark.slow),
    ],
)
def test_whoever_is_killed_the_bytes_are_the_same(
    tiny_model_dir, tmp_path, kills, num_layers, options
):
    model = tiny_model_dir("llama", num_layers=num_layers)
    text = tmp_path / "text.txt"
    text.write_text(sample_text(3000))
    undisturbed = command(model, text, tmp_path / "undisturbed", "--num-workers", "0", *options)
    done = CliRunner().invoke(app, undisturbed)
    assert done.exit_code == 0, done.output

    chaos = Chaos(tmp_path / "disturbed.run", seed=7)
    chaos.go_on(*command(model, text, tmp_path / "disturbed", *options))
    victims = chaos.victims(kills)
    while chaos.count < kills:
        if has_ended(chaos.driver):
            assert chaos.driver.exitcode == -signal.SIGKILL, chaos.log.read_text()
            chaos.go_on("resume", str(chaos.run.path))
        chaos.strike(victims[chaos.count])
    if has_ended(chaos.driver):
        chaos.go_on("resume", str(chaos.run.path))
    chaos.driver.join(SECONDS)
    assert chaos.driver.exitcode == 0, chaos.log.read_text()
    assert min(chaos.killed.values()) >= 1
    assert files(tmp_path / "disturbed") == files(tmp_path / "undisturbed")
