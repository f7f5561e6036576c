"""One block measured on this machine: how much the table's rates are off, phase by phase.

As many workers as a run would have carry a few shards of random tokens through the first block and
quantize it, by the code that a run uses. On a CPU, processor seconds are counted, so that other
programs on the machine do not matter.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import CalibrationShard, cut_shards
from onecomp.errors import InputError
from onecomp.export.save import CheckpointWriter, has_format
from onecomp.job import find_layers
from onecomp.jobs import prepare_group
from onecomp.models.layout import InputGroup
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.planning.amounts import Amount
from onecomp.planning.costs import PHASES, Unit, UnitCosts, WorkByPhase, added
from onecomp.qep.correction import corrected_weight
from onecomp.quantizer import Quantizer
from onecomp.quantizer.grid import fit_grid
from onecomp.statistics import GroupStatistics, total
from onecomp.store import RunDirectory
from onecomp.worker import Worker, WorkerSettings

SHARDS_EACH = 2
"""Shards that each worker of a probe carries."""
FEW_ROWS = 0.0
"""Every worker makes its own sums."""
LONGEST_S = 900.0
"""Seconds that a probe may be expected to take."""
LEAST_SHARE = 0.05
"""A phase found by subtraction takes at least this part of what it was taken from."""


@dataclass
class Stopwatch:
    """Adds up seconds by name: of this thread's processor, or of the clock where a GPU works."""

    is_gpu: bool
    seconds: dict[str, Amount] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what the body takes."""
        started = self._now()
        yield
        self.seconds[name] += self._now() - started

    def _now(self) -> Amount:
        if self.is_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()


@dataclass(frozen=True)
class Measured:
    """What a probe found."""

    corrections: Mapping[str, Amount]
    """Seconds measured for each second expected, by phase."""
    seconds: Mapping[str, Amount]
    """Measured by phase, mean of the workers."""
    work: WorkByPhase
    """What each worker did in them."""

    def rate(self, phase: str) -> Amount:
        """Operations per second of a phase, or bytes where it does no arithmetic."""
        work = self.work[phase]
        amount = work.operations or work.memory_bytes + work.read_bytes + work.written_bytes
        return amount / self.seconds[phase]


def probe(
    costs: UnitCosts, source: ModelSource, quantizer: Quantizer, num_workers: int
) -> Measured:
    """Measure one block with as many workers as a run would have, on threads of this process.

    Args:
        costs: Model, method, text and the rates that are to be corrected.
        source: The model, with weights.
        quantizer: The method.
        num_workers: Workers that compute at the same time.
    """
    work = _expected_work(costs)
    num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="onecomp-probe-") as folder:
        settings = _settings(costs, source, quantizer)
        try:
            workers = [Worker(n, settings(Path(folder, str(n)))) for n in range(num_workers)]
            with ThreadPoolExecutor(num_workers, "probe", torch.set_num_threads, (1,)) as threads:
                found = list(threads.map(lambda worker: _measure(worker, costs), workers))
        finally:
            torch.set_num_threads(num_threads)
    seconds = {phase: sum(part[phase] for part in found) / num_workers for phase in found[0]}
    corrections = {
        phase: seconds[phase] / expected
        for phase in seconds.keys() & work.keys()
        if (expected := costs.hardware.expected_s(work[phase], costs.model.dtype_bytes))
    }
    return Measured(corrections, seconds, {phase: work[phase] for phase in corrections})


def _tokens(costs: UnitCosts) -> int:
    return 0 if costs.text is None else _num_shards(costs) * costs.text.shard_tokens


def _num_shards(costs: UnitCosts) -> int:
    return min(SHARDS_EACH, costs.text.num_shards)


def _expected_work(costs: UnitCosts) -> WorkByPhase:
    """What each worker of a probe does."""
    kind = next(kind for kind in costs.model.kinds if kind.groups)
    unit = Unit(kind, tokens=_tokens(costs))
    parts = [costs.work("store", unit)]
    if costs.text is not None:
        methods = ("begin_block", "observe", "finish_block")
        parts += [costs.work(method, unit) for method in methods]
    for group in kind.groups:
        parts.append(costs.work("quantize", Unit(kind, group, unit.tokens, num_parts=2)))
        parts.append(costs.work("apply", Unit(kind, group)))
    return added(parts)


def require_short(costs: UnitCosts, directory: Path) -> None:
    """Check that a probe takes minutes, not hours.

    Args:
        costs: As for ``probe``.
        directory: The model's, for the message.

    Raises:
        InputError: It would take too long on this machine.
    """
    seconds = costs.seconds_of(_expected_work(costs))
    if seconds > LONGEST_S:
        raise InputError(
            directory,
            f"a probe of one block would take about {seconds / 60:.0f} minutes on this machine. "
            "Plan without --probe, give a smaller --max-length, or probe where the run will be.",
        )


def _settings(
    costs: UnitCosts, source: ModelSource, quantizer: Quantizer
) -> Callable[[Path], WorkerSettings]:
    """Settings of a worker by its run directory: all write the same block, each to its own."""
    dtype = getattr(torch, costs.model.dtype)
    layout = find_layers(quantizer, Skeleton.build(source, dtype))
    first = next(block.index for block in layout.blocks if block.groups)

    def settings(folder: Path) -> WorkerSettings:
        run = RunDirectory(folder)
        run.begin({}, None)
        writer = CheckpointWriter(run.checkpoint, quantizer, not has_format(quantizer))
        return WorkerSettings(
            source=source,
            dtype=dtype,
            device="auto",
            layout=replace(layout, blocks=layout.blocks[: first + 2]),  # the next is read ahead
            quantizer=quantizer,
            qep=costs.qep,
            num_shards=1 if costs.text is None else _num_shards(costs),
            run=run,
            writer=writer if costs.has_checkpoint else None,
        )

    return settings


def _measure(worker: Worker, costs: UnitCosts) -> dict[str, Amount]:
    """Carry one worker through the first block with groups; seconds by phase."""
    watch = Stopwatch(costs.hardware.is_gpu)
    block = next(block for block in worker.settings.layout.blocks if block.groups)
    if costs.text is not None:
        worker.hold(*_shards(costs, worker.number))
        for index in range(block.index):
            worker.replay_block(index)
        with watch.time("read"):
            worker.begin_block(block.index)
    results, receipts = [], []
    for group, contributions in _observed(worker, block.groups, watch):
        with watch.time("quantize"):
            found, receipt = worker.quantize(group, *contributions)
        _measure_parts(worker, group, contributions, costs, watch)
        if costs.text is not None:
            with watch.time("merge"):
                worker.apply([group.index], found)
        results.append(found)
        receipts.append(receipt)
    if costs.text is not None:
        with watch.time("observe"):
            worker.finish_block()
    with watch.time("write"):
        worker.store(block.index, len(results), *results, *receipts)
    return _by_phase(watch.seconds)


def _observed(
    worker: Worker, groups: Sequence[InputGroup], watch: Stopwatch
) -> Iterator[tuple[InputGroup, list]]:
    """Each group with the contributions of this worker, in the order of a run."""
    if not worker.settings.quantizer.flag_calibration:
        yield from ((group, []) for group in groups)
    elif worker.settings.qep is not None:
        for group in groups:
            with watch.time("observe"):
                contributions = worker.observe_group(group.index, FEW_ROWS)
            yield group, [contributions]
    else:
        with watch.time("observe"):
            contributions = worker.observe(
                [group.index for group in groups], [FEW_ROWS] * len(groups)
            )
        yield from ((group, [part]) for group, part in zip(groups, contributions, strict=True))


def _measure_parts(
    worker: Worker, group: InputGroup, contributions: list, costs: UnitCosts, watch: Stopwatch
) -> None:
    """Once more, what the observation and the quantization of a group consist of."""
    pieces = [torch.cat([*worker.rows(piece).values()]) for piece in worker.pieces(group)]
    with watch.time("search"):
        for rows in pieces:
            _search(rows, costs)
    if not costs.method.has_hessian:
        return
    settings, names = worker.settings, list(group.layer_names)
    with watch.time("merge"):
        statistics = total(contributions[0], settings.num_shards)
    with watch.time("factor"):
        prepared = prepare_group(
            settings.quantizer, statistics, settings.qep, names, group.in_features,
            device=worker.device,
        )  # fmt: skip
    if prepared.delta is not None:
        factor = prepared.factors.in_any_order(settings.qep.percdamp)
        with watch.time("correct"):
            for rows in pieces:
                corrected_weight(rows, prepared.delta, factor, settings.qep.perccorr)
    _measure_sums(worker, group, costs, watch)


def _measure_sums(worker: Worker, group: InputGroup, costs: UnitCosts, watch: Stopwatch) -> None:
    """Sums over random rows, as many at a time as in a run."""
    num_rows = costs.text.micro_batch_tokens
    rows = torch.randn(num_rows, group.in_features).to(worker.device, worker.settings.dtype)
    original = rows + 1 if costs.is_corrected(group) else None
    for _ in range(_tokens(costs) // num_rows):
        with watch.time("sums"):
            GroupStatistics.of(rows, original)


def _search(rows: torch.Tensor, costs: UnitCosts) -> None:
    method, columns = costs.method, rows.shape[1]
    size = columns if method.groupsize == -1 else method.groupsize
    fit_grid(
        rows.T.reshape(-1, size, len(rows)),
        wbits=method.wbits,
        sym=method.sym,
        search=method.search,
        importance=torch.ones(columns // size, size, device=rows.device)
        if method.is_weighted
        else None,
    )


def _by_phase(seconds: Mapping[str, Amount]) -> dict[str, Amount]:
    """Seconds of the calls taken apart by what was measured on its own."""
    parts = {name: seconds[name] for name in PHASES if name in seconds}
    solved = sum(seconds.get(name, 0.0) for name in ("factor", "correct", "search"))
    parts["solve"] = max(seconds["quantize"] - solved, LEAST_SHARE * seconds["quantize"])
    if "observe" in seconds:
        observed = seconds["observe"]
        parts["forward"] = max(observed - parts.get("sums", 0.0), LEAST_SHARE * observed)
    return parts


def _shards(costs: UnitCosts, number: int) -> list[CalibrationShard]:
    """Random tokens, cut as a run would cut its own."""
    text, count = costs.text, _num_shards(costs)
    generator = torch.Generator().manual_seed(number)
    shape = (count * text.shard_tokens // text.length, text.length)
    vocabulary = costs.model.num_embedding_weights // costs.model.hidden_size
    ids = torch.randint(vocabulary, shape, generator=generator)
    return cut_shards(CalibrationSamples(ids, torch.ones_like(ids)), count)
