"""How much the loss moves with each output of each layer, measured one calibration shard at a time.

A shard goes forward through the model once, its hidden states in front of every block kept in the
processor's memory, and back block by block from the last. No more than one block is held at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from onecomp.calibration.shards import CalibrationShard
from onecomp.export.checkpoint import write_shard
from onecomp.models.calls import BlockCall, CallInterner, logits_behind, record_calls
from onecomp.models.skeleton import Skeleton, fill_outside
from onecomp.storage import AnyPath
from onecomp.worker import WorkerSettings

SQUARES, ROWS = "squares", "rows"
"""What a shard's file holds of each layer: sums of squares by output, and the rows summed up."""


@dataclass
class _Sample:
    """One calibration sample on its way through the model and back."""

    input_ids: Tensor
    mask: Tensor | None
    calls: list[BlockCall]
    entries: list[Tensor] = field(default_factory=list)
    """Hidden states in front of each block so far; behind them, those behind the last."""
    gradient: Tensor | None = None
    """Of the loss, by the hidden states in front of the block that was gone through last."""


class GradientWorker:
    """Measures shards; each answer depends on the shard and the model alone.

    Args:
        number: The worker's number.
        settings: Those of the run. In float16 gradients would vanish, so float32 is used there.
    """

    def __init__(self, number: int, settings: WorkerSettings):
        settings.run.require_visible(f"worker {number}")
        torch.set_num_threads(1)
        self.settings, self.device = settings, settings.device_here()
        is_narrow = settings.dtype == torch.float16
        dtype = torch.float32 if is_narrow else settings.dtype
        self.skeleton = Skeleton.build(settings.source, dtype)
        self._targets = set(settings.layout.layer_names)
        fill_outside(self.skeleton, self.device)

    def measure(self, shard: CalibrationShard, directory: AnyPath) -> int:
        """Write the shard's sums to ``directory``, atomically.

        The loss is the sum of the next tokens' negative log-likelihoods, padding left out.

        Returns:
            Tokens of the shard.
        """
        pairs = zip(shard.input_ids.split(1), shard.attention_mask.split(1), strict=True)
        interner = CallInterner(keep=torch.clone)
        samples = [self._begin(ids, mask, interner) for ids, mask in pairs]
        squares: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        num_blocks = len(self.skeleton.blocks)
        for index in range(num_blocks):
            self._forward(index, samples)
        for sample in samples:
            self._loss(sample)
        for index in reversed(range(num_blocks)):
            self._backward(index, samples, squares, rows)
        tensors = {f"{name}|{SQUARES}": part for name, part in squares.items()}
        counts = {f"{name}|{ROWS}": torch.tensor([count]) for name, count in rows.items()}
        write_shard(directory, shard_file(shard.index), {**tensors, **counts})
        return int(shard.attention_mask.sum())

    def _begin(self, input_ids: Tensor, mask: Tensor, interner: CallInterner) -> _Sample:
        input_ids = input_ids.to(self.device)
        padded = None if bool(mask.all()) else mask.to(self.device)
        hidden, calls = record_calls(
            self.skeleton,
            input_ids,
            padded,
            returns_tuple=self.settings.layout.blocks_return_tuples,
        )
        calls = [interner.intern(call) for call in calls]
        return _Sample(input_ids, padded, calls, [hidden.clone().cpu()])

    def _forward(self, index: int, samples: Sequence[_Sample]) -> None:
        block = self.skeleton.load_block(index, self.device)
        with torch.no_grad():
            for sample in samples:
                entered = sample.entries[index].to(self.device)
                sample.entries.append(sample.calls[index].run(block, entered).cpu())

    def _loss(self, sample: _Sample) -> None:
        hidden = sample.entries.pop().to(self.device).requires_grad_()
        logits = logits_behind(
            self.skeleton, hidden, sample.input_ids, sample.mask,
            returns_tuple=self.settings.layout.blocks_return_tuples,
        )  # fmt: skip
        targets = sample.input_ids[:, 1:].clone()
        if sample.mask is not None:
            targets[(sample.mask[:, 1:] * sample.mask[:, :-1]) == 0] = -100
        loss = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        [sample.gradient] = torch.autograd.grad(loss, hidden)

    def _backward(
        self,
        index: int,
        samples: Sequence[_Sample],
        squares: dict[str, Tensor],
        rows: dict[str, int],
    ) -> None:
        block = self.skeleton.load_block(index, self.device)
        prefix = self.skeleton.block_name(index)
        layers = {
            name: module
            for short, module in block.named_modules()
            if (name := f"{prefix}.{short}") in self._targets
        }
        for sample in samples:
            entered = sample.entries.pop().to(self.device).requires_grad_()
            with torch.enable_grad(), _OutputGradients(layers, sample.mask) as found:
                left = sample.calls[index].run(block, entered)
                [sample.gradient] = torch.autograd.grad(left, entered, sample.gradient)
            for name, (of_sample, count) in found.sums.items():
                squares[name] = squares[name] + of_sample if name in squares else of_sample
                rows[name] = rows.get(name, 0) + count


class _OutputGradients:
    """Sums of squared gradients by the outputs of layers, while the context is open.

    Args:
        layers: By name.
        mask: 0 where a token of the sample is padding.
    """

    def __init__(self, layers: Mapping[str, nn.Module], mask: Tensor | None):
        self._layers, self._mask = layers, mask
        self._handles: list = []
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> "_OutputGradients":
        for name, layer in self._layers.items():
            hook = layer.register_forward_hook(
                lambda _layer, _args, output, name=name: self._watch(name, output)
            )
            self._handles.append(hook)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(name, gradient))

    def _add(self, name: str, gradient: Tensor) -> None:
        if self._mask is not None and gradient.shape[:-1] == self._mask.shape:
            gradient = gradient[self._mask.bool()]
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        squares, count = self.sums.get(name, (0, 0))
        self.sums[name] = squares + rows.square().sum(dim=0), count + len(rows)


def shard_file(index: int) -> str:
    """Name of the file with a shard's sums."""
    return f"{index:05d}.safetensors"
