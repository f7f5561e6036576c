"""A pretrained model, from the command line, as `make demo` does it; `make test-all` only."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "build" / "smollm2-135m"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A directory with ``calibration.txt`` and ``evaluation.txt``, which share nothing."""
    run_python("deploy/fetch_smollm2.py", MODEL)
    directory = tmp_path_factory.mktemp("texts")
    run_python("deploy/demo_texts.py", directory)
    return directory


@pytest.fixture(scope="module")
def quantized(texts: Path) -> Callable[[int], Path]:
    """The checkpoint that so many workers make, 0 for one process."""

    def make(num_workers: int) -> Path:
        output = texts / f"workers{num_workers}"
        counts = ["--num-calibration-samples", 8, "--max-length", 512]
        calibration = ["--calibration-dataset", texts / "calibration.txt", *counts]
        run_onecomp("quantize", MODEL, "--output", output, *calibration,
                    "--num-workers", num_workers)  # fmt: skip
        return output

    return make


def run_python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def run_onecomp(*arguments: object) -> str:
    return run_python("-m", "onecomp", *arguments)


def perplexity(directory: Path, texts: Path) -> float:
    windows = ["--max-length", 512, "--max-tokens", 6144, "--json"]
    answer = run_onecomp("eval", directory, "--ppl", texts / "evaluation.txt", *windows)
    return json.loads(answer)["perplexity"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_four_bits_cost_little_and_the_number_of_workers_nothing(texts, quantized):
    alone, together = quantized(0), quantized(2)
    assert contents(alone) == contents(together)
    assert "0 differ" in run_onecomp("verify", alone)
    assert perplexity(alone, texts) < 1.1 * perplexity(MODEL, texts)
