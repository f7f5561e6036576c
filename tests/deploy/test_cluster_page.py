"""docs/cluster.md: its commands are right, and those that one machine can run do run."""

import re
import shlex
from pathlib import Path

import pytest
from ray.scripts.scripts import cli
from ray_head import ROOT, onecomp
from tiny_models import sample_text

from actors.job import check_words

PAGE = ROOT / "docs" / "cluster.md"
ELSEWHERE = "/mnt/onecomp"
"""Part of the commands for clusters in a cloud."""
SECONDS = 400


def command_lines() -> list[str]:
    """Every command line of ours on the page, in order."""
    return [line for line in lines_of_blocks("") if line.startswith("onecomp ")]


def shell_lines() -> list[str]:
    """Every other command of the page, comments left out."""
    return lines_of_blocks("sh")


def lines_of_blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    text = "".join(block for named, block in found if named == language)
    return text.replace("\\\n", " ").splitlines()


def test_what_is_submitted_can_be_submitted():
    submitted = [line.partition(" -- ")[2] for line in command_lines() if " submit " in line]
    assert len(submitted) >= 4
    for words in submitted:
        check_words(shlex.split(words), Path("/"))


def test_every_command_of_clusters_is_shown():
    shown = {line.split()[1] for line in command_lines()}
    assert {"plan", "quantize", "submit", "status", "resume"} <= shown


def test_scripts_and_manifests_of_the_page_exist():
    files = re.findall(r"(?<![\w/])(?:deploy/[\w/.]+|ray_cluster\.yaml)", "\n".join(shell_lines()))
    assert {"deploy/Dockerfile", "deploy/kuberay/raycluster.yaml"} <= set(files)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_rays_own_commands_have_these_options():
    """Those that start or ask something are not run here; Ray must know their every option."""
    ray = [line for line in shell_lines() if line.startswith("ray ")]
    assert len(ray) >= 5
    for line in ray:
        words = shlex.split(line, comments=True)
        words = words[: words.index("--")] if "--" in words else words
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        command = [word for word in words[:3] if re.fullmatch(r"[a-z-]+", word)][:3]
        command = command if command[1] == "job" else command[:2]
        assert options <= options_of(command), line


def options_of(command: list[str]) -> set[str]:
    found = cli
    for name in command[1:]:
        found = found.commands[name]
    return {option for parameter in found.params for option in parameter.opts}


@pytest.mark.ray
@pytest.mark.slow
def test_what_one_machine_can_run_runs(ray_head, s3, tiny_model_dir, tmp_path):
    (tmp_path / "calibration.txt").write_text(sample_text(1000))
    here = {
        "/models/llama": str(tiny_model_dir()),
        "/data/": f"{tmp_path}/",
        "http://127.0.0.1:8265": ray_head.url,
        "127.0.0.1:6379": ray_head.address,
        "s3://bucket": str(s3).rstrip("/"),
    }
    lines = [line for line in command_lines() if ELSEWHERE not in line]
    assert len(lines) >= 8
    for line in lines:
        for shown, real in here.items():
            line = line.replace(shown, real)
        words = shlex.split(line)[1:]
        if "quantize" in words:
            words += ["--num-calibration-samples", "8", "--max-length", "64"]
        output, errors = (process := onecomp(*words)).communicate(timeout=SECONDS)
        assert process.returncode == 0, f"{line}\n{output}\n{errors}"
    assert all((tmp_path / f"llama-w{bits}" / "config.json").exists() for bits in (2, 3, 4, 8))
