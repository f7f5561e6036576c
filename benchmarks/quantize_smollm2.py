"""Speed, memory and accuracy of the main job on SmolLM2-135M; prints Markdown tables.

    python benchmarks/quantize_smollm2.py MODEL TEXT [--only speed|memory|accuracy] [--match "W4*"]

MODEL is the directory that ``deploy/fetch_smollm2.py`` wrote. TEXT is one text file: its start
calibrates (32 x 512 tokens), its second half is what perplexity is measured on.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onecomp import GPTQ, CalibrationConfig, Executor, LocalExecutor, ModelConfig, QEPConfig
from onecomp.evaluation.perplexity import perplexity_of_tokens
from onecomp.job import QuantizationJob
from onecomp.models import InputGroup, ModelLayout
from onecomp.session import Session
from onecomp.worker import peak_memory_bytes

SAMPLES, LENGTH = 32, 512
ALL = {"mse": True, "actorder": True, "static_groups": True, "weighted_mse": True}


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    label: str
    quantizer: GPTQ
    qep: QEPConfig | None = None


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", choices=("speed", "memory", "accuracy"))
    parser.add_argument("--windows", type=int, default=24, help="512-token windows to evaluate on")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each speed setting")
    parser.add_argument("--on", choices=("process", "ray"), help="measure speed on one executor")
    parser.add_argument("--match", default="*", help="settings to run, a glob pattern")
    parser.add_argument(
        "--full", action="store_true", help="every accuracy setting, not the ten main ones"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.model, arguments.text, Path(folder), arguments.windows)
        if arguments.only in (None, "speed"):
            print_speed(bench, arguments)
        if arguments.only in (None, "memory"):
            print_memory(Path(folder))
        if arguments.only in (None, "accuracy"):
            settings = accuracy_settings(full=arguments.full)
            print_accuracy(bench, matching(settings, arguments.match))


def matching(settings: list[Setting], pattern: str) -> list[Setting]:
    """Settings whose label fits a glob pattern."""
    return [setting for setting in settings if fnmatchcase(setting.label, pattern)]


class Bench:
    """The model, the calibration text and the evaluation tokens."""

    def __init__(self, model: str, text: Path, folder: Path, windows: int):
        self.model, self.folder = model, folder
        self.config = ModelConfig(model, dtype="float32")
        content = text.read_text(encoding="utf-8")
        self.calibration = folder / "calibration.txt"
        self.calibration.write_text(content[: len(content) // 2], encoding="utf-8")
        tokens = self.config.load_tokenizer()(
            content[len(content) // 2 :], return_tensors="pt", verbose=False
        ).input_ids[0]
        self.evaluation = tokens[: windows * LENGTH]
        self._count = 0

    def session(self, setting: Setting) -> Session:
        """A fresh run of one setting."""
        self._count += 1
        calibration = CalibrationConfig(
            str(self.calibration), LENGTH, SAMPLES, strategy="concat_chunk", max_documents=10**6
        )
        job = QuantizationJob(self.config, setting.quantizer, calibration, setting.qep)
        return Session.open(job, self.folder / f"run{self._count}")

    def perplexity(self, model: PreTrainedModel) -> float:
        """Perplexity on the evaluation tokens, 512-token windows."""
        return perplexity_of_tokens(
            model, self.evaluation, max_length=LENGTH, stride=LENGTH
        ).perplexity


# Speed


def matmul_rate() -> float:
    """Measured float32 matmul operations per second with one thread a core, median of fifteen."""
    num_threads = torch.get_num_threads()  # one while an executor works in this process
    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rates = []
    for _ in range(15):
        started = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - started))
    torch.set_num_threads(num_threads)
    return statistics.median(rates)


def operations(layout: ModelLayout, qep: QEPConfig | None) -> float:
    """Multiplications and additions that the run cannot do without, each counted once."""
    tokens = SAMPLES * LENGTH
    total = 0.0
    for group in layout.groups:
        size, rows = group.in_features, sum(group.out_features)
        corrected = qep is not None and any(map(qep.corrects, group.layer_names))
        total += 2 * tokens * group.num_weights * (1 if qep is None else 2)
        total += tokens * size**2 + (2 * tokens * size**2 if corrected else 0)
        total += 2 / 3 * size**3 + rows * size**2 + (6 * rows * size**2 if corrected else 0)
    attention = sum(2 * tokens * LENGTH * _hidden(block.groups) for block in layout.blocks)
    return total + attention * (1 if qep is None else 2)


def _hidden(groups: tuple[InputGroup, ...]) -> int:
    return groups[0].in_features


def recomputed_operations(layout: ModelLayout, qep: QEPConfig) -> float:
    """The same when both streams run the whole block once per group and once to go on."""
    once = operations(layout, qep)
    forward = 2 * sum(2 * SAMPLES * LENGTH * group.num_weights for group in layout.groups)
    return once + forward * (len(layout.blocks[0].groups) + 1) - forward


def print_speed(bench: Bench, arguments: argparse.Namespace) -> None:
    """Fractions of the measured matmul rate, in this process and on Ray."""
    plain = GPTQ(wbits=4, groupsize=64)
    propagating = Setting("error propagation", plain, QEPConfig())
    settings = [
        Setting("full-precision inputs", plain),
        Setting("full-precision inputs, mse", replace(plain, mse=True)),
        propagating,
    ]
    settings, repeat = matching(settings, arguments.match), arguments.repeat
    print("\n| executor | setting | seconds | CPU seconds | Gop | Gop/s | matmul Gop/s | share |")
    print("|---|---|---|---|---|---|---|---|")
    cores = os.cpu_count() or 1
    if arguments.on != "ray":
        local = LocalExecutor()
        _print_speed_rows(bench, settings, local, "this process", repeat)
        local.stop()
    if arguments.on != "process":
        with ray_executor(cores) as executor:
            _print_speed_rows(bench, settings, executor, f"Ray, {cores} workers", repeat)
    layout = bench.session(propagating).layout
    saved = recomputed_operations(layout, QEPConfig()) / operations(layout, QEPConfig())
    print(f"\nRunning the block again for every group would take {saved:.2f}x the operations.")


def _print_speed_rows(
    bench: Bench, settings: list[Setting], executor: Executor, name: str, repeat: int
) -> None:
    for setting in settings:
        rows = [_timed(bench, setting, executor) for _ in range(repeat)]
        seconds = statistics.median(row[0] for row in rows)
        processor = statistics.median(row[1] for row in rows)
        rate = statistics.median(row[2] for row in rows)
        ratio = statistics.median(row[3] / row[0] / row[2] for row in rows)
        work = rows[0][3]
        print(
            f"| {name} | {setting.label} | {seconds:.1f} | {processor:.1f} | {work / 1e9:.0f} "
            f"| {work / seconds / 1e9:.1f} | {rate / 1e9:.1f} | {ratio:.2f} |",
            flush=True,
        )


def _timed(bench: Bench, setting: Setting, executor: Executor) -> tuple[float, float, float, float]:
    """Wall seconds, processor seconds, matmul rate around the run, operations."""
    session = bench.session(setting)
    before = matmul_rate()
    started, processor = time.perf_counter(), time.process_time()
    session.quantize(executor, report_progress=False)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    rate = (before + matmul_rate()) / 2
    return seconds, processor, rate, operations(session.layout, setting.qep)


@contextmanager
def ray_executor(num_workers: int) -> Iterator[Executor]:
    """Workers whose processes have imported everything, so that their start is not measured."""
    from actors.executor import RayExecutor  # noqa: PLC0415 - only where Ray is measured

    executor = RayExecutor(num_workers)
    executor.start(_Import)
    executor.fetch([ref for n in range(num_workers) for ref in executor.submit(n, "done")])
    yield executor
    executor.stop()


class _Import:
    def __init__(self, number: int):
        self.number = number

    def done(self) -> int:
        """Answer when the process is up."""
        return self.number


# Memory


def print_memory(folder: Path) -> None:
    """Peak resident memory of driver and workers, 8 blocks against 32 of the same shape."""
    print("\n| blocks | model file (MiB) | driver peak (MiB) | largest worker peak (MiB) |")
    print("|---|---|---|---|")
    for num_blocks in (8, 32):
        model = folder / f"synthetic{num_blocks}"
        save_synthetic(model, num_blocks)
        size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20
        driver, worker = _in_child(_measure_memory, model, folder / f"memory{num_blocks}")
        print(f"| {num_blocks} | {size:.0f} | {driver:.0f} | {worker:.0f} |", flush=True)


def save_synthetic(directory: Path, num_blocks: int) -> None:
    """A random Llama whose blocks dominate its size, with the tokenizer of no language."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="200MB")


def _measure_memory(model: Path, run: Path) -> tuple[float, float]:
    from actors.executor import RayExecutor  # noqa: PLC0415 - in a process of its own
    from onecomp.calibration import CalibrationSamples  # noqa: PLC0415

    ids = torch.randint(3, 500, (8, 256), generator=torch.Generator().manual_seed(0))
    samples = CalibrationSamples(ids, torch.ones_like(ids))
    job = QuantizationJob(
        ModelConfig(str(model), dtype="float32"), GPTQ(groupsize=128), CalibrationConfig(), None
    )
    session = Session.open(job, run, output=run.with_name(run.name + "-out"), samples=samples)
    executor = RayExecutor(2)
    session.quantize(executor, report_progress=False)
    refs = [ref for n in range(2) for ref in executor.submit(n, "peak_memory_bytes")]
    worker = max(executor.fetch(refs)) / 2**20
    executor.stop()
    return peak_memory_bytes() / 2**20, worker


def _in_child(function: object, *arguments: object) -> tuple[float, float]:
    import multiprocessing  # noqa: PLC0415 - peak memory is that of a whole process

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# Accuracy


def accuracy_settings(*, full: bool) -> list[Setting]:
    """The table's rows: the documented arguments, and everything together."""
    rows = []
    for wbits, sym in ((4, True), (3, False), (3, True), (4, False)):
        plain = GPTQ(wbits=wbits, groupsize=64, sym=sym)
        kind = f"W{wbits} {'sym' if sym else 'asym'}"
        rows.append(Setting(f"{kind} plain", plain))
        if full:
            rows.append(Setting(f"{kind} mse", replace(plain, mse=True)))
            rows.append(Setting(f"{kind} actorder", replace(plain, actorder=True)))
        rows.append(Setting(f"{kind} QEP", plain, QEPConfig()))
        rows.append(Setting(f"{kind} all", replace(plain, **ALL), QEPConfig()))
    return rows


def print_accuracy(bench: Bench, settings: list[Setting]) -> None:
    """Perplexity relative to the original's."""
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    original = bench.perplexity(model)
    print(f"\noriginal perplexity {original:.3f} on {len(bench.evaluation)} tokens\n")
    print("| setting | perplexity | relative to original | mean output error |")
    print("|---|---|---|---|")
    for setting in settings:
        session = bench.session(setting)
        executor = LocalExecutor()
        session.quantize(executor, report_progress=False)
        executor.stop()
        for name, result in session.run.results().items():
            model.get_submodule(name).weight.data.copy_(result.dequantize())
        found = bench.perplexity(model)
        error = session.run.mean_output_error()
        print(f"| {setting.label} | {found:.3f} | x{found / original:.3f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
