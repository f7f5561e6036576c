"""Quantize a real model to 4 bits on two local Ray workers and measure what it cost.

    make demo                       text of Python's own manual, nothing is asked of a hub
    make demo DATASET=wikitext2     a data set or a file of yours, for calibration and evaluation

The model is SmolLM2-135M-Instruct; everything is written below ``build``.
"""

import argparse
import json
import logging
import subprocess
import sys
from itertools import chain
from pathlib import Path

from demo_texts import write_demo_texts
from fetch_smollm2 import fetch_model

BUILD = Path("build")
MODEL = BUILD / "smollm2-135m"
DEMO = BUILD / "demo"
CHECKPOINT = DEMO / "smollm2-w4"
RUN_DIRECTORY = DEMO / "smollm2-w4.run"


def main() -> int:
    """Run the demo.

    Returns:
        The exit status of the first command that failed, else 0.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dataset", help="data set or file to calibrate on and to evaluate with")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch_model(MODEL, BUILD / "downloads")
    calibration, evaluation = write_demo_texts(DEMO)
    try:
        quantize(arguments.dataset or str(calibration))
        original = perplexity(MODEL, arguments.dataset or str(evaluation))
        quantized = perplexity(CHECKPOINT, arguments.dataset or str(evaluation))
    except subprocess.CalledProcessError as error:
        return error.returncode
    print_summary(original, quantized)
    return 0


def quantize(dataset: str) -> None:
    """Write the 4-bit checkpoint and the report, on two local Ray workers."""
    options = {
        "--output": str(CHECKPOINT),
        "--run-dir": str(RUN_DIRECTORY),
        "--calibration-dataset": dataset,
        "--num-calibration-samples": "32",
        "--max-length": "512",
        "--num-workers": "2",
    }
    print(run_onecomp("quantize", str(MODEL), *chain(*options.items()), "--overwrite"))


def perplexity(directory: Path, dataset: str) -> float:
    """Perplexity on the first 16384 tokens of ``dataset``, in windows of 512 tokens."""
    windows = ("--max-length", "512", "--stride", "512", "--max-tokens", "16384")
    answer = run_onecomp("eval", str(directory), "--ppl", dataset, *windows, "--json")
    return json.loads(answer)["perplexity"]


def run_onecomp(*arguments: str) -> str:
    """What the ``onecomp`` of this environment prints on its standard output.

    Raises:
        subprocess.CalledProcessError: It failed; what went wrong is on standard error.
    """
    command = [str(Path(sys.executable).with_name("onecomp")), *arguments]
    print(f"\n$ onecomp {' '.join(arguments)}", flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_summary(original: float, quantized: float) -> None:
    """Say where everything is and what the quantization cost."""
    print(f"\ncheckpoint           {CHECKPOINT}")
    print(f"report               {RUN_DIRECTORY / 'report.html'}")
    print(f"perplexity original  {original:.4f}")
    print(f"perplexity 4 bits    {quantized:.4f}")
    print(f"ratio                {quantized / original:.4f}")


if __name__ == "__main__":
    sys.exit(main())
