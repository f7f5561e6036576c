"""One worker of block-wise training: its samples on their way through the blocks, its gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from onecomp.models.calls import (
    BlockCall,
    CallInterner,
    logits_behind,
    record_calls,
)
from onecomp.models.layout import blocks_return_tuples
from onecomp.models.skeleton import Skeleton, fill_outside
from onecomp.models.source import ModelSource
from onecomp.post_process.blockwise.goals import Answers, Goal, HiddenStates
from onecomp.post_process.blockwise.span import Rates, Span
from onecomp.post_process.blockwise.student_blocks import (
    Patches,
    QuantizedBlocks,
    packed_tensors,
)
from onecomp.post_process.distillation import TopTokens, WholeDistribution
from onecomp.post_process.teacher import KEPT_TOKENS
from onecomp.resources import device_here

TEACHER, STUDENT = "teacher", "student"
"""Whose hidden states the original blocks see when they say what a block should give."""


@dataclass(frozen=True, kw_only=True)
class TunerSettings:
    """What every worker is made of."""

    source: ModelSource
    """The original model."""
    dtype: torch.dtype
    device: str
    checkpoint: Path
    """The quantized model."""
    patches: Patches
    targets: str
    grad_clip: float
    uses_bf16: bool


@dataclass(frozen=True)
class SampleShard:
    """Samples of one place in every step."""

    index: int
    train: Int[Tensor, "samples length"]
    held_out: Int[Tensor, "judges length"]


@dataclass
class _Sample:
    """One sample in front of a block."""

    input_ids: Tensor
    calls: list[BlockCall]
    teacher: Tensor
    """Hidden states of the original model."""
    student: Tensor
    """Of the model as far as it is trained."""
    untrained: Tensor | None
    """Of the quantized model as it came; for held-out samples."""
    goal: Goal | None = None
    """What the span should give."""


@dataclass
class _Held:
    """A shard in the hands of its worker."""

    train: list[_Sample] = field(default_factory=list)
    held_out: list[_Sample] = field(default_factory=list)


class BlockTuner:
    """Holds shards and the span that is trained; one of them, the owner, also has its optimizer.

    Args:
        number: The worker's number.
        settings: Those of the process.
    """

    def __init__(self, number: int, settings: TunerSettings):
        del number
        torch.set_num_threads(1)  # equal bits on any number of workers
        self.settings, self.device = settings, device_here(settings.device)
        # Made here, one worker after the other: building modules changes torch for all threads.
        self.skeleton = Skeleton.build(settings.source, settings.dtype)
        self.outside = Skeleton.build(settings.source, settings.dtype)
        self.returns_tuple = blocks_return_tuples(self.skeleton)
        fill_outside(self.outside, self.device)
        self.student = QuantizedBlocks(settings.checkpoint, self.skeleton, settings.patches)
        self._num_blocks = len(self.skeleton.blocks)
        self._shards: dict[int, _Held] = {}
        self._span: Span | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._start: Tensor | None = None
        self._skipped = self._in_a_row = 0

    # Samples

    def hold(self, *shards: SampleShard) -> None:
        """Take shards and run them through everything in front of the blocks."""
        interner = CallInterner(keep=torch.clone)
        for shard in shards:
            held = _Held(
                [self._embed(interner, ids, judges=False) for ids in shard.train],
                [self._embed(interner, ids, judges=True) for ids in shard.held_out],
            )
            self._shards[shard.index] = held

    def _embed(self, interner: CallInterner, ids: Tensor, *, judges: bool) -> _Sample:
        ids = ids[None].to(self.device)
        hidden, calls = record_calls(self.outside, ids, None, returns_tuple=self.returns_tuple)
        calls = [interner.intern(call) for call in calls]
        hidden = hidden.clone().cpu()
        return _Sample(ids.cpu(), calls, hidden, hidden, hidden if judges else None)

    def _samples(self) -> list[_Sample]:
        return [s for held in self._shards.values() for s in (*held.train, *held.held_out)]

    # Going through the blocks

    def pass_by(self, index: int) -> None:
        """Carry all streams through a block that is not trained now, or was before."""
        student = self.student.load(index, self.device)
        original = self.skeleton.load_block(index, self.device)
        untrained = self._untrained_block(index)
        self._advance(index, student, original, untrained)

    def _untrained_block(self, index: int) -> nn.Module:
        nothing = Patches(self.settings.patches.directory / "none")
        return QuantizedBlocks(self.settings.checkpoint, self.skeleton, nothing).load(
            index, self.device
        )

    @torch.no_grad()
    def _advance(
        self, index: int, student: nn.Module, original: nn.Module, untrained: nn.Module
    ) -> None:
        for sample in self._samples():
            call = sample.calls[index]
            sample.teacher = self._through(call, original, sample.teacher)
            sample.student = self._through(call, student, sample.student)
            if sample.untrained is not None:
                sample.untrained = self._through(call, untrained, sample.untrained)

    def _through(self, call: BlockCall, block: nn.Module, hidden: Tensor) -> Tensor:
        return call.run(block, hidden.to(self.device)).cpu()

    # A span

    @torch.no_grad()
    def open_span(self, first: int, count: int, rates: Rates) -> None:
        """Make blocks trainable, and ask the original ones what they should give."""
        indices = range(first, first + count)
        originals = [self.skeleton.load_block(i, self.device) for i in indices]
        students = [self.student.load(i, self.device) for i in indices]
        is_last = indices.stop == self._num_blocks
        follows_teacher = is_last or self.settings.targets == TEACHER
        for sample in self._samples():
            hidden = sample.teacher if follows_teacher else sample.student
            for index, original in zip(indices, originals, strict=True):
                hidden = self._through(sample.calls[index], original, hidden)
            sample.goal = self._goal(sample, hidden, is_last=is_last)
        self._first, self._count, self._originals = first, count, originals
        self._span = Span(students, originals, rates, uses_bf16=self.settings.uses_bf16)
        self._optimizer, self._start, self._skipped, self._in_a_row = None, None, 0, 0

    def _goal(self, sample: _Sample, target: Tensor, *, is_last: bool) -> Goal:
        """Hidden states of the original model; behind the last block what it makes of them."""
        if not is_last:
            return HiddenStates(target)
        logits = partial(self._logits, sample)
        return Answers(
            TopTokens.of(logits(target), KEPT_TOKENS, 1.0).to(torch.device("cpu")), logits
        )

    def _logits(self, sample: _Sample, hidden: Tensor) -> Tensor:
        ids, hidden = sample.input_ids.to(self.device), hidden.to(self.device)
        return logits_behind(self.outside, hidden, ids, None, returns_tuple=self.returns_tuple)

    def parameters(self) -> Float[Tensor, "numbers"]:
        """The span's parameters; whoever is asked becomes its owner."""
        groups = [{"params": [slot.parameter], "lr": slot.lr} for slot in self._span.slots]
        self._optimizer = torch.optim.Adam(groups)
        self._rates = [slot.lr for slot in self._span.slots]
        self._start = self._span.decisions()
        return self._span.vector()

    def gradients(
        self, position: Mapping[int, int], vector: Float[Tensor, "numbers"]
    ) -> dict[int, tuple[Tensor, float]]:
        """Gradient and loss of one sample of each shard.

        Args:
            position: By shard that has a sample in this step, which one.
            vector: Parameters to compute with.
        """
        self._span.load(vector)
        with self._span.held_weights():
            return {
                shard: self._span.gradient(*self._inputs(held.train[position[shard]]))
                for shard, held in self._shards.items()
                if shard in position
            }

    def _inputs(self, sample: _Sample) -> tuple[list[BlockCall], Tensor, Goal]:
        calls = sample.calls[self._first : self._first + self._count]
        assert sample.goal is not None
        return calls, sample.student.to(self.device), sample.goal

    def update(
        self, lr_factor: float, *found: Mapping[int, tuple[Tensor, float]]
    ) -> Float[Tensor, "numbers"]:
        """One step with the mean gradient; the order of the sum is that of the shards.

        A step whose gradient is not finite is skipped and counted.
        """
        by_shard = {shard: part for parts in found for shard, part in parts.items()}
        gradients = [by_shard[shard][0] for shard in sorted(by_shard)]
        total = gradients[0].clone()
        for gradient in gradients[1:]:
            total += gradient.to(total.device)
        mean = total / len(gradients)
        norm = mean.norm()
        if not bool(norm.isfinite()):
            self._skipped += 1
            self._in_a_row += 1
            return self._span.vector()
        self._in_a_row = 0
        mean *= min(1.0, self.settings.grad_clip / max(float(norm), 1e-12))
        sizes = [p.numel() for p in self._span.parameters]
        for slot, gradient in zip(self._span.slots, mean.split(sizes), strict=True):
            slot.parameter.grad = gradient.view_as(slot.parameter).to(self.device)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        self._optimizer.step()
        return self._span.vector()

    @torch.no_grad()
    def judge(self, vector: Float[Tensor, "numbers"]) -> dict[int, list[float]]:
        """Losses of the held-out samples of every shard."""
        self._span.load(vector)
        with self._span.held_weights():
            return {
                shard: [float(self._span.loss(*self._inputs(sample))) for sample in held.held_out]
                for shard, held in self._shards.items()
            }

    def skipped_in_a_row(self) -> int:
        """Steps skipped since the last that was made."""
        return self._in_a_row

    def tally(self, vector: Float[Tensor, "numbers"]) -> tuple[int, int, int]:
        """Decisions that changed since the beginning, all decisions, steps skipped."""
        self._span.load(vector)
        now = self._span.decisions()
        return int((now != self._start).sum()), now.numel(), self._skipped

    @torch.no_grad()
    def close_span(self, vector: Float[Tensor, "numbers"], phase: int, writes: bool) -> None:
        """Take over the parameters, write the span, carry all streams through its first block."""
        self._span.load(vector)
        self._span.close()
        if writes:
            tensors = {}
            for offset, block in enumerate(self._span.blocks):
                prefix = self.skeleton.block_name(self._first + offset)
                tensors |= packed_tensors(block, prefix)
            self.settings.patches.write(phase, self._first, tensors)
        untrained = self._untrained_block(self._first)
        self._advance(self._first, self._span.blocks[0], self._originals[0], untrained)
        self._span = self._optimizer = None
        self._originals = []
        for sample in self._samples():
            sample.goal = None

    # The whole model

    @torch.no_grad()
    def divergences(self) -> dict[int, list[tuple[float, float]]]:
        """Of every shard's held-out samples, behind the last block: divergence from the teacher.

        Returns:
            In nats per token, of the model as it came and as it is now.
        """
        found: dict[int, list[tuple[float, float]]] = {}
        for shard, held in self._shards.items():
            found[shard] = []
            for sample in held.held_out:
                teacher = WholeDistribution(self._logits(sample, sample.teacher))
                both = [
                    float(teacher.divergence(self._logits(sample, hidden), 1.0).mean())
                    for hidden in (sample.untrained, sample.student)
                ]
                found[shard].append((both[0], both[1]))
        return found


def shards_of(
    train: Int[Tensor, "samples length"], held_out: Int[Tensor, "judges length"], count: int
) -> list[SampleShard]:
    """Cut samples into shards; sizes differ by one at most."""
    return [
        SampleShard(index, train[index::count].clone(), held_out[index::count].clone())
        for index in range(count)
    ]


def sample_positions(shards: Sequence[SampleShard], seed: int, epoch: int) -> list[dict[int, int]]:
    """For every step of an epoch, by shard, which of its samples is taken."""
    orders = {}
    for shard in shards:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch * 1009 + shard.index)
        orders[shard.index] = torch.randperm(len(shard.train), generator=generator).tolist()
    num_steps = max(len(order) for order in orders.values())
    return [
        {index: order[step] for index, order in orders.items() if step < len(order)}
        for step in range(num_steps)
    ]
