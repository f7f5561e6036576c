"""Every method on SmolLM2-135M: perplexity, size, time and memory; prints a Markdown table.

    python benchmarks/quantizers.py MODEL TEXT [--match "GPTQ*"] [--at-once 2]

MODEL is the directory that ``deploy/fetch_smollm2.py`` wrote. TEXT is one text file: its start
calibrates (32 x 512 tokens), its second half is what perplexity is measured on. Each row runs in a
process of its own with one thread, so that its peak memory is its own.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from onecomp import (
    ARB,
    CQ,
    DBF,
    GPTQ,
    QBB,
    QUIP,
    RTN,
    AutoBitQuantizer,
    CalibrationConfig,
    JointQ,
    LocalExecutor,
    ModelConfig,
    Onebit,
    QEPConfig,
    Quantizer,
)
from onecomp.evaluation.perplexity import perplexity_of_tokens
from onecomp.export.checkpoint import METADATA, read_header
from onecomp.export.save import has_format
from onecomp.job import QuantizationJob
from onecomp.session import Session
from onecomp.worker import peak_memory_bytes

SAMPLES, LENGTH = 32, 512
ALL = {"mse": True, "actorder": True, "static_groups": True, "weighted_mse": True}
HEADER = (
    "| method | QEP | perplexity | of the original | bits a weight | seconds | peak memory MiB "
    "| worse than rounding |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Setting:
    """One method with its settings."""

    label: str
    quantizer: Quantizer


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    setting: Setting
    qep: bool
    model: str
    text: Path
    windows: int


@dataclass(frozen=True)
class Row:
    """What was measured."""

    perplexity: float
    bits: float
    """Bytes of the quantized layers on disk, in bits by weight: in the checkpoint, or in the run
    directory where the method has no checkpoint format."""
    seconds: float
    peak_bytes: int
    num_worse: int
    """Layers whose output error is above plain rounding's, as the journal has them."""


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--match", default="*", help="labels to run, a glob pattern")
    parser.add_argument("--qep", choices=("on", "off"), help="only rows with it, or without")
    parser.add_argument("--windows", type=int, default=24, help="512-token windows to evaluate on")
    parser.add_argument("--at-once", type=int, default=1, help="rows that run at the same time")
    arguments = parser.parse_args()
    tasks = [
        Task(setting, qep, arguments.model, arguments.text, arguments.windows)
        for setting in settings()
        if fnmatchcase(setting.label, arguments.match)
        for qep in ((False, True) if setting.quantizer.flag_hessian else (False,))
        if arguments.qep in (None, "on" if qep else "off")
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.at_once, mp_context=spawn, max_tasks_per_child=1
    ) as processes:
        original = processes.submit(original_perplexity, tasks[0]).result()
        print(f"original perplexity {original:.2f}\n\n{HEADER}", flush=True)
        for task, row in zip(tasks, processes.map(measure, tasks), strict=True):
            print(line(task, row, original), flush=True)


def line(task: Task, row: Row, original: float) -> str:
    """A row as Markdown."""
    cells = (
        task.setting.label,
        "on" if task.qep else "off",
        f"{row.perplexity:.2f}" if row.perplexity < 1e4 else f"{row.perplexity:.3g}",
        f"x{row.perplexity / original:.3g}",
        f"{row.bits:.2f}",
        f"{row.seconds:.0f}",
        f"{row.peak_bytes / 2**20:.0f}",
        str(row.num_worse),
    )
    return f"| {' | '.join(cells)} |"


def settings() -> Iterator[Setting]:
    """The table's methods."""
    for wbits in (4, 3, 2):
        yield Setting(f"RTN {wbits} bits g64", RTN(wbits=wbits, groupsize=64))
        yield Setting(f"GPTQ {wbits} bits g64", GPTQ(wbits=wbits, groupsize=64))
        yield Setting(f"GPTQ {wbits} bits g64 all", GPTQ(wbits=wbits, groupsize=64, **ALL))
        yield Setting(
            f"JointQ {wbits} bits g64 sym", JointQ(bits=wbits, symmetric=True, group_size=64)
        )
        yield Setting(f"RTN {wbits} bits row", RTN(wbits=wbits))
        yield Setting(f"GPTQ {wbits} bits row all", GPTQ(wbits=wbits, **ALL))
        yield Setting(f"QUIP {wbits} bits row", QUIP(wbits=wbits))
        yield Setting(f"QBB {wbits} bases row", QBB(wbits=wbits))
    for target in (4.0, 3.0, 2.0):
        candidates = [GPTQ(wbits=wbits, groupsize=64, **ALL) for wbits in (2, 3, 4, 8)]
        autobit = AutoBitQuantizer(quantizers=candidates, target_bit=target)
        yield Setting(f"AutoBit {target:g} bits g64", autobit)
    for bits in (2.0, 1.4, 1.2, 1.0, 0.8):
        yield Setting(f"DBF {bits:g} bits", DBF(target_bits=bits))
    yield Setting("1 bit Onebit", Onebit())
    yield Setting("1 bit ARB", ARB())
    yield Setting("1 bit CQ", CQ())
    yield Setting("1 bit QBB", QBB(wbits=1))


def calibration(task: Task, folder: Path) -> CalibrationConfig:
    """The first half of the text."""
    content = task.text.read_text(encoding="utf-8")
    path = folder / "calibration.txt"
    path.write_text(content[: len(content) // 2], encoding="utf-8")
    return CalibrationConfig(
        str(path), LENGTH, SAMPLES, strategy="concat_chunk", max_documents=10**6
    )


def evaluation_tokens(task: Task) -> torch.Tensor:
    """The start of the second half."""
    content = task.text.read_text(encoding="utf-8")
    tokenizer = ModelConfig(task.model).load_tokenizer()
    held_out = content[len(content) // 2 :]
    ids = tokenizer(held_out, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: task.windows * LENGTH]


def original_perplexity(task: Task) -> float:
    """Of the model as it is."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    return perplexity_of_tokens(
        model, evaluation_tokens(task), max_length=LENGTH, stride=LENGTH
    ).perplexity


def measure(task: Task) -> Row:
    """Quantize, then evaluate what was stored."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ModelConfig(task.model, dtype="float32")
        qep = QEPConfig() if task.qep else None
        job = QuantizationJob(config, task.setting.quantizer, calibration(task, folder), qep)
        session = Session.open(job, folder / "run", output=folder / "checkpoint")
        started = time.perf_counter()
        session.quantize(executor := LocalExecutor(1), report_progress=False)
        seconds = time.perf_counter() - started
        executor.stop()
        peak_bytes = peak_memory_bytes()
        results = session.run.results()
        model = config.load_model(device_map="cpu").eval()
        for layer_name, result in results.items():
            model.get_submodule(layer_name).weight.data.copy_(result.dequantize())
        perplexity = perplexity_of_tokens(
            model, evaluation_tokens(task), max_length=LENGTH, stride=LENGTH
        ).perplexity
        num_worse = sum(
            text.startswith("worse than plain rounding")
            for event in session.run.events("group")
            for text in event["fallbacks"]
        )
        stored = folder / ("checkpoint" if has_format(task.setting.quantizer) else "run/blocks")
        num_weights = sum(group.num_weights for group in session.layout.groups)
        bits = 8 * stored_bytes(stored, list(results)) / num_weights
    return Row(perplexity, bits, seconds, peak_bytes, num_worse)


def stored_bytes(directory: Path, layer_names: list[str]) -> int:
    """Bytes of the layers' tensors in the safetensors files of a directory."""
    total = 0
    for path in directory.glob("*.safetensors"):
        for name, entry in read_header(path).items():
            is_layer = name.replace("|", ".").rpartition(".")[0] in layer_names
            if name != METADATA and is_layer:
                start, end = entry["data_offsets"]
                total += end - start
    return total


if __name__ == "__main__":
    main()
