"""The driver of block-wise training: which blocks, which steps, and what is kept."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from onecomp.errors import OneCompError, WorkerError
from onecomp.executor import Executor, Ref
from onecomp.post_process.blockwise.span import Rates
from onecomp.post_process.blockwise.student_blocks import Patches, Verdict
from onecomp.post_process.blockwise.tuner import (
    BlockTuner,
    SampleShard,
    TunerSettings,
    sample_positions,
)
from onecomp.post_process.training import MOST_SKIPPED_STEPS, warmup_then_cosine

logger = logging.getLogger(__name__)

EVALUATIONS = 4
"""Evaluations of a span on held-out samples, that of its beginning not counted."""
WARMUP_RATIO = 0.2
"""Share of a span's steps in which the learning rate rises: Adam's first steps go by the signs of
single gradients, and close calls among codes and signs would all be taken at once."""
MIN_LR_RATIO = 0.05
"""Where the cosine ends, as a share of the peak."""
MOST_RESTARTS = 5
"""Times that all workers are made again after one was lost without a span finished in between."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One way through the blocks."""

    number: int
    span: int
    """Blocks that are trained together."""
    starts: range
    """First blocks of the spans."""
    epochs: int
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class SpanReport:
    """What became of a span."""

    phase: int
    first: int
    before: float
    """Held-out loss: squared error relative to the target's size, with the last block divergence
    from the original model's answers in nats per token."""
    after: float
    changed: int
    """Codes or signs that changed."""
    decisions: int
    """Codes or signs that were trained."""
    skipped: int
    """Steps whose gradient was not finite."""
    gave_up: bool
    """Whether training ended early, as too many of them came in a row."""
    seconds: float

    def __str__(self) -> str:
        flips = f"  changed {self.changed / self.decisions:.2%}" if self.decisions else ""
        return f"block {self.first:>3}  loss {self.before:.4e} -> {self.after:.4e}{flips}"


@dataclass
class Tuning:
    """Trains the blocks of a checkpoint over the workers of an executor.

    Args:
        executor: Where the workers are.
        settings: What they are made of.
        shards: Samples; one of each shard in every step.
        phases: Ways through the blocks, in order.
        trainable: Numbers of the blocks with quantized layers.
        num_blocks: Blocks of the model.
        seed: Of the order of samples.
    """

    executor: Executor
    settings: TunerSettings
    shards: Sequence[SampleShard]
    phases: Sequence[Phase]
    trainable: Sequence[int]
    num_blocks: int
    seed: int = 0
    reports: list[SpanReport] = field(default_factory=list)
    """Of all finished spans, those of an earlier call included."""
    undone: set[int] = field(default_factory=set)
    """Phases after which the model was no better."""

    @property
    def patches(self) -> Patches:
        """Where what was learned is."""
        return self.settings.patches

    def run(self) -> tuple[float, float]:
        """Train, and judge the whole model.

        A phase after which the model is no better is undone. Spans that are finished already are
        not trained again. After the loss of a worker all
        are made again and go on with the first span that is not finished.

        Returns:
            Mean divergence from the original on held-out samples, before and after, in nats a
            token.

        Raises:
            WorkerError: Workers were lost again and again at the same span.
        """
        failures, finished = 0, 0
        while True:
            try:
                return self._attempt()
            except WorkerError as error:
                done = len(self.reports)
                failures = 1 if done > finished else failures + 1
                finished = done
                if failures > MOST_RESTARTS or not self.executor.survives_losses:
                    raise
                logger.warning("%s; all workers begin again at the first unfinished span", error)

    def _attempt(self) -> tuple[float, float]:
        self.reports = [SpanReport(**notes) for notes in self.patches.notes()]
        self.undone = set()
        before = best = math.inf
        for phase in [p for p in self.phases if self._spans(p)] or self.phases[:1]:
            verdict = self.patches.verdict(phase.number) or self._carry_out(phase, best)
            before, best = verdict.before, min(best, verdict.before)
            if verdict.is_kept:
                best = verdict.after
            else:
                self.patches.take_back(phase.number)
                self.undone.add(phase.number)
        return before, best

    def _carry_out(self, phase: Phase, best: float) -> Verdict:
        """Train a phase, and judge the model behind it; ``best``: how it was judged so far."""
        self._walk(phase)
        before, after = self._judge_model()
        verdict = Verdict(before=before, after=after, is_kept=after < min(best, before))
        self.patches.judge(phase.number, verdict)
        fate = "kept" if verdict.is_kept else "undone"
        logger.info("phase %d: divergence %.4f nats a token; %s", phase.number, after, fate)
        return verdict

    def _walk(self, phase: Phase) -> None:
        spans = self._spans(phase)
        self._start()
        for index in range(self.num_blocks):
            if index in spans and not self.patches.has(phase.number, index):
                self._tune(phase, index)
            else:
                self._all("pass_by", index)

    def _spans(self, phase: Phase) -> list[int]:
        """First blocks of the spans in which anything can be trained."""
        return [
            first
            for first in phase.starts
            if any(index in self.trainable for index in range(first, first + phase.span))
        ]

    def _start(self) -> None:
        self.executor.start(BlockTuner, self.settings)
        workers = self.executor.workers
        calls = []
        for place, worker in enumerate(workers):
            mine = self.shards[place :: len(workers)]
            if mine:
                calls += self.executor.submit(worker, "hold", *mine)
        self.executor.fetch(calls)

    @property
    def _busy(self) -> list[int]:
        """Workers that hold shards."""
        return self.executor.workers[: len(self.shards)]

    def _all(self, method: str, *arguments: object) -> list:
        refs = [self.executor.submit(worker, method, *arguments)[0] for worker in self._busy]
        return self.executor.fetch(refs)

    def _tune(self, phase: Phase, first: int) -> None:
        started = time.monotonic()
        self._all("open_span", first, phase.span, phase.rates)
        owner = self._busy[0]
        [vector] = self.executor.submit(owner, "parameters")
        before = self._judge(vector)
        best, kept, gave_up = self._train(phase, owner, vector, before)
        tally = self.executor.submit(owner, "tally", kept)
        [(changed, decisions, skipped)] = self.executor.fetch(tally)
        report = SpanReport(
            phase=phase.number, first=first, before=before, after=best,
            changed=changed, decisions=decisions, skipped=skipped, gave_up=gave_up,
            seconds=round(time.monotonic() - started, 1),
        )  # fmt: skip
        self.patches.note(phase.number, first, asdict(report))
        self._close(kept, phase.number)
        self.reports.append(report)
        logger.info("%s", report)
        if skipped:
            ends = "; training it ended early, with the best state before" if gave_up else ""
            logger.warning("block %d: %d steps skipped: not finite%s", first, skipped, ends)

    def _train(
        self, phase: Phase, owner: int, vector: Ref, before: float
    ) -> tuple[float, Ref, bool]:
        """Lowest held-out loss, the parameters that have it, whether training was given up."""
        best, kept = before, vector
        schedule = warmup_then_cosine(WARMUP_RATIO, MIN_LR_RATIO)
        interval = max(1, phase.epochs // EVALUATIONS)
        steps = [sample_positions(self.shards, self.seed, epoch) for epoch in range(phase.epochs)]
        num_steps, number = sum(map(len, steps)), 0
        for epoch, positions in enumerate(steps, start=1):
            for position in positions:
                vector = self._step(owner, position, vector, schedule(number, num_steps))
                number += 1
            if epoch % interval == 0 or epoch == phase.epochs:
                loss = self._judge(vector)
                if loss < best:
                    best, kept = loss, vector
                [in_a_row] = self.executor.fetch(self.executor.submit(owner, "skipped_in_a_row"))
                if in_a_row >= MOST_SKIPPED_STEPS:
                    return best, kept, True
        return best, kept, False

    def _step(self, owner: int, position: dict[int, int], vector: Ref, lr_factor: float) -> Ref:
        gradients = [
            self.executor.submit(worker, "gradients", position, vector)[0] for worker in self._busy
        ]
        [updated] = self.executor.submit(owner, "update", lr_factor, *gradients)
        return updated

    def _judge(self, vector: Ref) -> float:
        found = self._all("judge", vector)
        by_shard = {shard: losses for part in found for shard, losses in part.items()}
        losses = [loss for shard in sorted(by_shard) for loss in by_shard[shard]]
        return math.fsum(losses) / len(losses)

    def _close(self, vector: Ref, phase: int) -> None:
        refs = [
            self.executor.call(worker, "close_span", vector, phase, place == 0).values[0]
            for place, worker in enumerate(self._busy)
        ]
        self.executor.fetch(refs)

    def _judge_model(self) -> tuple[float, float]:
        found = self._all("divergences")
        by_shard = {shard: pairs for part in found for shard, pairs in part.items()}
        pairs = [pair for shard in sorted(by_shard) for pair in by_shard[shard]]
        before, after = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
        if not math.isfinite(before):
            raise OneCompError(f"the divergence of the quantized model is {before} before training")
        return before, after
