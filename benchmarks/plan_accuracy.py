"""What ``onecomp plan --probe`` predicts against what runs take; prints a Markdown table.

    python benchmarks/plan_accuracy.py MODEL [MODEL ...] --text TEXT [--repeat 3] [--workers 0,2]

Every plan and every run has a process of its own, and they take turns, so that both see the same
machine, which should have nothing else to do. Seconds are processor seconds of the quantize phase,
all workers together, with the start of their processes on Ray; memory is the peak resident memory
of the process, or of the largest worker. The text's start calibrates.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from onecomp import GPTQ, CalibrationConfig, Executor, LocalExecutor, ModelConfig, QEPConfig
from onecomp.job import QuantizationJob, default_groupsize
from onecomp.models import Skeleton
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place, Request, make_estimate, probed
from onecomp.planning.shapes import TextShape
from onecomp.session import Session
from onecomp.worker import peak_memory_bytes

SAMPLES, LENGTH = 32, 512
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    model: str
    text: str
    qep: bool
    num_workers: int
    """0: threads of this process, one for each core."""

    def job(self) -> QuantizationJob:
        """The job that ``onecomp quantize`` makes of its defaults."""
        config = ModelConfig(self.model, dtype="auto")
        skeleton = Skeleton.build(config.source, config.torch_dtype)
        method = GPTQ(groupsize=default_groupsize(GPTQ(), skeleton), **SETTINGS)
        calibration = CalibrationConfig(
            self.text, LENGTH, SAMPLES, strategy="concat_chunk", max_documents=10**6
        )
        return QuantizationJob(config, method, calibration, QEPConfig() if self.qep else None)


SETTINGS = {
    "sym": True, "mse": True, "actorder": True, "static_groups": True, "weighted_mse": True
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Predicted or measured."""

    processor_s: float
    wall_s: float
    memory: float
    """Bytes."""


def main() -> None:
    """Print a row for every model and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", default="0,2", help="0 for this process, else Ray workers")
    arguments = parser.parse_args()
    print("| model | inputs | workers | processor s | | | peak MiB | | |")
    print("| | | | planned | measured | ratio | planned | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for model in arguments.models:
        for num_workers in map(int, arguments.workers.split(",")):
            for qep in (True, False):
                setting = Setting(model, arguments.text, qep, num_workers)
                _print_row(setting, arguments.repeat)


def _print_row(setting: Setting, repeat: int) -> None:
    planned, measured = [], []
    for _ in range(repeat):
        planned.append(_in_child(plan, setting))
        measured.append(_in_child(run, setting))
    cells = []
    for name, unit in (("processor_s", 1.0), ("memory", MIB)):
        a, b = (
            statistics.median(vars(figures)[name] for figures in rows)
            for rows in (planned, measured)
        )
        cells += [f"{a / unit:.0f}", f"{b / unit:.0f}", f"{a / b:.2f}"]
    where = "this process" if setting.num_workers == 0 else f"Ray, {setting.num_workers}"
    inputs = "error propagation" if setting.qep else "full precision"
    print(f"| {Path(setting.model).name} | {inputs} | {where} | {' | '.join(cells)} |", flush=True)


def _in_child(function: Callable[[Setting], Figures], setting: Setting) -> Figures:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (setting,))


def plan(setting: Setting) -> Figures:
    """What a plan with a probe says."""
    quiet()
    job = setting.job()
    text = TextShape(SAMPLES, LENGTH)
    request = Request(PlannedModel.open(setting.model, "auto"), job.quantizer, text, job.qep)
    place = Place(setting.num_workers)
    estimate, _ = probed(make_estimate(request, place), request, place)
    processor_s = estimate.work_s + estimate.workers_start_s
    return Figures(processor_s, estimate.wall_s, estimate.memory.host_bytes)


def run(setting: Setting) -> Figures:
    """What a run takes."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        session = Session.open(setting.job(), Path(folder) / "run", output=Path(folder) / "out")
        executor = _executor(setting.num_workers)
        try:
            started, processor = time.perf_counter(), time.process_time()
            session.quantize(executor, report_progress=False)
            seconds, processor = time.perf_counter() - started, time.process_time() - processor
            return Figures(processor + _workers_s(executor), seconds, _peak_memory(executor))
        finally:
            executor.stop()


def _executor(num_workers: int) -> Executor:
    if num_workers == 0:
        return LocalExecutor()
    from actors.executor import RayExecutor  # noqa: PLC0415 - only where Ray is measured

    return RayExecutor(num_workers)


def _workers_s(executor: Executor) -> float:
    """Processor seconds of the workers' own processes, their start included."""
    if isinstance(executor, LocalExecutor):
        return 0.0
    times = [psutil.Process(executor.place(n).pid).cpu_times() for n in executor.workers]
    return sum(spent.user + spent.system for spent in times)


def _peak_memory(executor: Executor) -> float:
    if isinstance(executor, LocalExecutor):
        return peak_memory_bytes()
    refs = [ref for n in executor.workers for ref in executor.submit(n, "peak_memory_bytes")]
    return max(executor.fetch(refs))


def quiet() -> None:
    """Keep the libraries' remarks off the terminal."""
    torch.set_num_threads(psutil.cpu_count())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
