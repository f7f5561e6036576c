"""Where a run is, told from journals and leases of every kind."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from journals import RUN, START, Driver, write_run
from typer.testing import CliRunner

from onecomp.cli import app
from onecomp.errors import InputError
from onecomp.lease import hold
from onecomp.status import Driver as Holder
from onecomp.status import find_driver, read_status, run_status
from onecomp.status_lines import status_lines


def alive(driver: Driver, **changes: object) -> Holder:
    """A process that holds the run since before its first line."""
    fields = {"host": "host-7", "pid": 4711, "started": driver.events[0]["time"] - 1.0}
    signs = {"silent_s": 5.0, "is_gone": False, "is_alive": True}
    return Holder(**fields | signs | changes)


def status(driver: Driver, holder: Holder | None, *, blocks: int, after_s: float = 0.0):
    """The status some seconds after the driver's last line."""
    return run_status("r", RUN, driver.events, range(blocks), holder, now=driver.now + after_s)


def three_of_eight() -> Driver:
    driver = Driver(8, [0, 1, 2, 3]).start()
    return driver.quantize(0).quantize(1, dies=[2]).quantize(2, fallbacks=2)


def test_a_running_run_is_told_in_full():
    driver = three_of_eight()
    found = status(driver, alive(driver), blocks=3, after_s=2.0)
    blocks, workers = found.blocks, found.workers
    assert (found.state, found.attempts, found.fallbacks) == ("running", 1, 2)
    assert (blocks.done, blocks.total, blocks.in_work) == (3, 8, 3)
    assert blocks.in_work_s == pytest.approx(2.0)
    assert blocks.output_error == pytest.approx(2e-4)
    assert blocks.pace_s == 6.5
    assert blocks.eta_s == pytest.approx(5 * 6.5 - 2.0)
    assert (workers.present, workers.lost) == (3, 1)
    assert (workers.recoveries, workers.recovery_s) == (1, 3.0)
    assert found.last_unit is not None
    assert (found.last_unit.method, found.last_unit.block) == ("finish_block", 2)
    assert found.last_unit.ago_s == pytest.approx(2.0)
    assert found.product.bits_per_weight == 4.25


def test_a_run_is_running_as_long_as_its_driver_lives():
    driver = three_of_eight()
    for dead in (None, alive(driver, is_alive=False), alive(driver, is_alive=False, is_gone=True)):
        found = status(driver, dead, blocks=3)
        assert found.state == "interrupted"
        assert found.blocks.eta_s is found.blocks.in_work_s is None


def test_a_run_that_failed_says_why_until_it_is_resumed():
    driver = three_of_eight()
    driver.now += 1.0
    driver.write("failed", error="model.layers.3: 3 NaN")
    found = status(driver, None, blocks=3)
    assert (found.state, found.error) == ("failed", "model.layers.3: 3 NaN")
    again = alive(driver, started=driver.now + 1.0)
    found = status(driver, again, blocks=3, after_s=2.0)
    assert (found.state, found.error, found.attempts) == ("running", None, 2)
    assert found.workers.present == 0  # none of the failed driver's
    assert found.workers.lost == 1
    assert found.blocks.total == 8


def test_a_run_that_was_stopped_is_interrupted():
    driver = three_of_eight()
    driver.write("stopped", signal="SIGTERM")
    found = status(driver, None, blocks=3)
    assert (found.state, found.error) == ("interrupted", "stopped by SIGTERM")


def test_a_finished_run_stays_finished_while_its_driver_evaluates():
    driver = Driver(2, [0]).start().quantize(0).quantize(1).finish()
    driver.write("evaluation", what="quantized", perplexity=8.0)
    for holder in (alive(driver), None, alive(driver, started=driver.now + 9.0)):
        found = status(driver, holder, blocks=2, after_s=10.0)
        assert (found.state, found.attempts) == ("finished", 1)
        assert found.seconds == pytest.approx(driver.now - START)


def test_the_pace_is_that_of_new_blocks_of_the_driver_at_work():
    first = Driver(8, [0, 1]).start().quantize(0).quantize(1)
    second = Driver(8, [0], now=first.now + 5000.0).start(finished=2)
    second.events = [*first.events, *second.events]
    holder = alive(second, started=second.now - 3.0)
    found = status(second, holder, blocks=2, after_s=20.0)
    assert found.blocks.pace_s == 6.5  # the first driver's: there is none of the second yet
    assert found.blocks.eta_s == pytest.approx(5 * 6.5)
    assert found.blocks.by_last_driver == 0
    second.write("block", block=2, seconds=30.0, output_error=1.0)
    found = status(second, holder, blocks=3)
    assert (found.blocks.pace_s, found.blocks.by_last_driver) == (30.0, 1)
    assert found.blocks.eta_s == pytest.approx(5 * 30.0)
    assert (found.workers.present, found.attempts) == (1, 2)


def test_a_run_before_its_first_line():
    writing = Holder(host=None, pid=None, started=None, silent_s=0.0, is_gone=False, is_alive=True)
    found = run_status("r", RUN, [], [], writing, now=START)
    assert "state      running: a driver, last sign of life 0s ago\n" in status_lines(found)
    assert (found.state, found.attempts, found.blocks.total) == ("running", 1, None)
    assert "in work    start\n" in status_lines(found)
    found = run_status("r", RUN, [], [], None, now=START)
    assert (found.state, found.attempts) == ("not started", 0)
    assert status_lines(found).splitlines()[1] == "state      not started: no driver works on it"


def test_a_journal_of_an_older_version_is_read_as_far_as_it_goes():
    blocks = [{"event": "block", "block": b, "seconds": 2.0, "output_error": 0.5} for b in range(3)]
    found = run_status("r", {}, blocks, range(3), None, now=START)
    assert (found.state, found.blocks.done, found.blocks.total) == ("interrupted", 3, None)
    assert "blocks     3 done\n" in status_lines(found)
    found = run_status("r", {}, [*blocks, {"event": "finished", "seconds": 9.0}], [], None, now=1.0)
    assert (found.state, found.seconds) == ("finished", 9.0)


def test_lines_of_a_running_run():
    driver = three_of_eight()
    assert status_lines(status(driver, alive(driver), blocks=3, after_s=2.2)).splitlines() == [
        "run        r",
        "state      running: process 4711 on host-7, last sign of life 5s ago",
        "model      some-org/some-model",
        "method     GPTQ, 4 bits, groups of 128, error propagation, 4.25 bits per weight",
        "checkpoint /models/out (to come)",
        "blocks     3 of 8",
        "in work    block 3 for 2s; last unit done: finish_block (block 2, worker 3) 2s ago",
        "error      2.00e-04, mean of blocks",
        "pace       6.5 s a block, 30s to go",
        "workers    3, 1 lost, 1 recovery in 3s, 4 Ray workers",
        "fallbacks  2",
    ]


def test_lines_of_a_dead_run_say_how_to_go_on():
    driver = three_of_eight()
    dead = alive(driver, is_alive=False, silent_s=93.0)
    lines = status_lines(status(driver, dead, blocks=3))
    silence = "no sign of life for 1m33s from process 4711 on host-7"
    assert f"state      interrupted: {silence}\n" in lines
    assert "go on      onecomp resume r\n" in lines
    assert "in work" not in lines
    lines = status_lines(status(driver, replace(dead, is_gone=True), blocks=3))
    assert "state      interrupted: process 4711 on host-7 is gone\n" in lines
    driver.write("failed", error="first line\nsecond line")
    lines = status_lines(status(driver, None, blocks=3))
    assert "state      failed: first line\n           second line\n" in lines
    assert "go on      onecomp resume r, once the cause is removed\n" in lines


def test_lines_of_a_finished_run():
    driver = Driver(1, [0]).start().quantize(0).finish()
    lines = status_lines(status(driver, None, blocks=1))
    assert "state      finished in 9s\n" in lines
    assert "checkpoint /models/out\n" in lines
    assert "go on" not in lines
    assert "workers" not in lines


# The directory


def test_the_holder_of_a_directory_is_found_alive_and_dead(tmp_path):
    run = write_run(tmp_path / "out.run", [])
    assert read_status(run).state == "not started"
    with hold(run):
        found = read_status(run)
        assert found.driver is not None
        assert (found.state, found.driver.pid) == ("running", os.getpid())
    assert find_driver(run) is None
    code = (
        "import os, pathlib, sys, onecomp.lease\n"
        "with onecomp.lease.hold(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=False)
    found = read_status(run)
    assert found.driver is not None
    assert (found.state, found.driver.is_gone) == ("not started", True)
    assert "is gone" in status_lines(found)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_run_under_a_url_is_read_like_a_local_one(tmp_path):
    run = write_run(tmp_path / "out.run", three_of_eight().events, range(3))
    assert replace(read_status(f"file://{run}"), run="", last_unit=None) == replace(
        read_status(run), run="", last_unit=None
    )


# The command


def test_the_command_answers_in_lines_and_in_json(tmp_path):
    driver = three_of_eight()
    run = write_run(tmp_path / "out.run", driver.events, range(3))
    (run / "blocks" / ".00003.safetensors.77.tmp").touch()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "blo')  # as a killed driver leaves it
    answer = CliRunner().invoke(app, ["status", str(run)])
    assert (answer.exit_code, answer.stdout) == (0, status_lines(read_status(run)) + "\n")
    found = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).stdout)
    assert (found["state"], found["blocks"]["done"]) == ("interrupted", 3)
    assert found["workers"] == {
        "executor": "4 Ray workers", "present": 3, "lost": 1, "recoveries": 1, "recovery_s": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_what_is_no_run_directory_is_refused(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    answer = CliRunner().invoke(app, ["status", str(tmp_path / place)])
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert f"error: {tmp_path / place}: is not a run directory (it holds no run.json)." in (
        answer.stderr
    )
    assert not (tmp_path / "missing").exists()


def test_a_damaged_record_is_named(tmp_path):
    run = write_run(tmp_path / "out.run", [])
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        read_status(run)


def test_the_command_does_not_wait_for_torch(tmp_path):
    run = write_run(tmp_path / "out.run", three_of_eight().events, range(3))
    code = (
        "import sys, onecomp.cli as cli; cli.app(['status', sys.argv[1]], standalone_mode=False)\n"
        "sys.exit(str({'torch', 'transformers', 'ray', 'matplotlib'} & sys.modules.keys() or ''))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False
    )
    assert answer.stderr.strip() == ""
    assert f"run        {run}" in answer.stdout
