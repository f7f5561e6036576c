"""`onecomp submit` as its user meets it: real processes, a real head, real signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_head import ROOT, Head, onecomp, own_environment, running_head
from tiny_models import sample_text

from actors.job import check_words, how_to_resume, lost_places
from actors.submission import Submission, environment_of
from onecomp.errors import ConfigError, InputError

SECONDS = 400
"""Until a test gives up; jobs take ten to twenty on an idle machine."""
CALIBRATION = ("--num-calibration-samples", "8", "--max-length", "64")


@pytest.fixture
def checkout(tmp_path) -> Callable[[str], Path]:
    """``checkout(source)``: a directory that stands for a checkout, whose job is ``source``."""

    def make(source: str) -> Path:
        script = tmp_path / "checkout" / "deploy" / "onecomp_job.py"
        script.parent.mkdir(parents=True)
        script.write_text(source)
        return script.parents[1]

    return make


def submit(head: Head, *words: object) -> subprocess.Popen:
    return onecomp("submit", "--address", head.url, *words)


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the process's output up to the line that holds ``text``."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in {''.join(lines)}\n{process.communicate()[1]}")


def only_job(head: Head, entrypoint: str) -> JobStatus:
    """State of the one job whose command holds ``entrypoint``."""
    jobs = JobSubmissionClient(head.url).list_jobs()
    [job] = [job for job in jobs if entrypoint in job.entrypoint]
    return job.status


@pytest.mark.ray
def test_the_jobs_output_and_status_are_those_of_the_command(ray_head, checkout):
    source = "import os, sys\nprint(sys.argv[1:], os.environ['KEY'], sep='|')\nsys.exit(1)"
    words = ["--working-dir", checkout(source), "--env", "KEY=a b", "--", "resume", "/no/such run"]
    output, errors = (process := submit(ray_head, *words)).communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert output.splitlines()[-1] == "['resume', '/no/such run']|a b"
    assert "ended with status 1" in errors
    assert "go on with: onecomp submit" in errors
    assert "resume /no/such run" in errors


@pytest.mark.ray
def test_without_waiting_the_jobs_name_is_all_that_is_printed(ray_head, checkout):
    words = ["--working-dir", checkout("print('x')"), "--no-wait", "report", "/no/wait.run"]
    output, errors = (process := submit(ray_head, *words)).communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert output.startswith("onecomp_")
    assert len(output.split()) == 1
    assert f"ray job logs --follow --address {ray_head.url} {output.strip()}" in errors


@pytest.mark.ray
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_stops_the_job(ray_head, checkout, number):
    source = "import time\nprint('it runs')\ntime.sleep(900)"
    run = f"/interrupted/{number}"
    process = submit(ray_head, "--working-dir", checkout(source), "resume", run)
    wait_for(process, "it runs")
    assert only_job(ray_head, run) == JobStatus.RUNNING
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert only_job(ray_head, run) == JobStatus.STOPPED
    assert "is stopped; finished blocks are kept, go on with: onecomp submit" in errors
    assert f"-- resume {run}" in errors
    assert "Traceback" not in errors


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(ray_head, checkout):
    source = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('it runs')\n"
    run = "/interrupted/twice"
    process = submit(ray_head, "--working-dir", checkout(source + "time.sleep(900)"), "resume", run)
    wait_for(process, "it runs")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "stopping job" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130
    assert "may go on" in rest
    assert "ray job stop" in rest
    assert only_job(ray_head, run) == JobStatus.RUNNING


@pytest.mark.ray
def test_ray_job_submit_quantizes(ray_head, tiny_model_dir, tmp_path):
    """As the README of Ray has it: a checkout, nothing installed, lines of progress."""
    text, output = tmp_path / "text.txt", tmp_path / "quantized"
    text.write_text(sample_text(1000))
    script = ["python", "deploy/onecomp_job.py", "quantize", str(tiny_model_dir()), *CALIBRATION]
    script += ["--output", str(output), "--calibration-dataset", str(text), "--num-workers", "1"]
    ray = str(Path(sys.executable).with_name("ray"))
    ran = subprocess.run(
        [ray, "job", "submit", "--address", ray_head.url, "--working-dir", ".", "--", *script],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (output / "config.json").exists()
    assert "block   1/2" in ran.stdout
    assert "block   2/2" in ran.stdout
    assert "\r" not in ran.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_quantization_is_resumed(ray_head, tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama", num_layers=40)
    text, output = tmp_path / "text.txt", tmp_path / "quantized"
    text.write_text(sample_text(1000))
    words = ["quantize", model, "--output", output, "--calibration-dataset", text, *CALIBRATION]
    process = submit(ray_head, "--", *words, "--num-workers", 1)
    wait_for(process, "block   2/40")
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "block  40/40" not in rest
    assert f"-- resume {output}.run" in errors
    assert not (output / "config.json").exists()
    process = submit(ray_head, "resume", f"{output}.run", "--num-workers", 1)
    rest, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, rest + errors
    assert (output / "config.json").exists()
    assert "block   1/40" not in rest


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_a_token_wants_it(checkout):
    source = "print('it runs')"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with running_head(**token) as head:
        words = ["submit", "--address", head.url, "--working-dir", checkout(source), "report", "/x"]
        _, errors = (process := onecomp(*words)).communicate(timeout=SECONDS)
        assert process.returncode == 2
        assert "token" in errors
        assert len(errors.strip().splitlines()) == 1
        process = onecomp(*words, environment=own_environment(**token))
        output, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, output.splitlines()[-1]) == (0, "it runs"), errors


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("quantise m --output /d", "No such command 'quantise'"),
        ("quantize m --output /d --wbits four", "'--wbits'"),
        ("quantize m", "'--output'"),
        ("quantize m --output d", "output 'd' is relative"),
        ("quantize m --output /d --run-dir ../r", "run-dir '../r' is relative"),
        ("quantize here --output s3://b/d", "model 'here' is relative"),
        ("resume ~/r", "run '~/r' is relative"),
    ],
)
def test_a_job_that_cannot_work_is_not_sent(tmp_path, words, problem):
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError) as refusal:
        check_words(words.split(), tmp_path)
    assert problem in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        "quantize org/model --output s3://bucket/out --run-dir s3://bucket/run",
        "quantize /models/m --output /out/m",
        "resume /out/m.run --num-workers 2",
        "eval org/model --ppl text.txt",
    ],
)
def test_a_job_that_can_work_is_sent(tmp_path, words):
    check_words(words.split(), tmp_path)
    assert lost_places(words.split(), tmp_path) == []


def test_every_lost_place_is_named_at_once(tmp_path):
    assert len(lost_places(["quantize", "m", "--output", "d", "--run-dir", "r"], tmp_path)) == 2


@pytest.mark.parametrize(
    ("words", "run"),
    [
        ("quantize m --output /d/", "/d.run"),
        ("quantize m --output s3://b/d", "s3://b/d.run"),
        ("quantize m --output /d --run-dir /r", "/r"),
        ("resume /r", "/r"),
    ],
)
def test_how_to_resume_names_the_run(words, run):
    assert how_to_resume(words.split()).endswith(f"onecomp resume {run}")


def test_where_nothing_is_kept_there_is_nothing_to_resume():
    assert "resume" not in how_to_resume(["eval", "/d", "--ppl", "text.txt"])
    assert "resume" not in how_to_resume(["no-such-command"])


def test_variables_come_from_the_option_or_from_here(monkeypatch):
    monkeypatch.setenv("HERE", "secret")
    monkeypatch.delenv("NOT_HERE", raising=False)
    assert environment_of(["A=1=2", "B=", "HERE"]) == {"A": "1=2", "B": "", "HERE": "secret"}
    with pytest.raises(ConfigError, match="2 problems") as refusal:
        environment_of(["NOT_HERE", "=x"])
    assert "no such variable here" in str(refusal.value)


def test_a_directory_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkout of this project"):
        Submission.checked("http://127.0.0.1:1", ["report", "/r"], tmp_path, ())
    installed = Submission.checked("http://127.0.0.1:1", ["report", "/r"], None, ())
    assert installed.command == ["python", "-m", "actors.job", "report", "/r"]
    own = Submission.checked("http://127.0.0.1:1", ["report", "/r"], ROOT, ())
    assert own.command == ["python", "deploy/onecomp_job.py", "report", "/r"]


def test_where_nothing_listens_the_command_line_says_so_in_one_message():
    environment = own_environment(NO_PROXY="*")
    words = ["submit", "--address", "http://127.0.0.1:9", "--working-dir", ROOT, "report", "/r"]
    output, errors = (process := onecomp(*words, environment=environment)).communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("error: --address: No job server of Ray answers at http://127.0.0.1:9")
    assert len(errors.splitlines()) == 1
    assert os.environ.get("RAY_API_SERVER_ADDRESS") is None
