"""What training after quantization gives on SmolLM2-135M; prints a Markdown table.

    python benchmarks/post_process.py MODEL TEXT --work DIR [--match "g3 *"]

MODEL is the directory that ``deploy/fetch_smollm2.py`` wrote. The first half of TEXT calibrates
and trains (64 x 512 tokens, an eighth of them held out), perplexity is that of its second half. DIR
keeps checkpoints and finished rows, so that a later call goes on. Every row runs in a process of
its own, one thread each.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import transformers

from onecomp import (
    DBF,
    GPTQ,
    BlockWisePTQ,
    CalibrationConfig,
    GlobalPTQ,
    GlobalPTQDistributed,
    LocalExecutor,
    ModelConfig,
    PostProcessLoraTeacherOnlySFT,
    Quantizer,
    Runner,
)
from onecomp.calibration import prepare_calibration_samples
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.post_process.base import PostQuantizationProcess
from onecomp.post_process.checkpoint_job import PostProcessJob

SAMPLES, LENGTH, WINDOWS = 64, 512, 24
TRAINED = SAMPLES - SAMPLES // 8
HALVES = ("first.txt", "second.txt")
CHUNKS = "chunks.jsonl"
"""The training samples as rows of text, for adapters."""

BASE: dict[str, tuple[str, Callable[[], Quantizer], bool]] = {
    "g3": ("GPTQ 3 bits, groups of 64", lambda: GPTQ(**THREE_BITS), False),
    "q3": ("the same with error propagation", lambda: GPTQ(**THREE_BITS), True),
    "d2": ("DBF 2.0 with error propagation", lambda: DBF(target_bits=2.0), True),
}
"""Checkpoints: title, method, error propagation."""
THREE_BITS = {
    "wbits": 3, "groupsize": 64, "mse": True, "actorder": True, "static_groups": True,
    "weighted_mse": True,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One process on the output of another row, or on a checkpoint."""

    name: str
    of: str
    make: Callable[[CalibrationConfig], PostQuantizationProcess]
    epochs: int


def blockwise(**settings: object) -> Callable[[CalibrationConfig], PostQuantizationProcess]:
    """Block-wise training in this process."""

    def make(text: CalibrationConfig) -> BlockWisePTQ:
        return BlockWisePTQ(
            calibration_config=text, num_workers=0, use_mixed_precision=True, **settings
        )

    return make


def whole(**settings: object) -> Callable[[CalibrationConfig], PostQuantizationProcess]:
    """Global training in this process."""

    def make(text: CalibrationConfig) -> GlobalPTQ:
        return GlobalPTQ(calibration_config=text, use_mixed_precision=True, **settings)

    return make


def gang(**settings: object) -> Callable[[CalibrationConfig], PostQuantizationProcess]:
    """Global training by two workers under ZeRO-3."""

    def make(text: CalibrationConfig) -> GlobalPTQDistributed:
        return GlobalPTQDistributed(
            calibration_config=text, num_workers=2, deepspeed_config=ZERO3, **settings
        )

    return make


def adapters(**settings: object) -> Callable[[CalibrationConfig], PostQuantizationProcess]:
    """Adapters against the original model."""

    def make(text: CalibrationConfig) -> PostProcessLoraTeacherOnlySFT:
        return PostProcessLoraTeacherOnlySFT(
            data_files=str(Path(text.calibration_dataset).with_name(CHUNKS)), max_length=LENGTH,
            **settings,
        )  # fmt: skip

    return make


ZERO3 = {"zero_optimization": {"stage": 3}}
CODES = blockwise(epochs=5, gptq_lr=3e-3, gptq_optimize_intweight=True)
HALF_ANSWERING = blockwise(
    epochs=5, gptq_lr=4e-3, gptq_optimize_intweight=True, answering_blocks=15, batch_size=2
)
SIGNS = blockwise(epochs=4, lr=8e-3, binary_lr=3e-5, answering_blocks=20)
SCALES = {"epochs": 2, "gptq_lr": 2e-4}
KEPT = {"use_gradient_checkpointing": False}
"""Activations of all blocks are kept, none is computed twice."""
ROWS = (
    Row("g3 block", "g3", CODES, 5),
    Row("g3 global", "g3", whole(**SCALES), 2),
    Row("g3 gang", "g3", gang(**SCALES), 2),
    Row("g3 block, global", "g3 block", whole(**SCALES), 2),
    Row("g3 adapters", "g3", adapters(epochs=1, lr=1e-3, gradient_accumulation_steps=4), 1),
    Row("q3 block", "q3", HALF_ANSWERING, 5),
    Row("q3 global", "q3", whole(epochs=5, gptq_lr=3e-4, **KEPT), 5),
    Row("q3 gang", "q3", gang(epochs=6, gptq_lr=4e-4, **KEPT), 6),
    Row("d2 block", "d2", SIGNS, 4),
    Row("d2 global", "d2", whole(epochs=2, dbf_lr=5e-4), 2),
    Row("d2 gang", "d2", gang(epochs=2, dbf_lr=8e-4, **KEPT), 2),
)


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    model: Path
    work: Path

    @property
    def text(self) -> CalibrationConfig:
        """The first half."""
        return CalibrationConfig(
            str(self.work / HALVES[0]), LENGTH, SAMPLES, strategy="concat_chunk"
        )

    @property
    def original(self) -> ModelConfig:
        """The model before it was quantized."""
        return ModelConfig(str(self.model), dtype="auto", device="cpu")

    def perplexity(self, checkpoint: Path) -> float:
        """Of the second half."""
        request = PerplexityRequest.checked(
            str(self.work / HALVES[1]), LENGTH, max_tokens=WINDOWS * LENGTH
        )
        return float(evaluate_checkpoint(checkpoint, request)["perplexity"])

    def place(self, name: str) -> Path:
        """Where a checkpoint is."""
        return self.work / name.replace(", ", "-").replace(" ", "-")

    def figures(self, name: str) -> dict:
        """What is known of a finished row, or of a checkpoint."""
        return json.loads(self.place(name).with_suffix(".json").read_text())

    def quantize(self, name: str) -> None:
        """Make a checkpoint to begin with."""
        title, method, propagates = BASE[name]
        runner = Runner(
            self.original, method(), calibration_config=self.text, qep=propagates,
            executor=LocalExecutor(1),
        )  # fmt: skip
        runner.run()
        runner.save_quantized_model(self.place(name))
        self._note(name, title=title)

    def improve(self, row: Row) -> None:
        """Run a process."""
        self._write_chunks()
        job = PostProcessJob(
            self.place(row.of),
            self.place(row.name),
            row.make(self.text),
            self.original,
            overwrite=True,
        )
        entry = job.run()
        seconds = entry["seconds"]
        self._note(
            row.name,
            seconds=seconds,
            memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            speed=row.epochs * TRAINED * LENGTH / seconds,
            held_out=(entry["held_out_before"], entry["held_out_after"]),
            details=entry.get("details", {}),
        )

    def _write_chunks(self) -> None:
        tokenizer = self.original.load_tokenizer()
        samples = prepare_calibration_samples(self.text, tokenizer, self.original.load_model)
        rows = tokenizer.batch_decode(samples.input_ids)
        lines = [json.dumps({"text": row}) for row in rows]
        (self.work / CHUNKS).write_text("\n".join(lines))

    def _note(self, name: str, **figures: object) -> None:
        path = self.place(name).with_suffix(".json")
        figures["perplexity"] = self.perplexity(self.place(name))
        path.write_text(json.dumps(figures, indent=1))

    def line(self, row: Row) -> str:
        """A row of the table; what the workers of a gang take is not seen from here."""
        found, before = self.figures(row.name), self.figures(row.of)["perplexity"]
        after, memory = found["perplexity"], f"{found['memory'] / 1e9:.1f}"
        return (
            f"| {row.name} | {before:.2f} | {after:.2f} | {1 - after / before:.1%} "
            f"| {found['seconds']:.0f} | {'' if 'gang' in row.name else memory} "
            f"| {found['speed']:.0f} |"
        )


def main() -> None:
    """Make what is missing, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--match", default="*", help="rows to run, a glob pattern")
    parser.add_argument("--make", help="make one checkpoint or row here, and print nothing")
    given = parser.parse_args()
    bench = Bench(given.model.resolve(), given.work.resolve())
    if given.make:
        make_here(bench, given.make)
        return
    write_halves(given.text.read_text(), bench.work)
    chosen = [row for row in ROWS if fnmatchcase(row.name, given.match)]
    for name in (n for row in chosen for n in (*origins(row), row.name)):
        if not bench.place(name).with_suffix(".json").exists():
            arguments = [str(given.model), str(given.text), "--work", str(bench.work)]
            subprocess.run(
                [sys.executable, __file__, *arguments, "--make", name],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    print("| | before | after | lower by | s | GB | tokens/s |\n|---|---|---|---|---|---|---|")
    for row in chosen:
        print(bench.line(row))


def origins(row: Row) -> list[str]:
    """What a row begins with, from the checkpoint on."""
    by_name = {other.name: other for other in ROWS}
    return [row.of] if row.of in BASE else [*origins(by_name[row.of]), row.of]


def make_here(bench: Bench, name: str) -> None:
    """One checkpoint or row, in this process."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    transformers.logging.set_verbosity_error()
    if name in BASE:
        bench.quantize(name)
    else:
        bench.improve(next(row for row in ROWS if row.name == name))


def write_halves(text: str, work: Path) -> None:
    """Cut the text at the line that is nearest to its middle from below."""
    work.mkdir(parents=True, exist_ok=True)
    middle = text.rfind("\n", 0, len(text) // 2) + 1
    for name, part in zip(HALVES, (text[:middle], text[middle:]), strict=True):
        (work / name).write_text(part)


if __name__ == "__main__":
    main()
