"""What workers cost and bring: one against two, Ray against this process, and a lost worker.

    python benchmarks/scaling.py MODEL TEXT [--repeat 3] [--match "SmolLM2*"] [--blocks 10]

MODEL and TEXT are as for ``quantize_smollm2.py``. Every worker computes on one thread; the start
of clusters and processes is not measured. Settings take turns, so that all see the same machine.
A model's blocks are alike, so some of them tell what each costs.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from quantize_smollm2 import ALL, Bench, Setting, matching, ray_executor
from transformers import LlamaConfig, LlamaForCausalLM

from onecomp import GPTQ, CalibrationConfig, Executor, LocalExecutor, ModelConfig, QEPConfig
from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import cut_shards
from onecomp.job import QuantizationJob
from onecomp.linalg import gram_strips
from onecomp.schedule import assign_shards
from onecomp.session import Session
from onecomp.statistics import Contribution, FewRows, merge

LAYERS_OF_A_BLOCK = 7


@dataclass(frozen=True)
class Run:
    """What one run took."""

    seconds: float
    driver_seconds: float
    driver_bytes: int
    moved_bytes: int
    recovery_seconds: float


@dataclass(frozen=True)
class Case:
    """A model and a setting."""

    label: str
    bench: Bench | None
    """None for the wide model."""
    setting: Setting

    def session(self, folder: Path, number: int) -> Session:
        """A fresh run."""
        if self.bench is not None:
            return self.bench.session(self.setting)
        ids = torch.randint(3, 250, (32, 256), generator=torch.Generator().manual_seed(0))
        job = QuantizationJob(
            ModelConfig(str(folder / "wide"), dtype="float32"),
            self.setting.quantizer,
            CalibrationConfig(),
            self.setting.qep,
        )
        samples = CalibrationSamples(ids, torch.ones_like(ids))
        return Session.open(job, folder / f"wide-run{number}", samples=samples)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians are shown")
    parser.add_argument("--match", default="*", help="cases to run, a glob pattern")
    parser.add_argument("--blocks", type=int, help="quantize the first blocks only; default: all")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_wide(Path(folder) / "wide")
        bench = Bench(arguments.model, arguments.text, Path(folder), windows=1)
        labels = {s.label for s in matching(settings(arguments.blocks), arguments.match)}
        cases = [c for c in all_cases(bench, arguments.blocks) if c.setting.label in labels]
        measure(cases, Path(folder), arguments.repeat)


def settings(blocks: int | None) -> list[Setting]:
    """What is measured; the label says on which model."""
    num_layers = None if blocks is None else LAYERS_OF_A_BLOCK * blocks
    plain = GPTQ(wbits=4, groupsize=64, num_layers=num_layers)
    defaults = GPTQ(wbits=4, groupsize=64, num_layers=num_layers, **ALL)
    return [
        Setting("SmolLM2, full-precision inputs", plain),
        Setting("SmolLM2, error propagation, mse", defaults, QEPConfig()),
        Setting("wide, full-precision inputs", plain),
        Setting("wide, error propagation, mse", defaults, QEPConfig()),
    ]


def all_cases(bench: Bench, blocks: int | None) -> list[Case]:
    """One for each setting."""
    return [
        Case(s.label, bench if s.label.startswith("SmolLM2") else None, s) for s in settings(blocks)
    ]


def save_wide(directory: Path) -> None:
    """A random Llama in which one down-projection a block is most of the work."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def measure(cases: Sequence[Case], folder: Path, repeat: int) -> None:
    """Run everything in turns, then print the tables."""
    found: dict[tuple[str, str], list[Run]] = {}
    for number in range(repeat):
        for case in cases:
            for name, executor in executors():
                with executor as workers:
                    found.setdefault((case.label, name), []).append(timed(case, folder, workers))
            with ray_executor(2) as workers, killer(workers):
                found.setdefault((case.label, "killed"), []).append(timed(case, folder, workers))
            print(f"round {number + 1} of {repeat}: {case.label}", flush=True)
    print_tables(cases, folder, found)


def executors() -> Iterator[tuple[str, object]]:
    """By name: this process with one thread, Ray with one worker and with two."""
    yield "process", local_executor()
    yield "ray 1", ray_executor(1)
    yield "ray 2", ray_executor(2)


@contextmanager
def local_executor() -> Iterator[Executor]:
    """One worker thread."""
    executor = LocalExecutor(1)
    yield executor
    executor.stop()


def timed(case: Case, folder: Path, executor: Executor) -> Run:
    """One run, without the start of the workers' processes."""
    session = case.session(folder, time.monotonic_ns())
    before, started = executor.driver_bytes, time.perf_counter()
    session.quantize(executor, report_progress=False)
    seconds = time.perf_counter() - started
    blocks = session.run.events("block")
    return Run(
        seconds,
        sum(event["driver_seconds"] for event in blocks),
        executor.driver_bytes - before,
        sum(event["bytes_moved"] for event in blocks),
        sum(event["seconds"] for event in session.run.events("recovery")),
    )


@contextmanager
def killer(executor: Executor) -> Iterator[None]:
    """Kills a worker's process some time after the work has begun."""
    pid = executor.place(executor.workers[-1]).pid
    timer = threading.Timer(8.0, os.kill, (pid, signal.SIGKILL))
    timer.start()
    yield
    timer.cancel()


def least_bytes(case: Case, folder: Path, num_workers: int) -> int:
    """Bytes of sums that have to reach the owners: each worker's nodes of the summation tree."""
    session = case.session(folder, time.monotonic_ns())
    shards = cut_shards(session.samples)
    total = 0
    for run in assign_shards(len(shards), dict.fromkeys(range(num_workers), 1.0)).values():
        leaves = [Contribution(i, i + 1, FewRows(torch.zeros(0, 1), None)) for i in run]
        nodes = len(merge_as_sums(leaves, len(shards)))
        for group in session.layout.groups:
            corrected = case.setting.qep is not None and any(
                map(case.setting.qep.corrects, group.layer_names)
            )
            strips = gram_strips(torch.zeros(1, group.in_features))
            size = 4 * sum(strip.numel() for strip in strips)
            total += nodes * (size + (4 * group.in_features**2 if corrected else 0))
    return total


def merge_as_sums(leaves: Sequence[Contribution], num_shards: int) -> list[Contribution]:
    """How far a worker's shards are added up, whatever they hold."""
    from onecomp.statistics import GroupStatistics  # noqa: PLC0415 - empty sums, for counting

    empty = GroupStatistics(0, [])
    return merge([Contribution(c.first, c.last, empty) for c in leaves], num_shards)


def print_tables(
    cases: Sequence[Case], folder: Path, found: dict[tuple[str, str], list[Run]]
) -> None:
    """Medians."""

    def median(case: Case, name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in found[case.label, name])

    print("\n| case | process s | Ray, 1 worker s | overhead | Ray, 2 workers s | efficiency |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        alone, one, two = (median(case, n, "seconds") for n in ("process", "ray 1", "ray 2"))
        print(
            f"| {case.label} | {alone:.1f} | {one:.1f} | {one / alone - 1:+.1%} | {two:.1f} "
            f"| {one / two / 2:.2f} |"
        )
    print(
        "\n| case, 2 workers | driver s a block | driver share | driver MB | sums moved MB "
        "| least MB | lost worker costs s | of that, recovery s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        seconds, driver = median(case, "ray 2", "seconds"), median(case, "ray 2", "driver_seconds")
        blocks = len(case.session(folder, time.monotonic_ns()).layout.blocks)
        moved = median(case, "ray 2", "moved_bytes") / 1e6
        lost = median(case, "killed", "seconds") - seconds
        print(
            f"| {case.label} | {driver / blocks:.3f} | {driver / seconds:.2%} "
            f"| {median(case, 'ray 2', 'driver_bytes') / 1e6:.2f} | {moved:.0f} "
            f"| {least_bytes(case, folder, 2) / 1e6:.0f} | {lost:.1f} "
            f"| {median(case, 'killed', 'recovery_seconds'):.1f} |"
        )


if __name__ == "__main__":
    main()
