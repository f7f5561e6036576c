"""Blocks of a quantized checkpoint one by one, with what was learned since in files beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from onecomp.export.checkpoint import CONFIG, write_json, write_shard
from onecomp.export.load import load_layer, read_json
from onecomp.export.quant_config import LayerFormat, quantized_layers
from onecomp.models.skeleton import Skeleton, fill
from onecomp.models.source import ModelSource
from onecomp.quantizer.quant_linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the whole model was judged behind a phase: divergence from the original, nats a token."""

    before: float
    """Of the model as it came."""
    after: float
    is_kept: bool
    """Whether what the phase learned stays."""


@dataclass(frozen=True)
class Patches:
    """Tensors that replace those of a checkpoint; a file for each span of blocks that was trained.

    Spans of a later phase count more than those of an earlier one, and within a phase later
    spans more than earlier ones.
    """

    directory: Path

    def path(self, phase: int, first: int) -> Path:
        """File of the span that begins with block ``first``."""
        return self.directory / f"phase{phase}-{first:05d}.safetensors"

    def has(self, phase: int, first: int) -> bool:
        """Whether a span is finished."""
        return self.path(phase, first).exists()

    def write(self, phase: int, first: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a span's tensors by full name, atomically."""
        path = self.path(phase, first)
        write_shard(path.parent, path.name, tensors)

    def note(self, phase: int, first: int, notes: Mapping[str, Any]) -> None:
        """Write, before a span's tensors, what is to be known of it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.path(phase, first).with_suffix(".json"), dict(notes))

    def notes(self) -> list[dict[str, Any]]:
        """What is known of each finished span, in the order of training, also if it is undone."""
        return [
            read_json(path)
            for path in sorted(self.directory.glob("phase*.json"))
            if path.with_suffix(".safetensors").exists() or self._is_undone(_phase_of(path))
        ]

    def judge(self, phase: int, verdict: Verdict) -> None:
        """Note for good what became of a phase."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self._verdict_file(phase), asdict(verdict))

    def take_back(self, phase: int) -> None:
        """Remove what was learned in a phase that is not kept; may be repeated."""
        for path in self.directory.glob(f"phase{phase}-*.safetensors"):
            path.unlink()

    def verdict(self, phase: int) -> Verdict | None:
        """What became of a phase; None: it is not judged yet."""
        path = self._verdict_file(phase)
        return Verdict(**read_json(path)) if path.exists() else None

    def _verdict_file(self, phase: int) -> Path:
        return self.directory / f"verdict-phase{phase}.json"

    def _is_undone(self, phase: int) -> bool:
        verdict = self.verdict(phase)
        return verdict is not None and not verdict.is_kept

    def of_block(self, index: int, prefix: str) -> dict[str, Tensor]:
        """What was learned of the tensors of one block, the latest of each, by full name."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.directory.glob("phase*.safetensors")):
            if int(path.stem.rpartition("-")[2]) > index:
                continue
            with safe_open(path, framework="pt") as span:
                names = [n for n in span.keys() if n.startswith(prefix + ".")]  # noqa: SIM118
                found |= {name: span.get_tensor(name) for name in names}
        return found


def _phase_of(path: Path) -> int:
    return int(path.name.removeprefix("phase").partition("-")[0])


class QuantizedBlocks:
    """Blocks of a quantized checkpoint, read when they are asked for.

    Args:
        checkpoint: Its directory.
        original: Skeleton of the original model, which has the same modules.
        patches: What was learned since.
    """

    def __init__(self, checkpoint: Path, original: Skeleton, patches: Patches):
        self.directory, self.patches = checkpoint, patches
        source = ModelSource(str(checkpoint), checkpoint, original.source.trust_remote_code)
        self.skeleton = replace(original, source=source)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's ``quantization_config``."""
        return read_json(self.directory / CONFIG)["quantization_config"]

    @cached_property
    def formats(self) -> dict[str, LayerFormat]:
        """How each quantized layer is stored, by full name."""
        names = (name for name, _ in self.skeleton.model.named_modules())
        return quantized_layers(self.config, names)

    def layer_names(self, index: int) -> list[str]:
        """Full names of the quantized layers of a block."""
        prefix = self.skeleton.block_name(index) + "."
        return [name for name in self.formats if name.startswith(prefix)]

    def load(self, index: int, device: torch.device) -> nn.Module:
        """A fresh copy of one block on a device, its quantized layers in place."""
        skeleton, prefix = self.skeleton, self.skeleton.block_name(index)
        names = self.layer_names(index)
        block = skeleton.fresh_block(index)
        for name in names:
            block.set_submodule(name.removeprefix(prefix + "."), nn.Identity())
        fill(block, prefix, skeleton, device)
        learned = self.patches.of_block(index, prefix)
        for name in names:
            layer = self.load_layer(name, _within(learned, name))
            block.set_submodule(name.removeprefix(prefix + "."), layer.to(device))
        return block.eval().requires_grad_(requires_grad=False)

    def load_layer(self, name: str, learned: Mapping[str, Tensor] | None = None) -> QuantLinear:
        """One quantized layer by its full name, wherever in the model it is.

        Args:
            name: Full name.
            learned: Replaces the checkpoint's tensors, by their names inside the layer.
        """
        files = self.skeleton.source.tensor_files
        state = _within(self.skeleton.source.read(_below(files, name)), name) | (learned or {})
        return load_layer(state, self.formats[name], name, self.directory)


def _below(names: Iterable[str], layer: str) -> list[str]:
    return [name for name in names if name.rpartition(".")[0] == layer]


def _within(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """A layer's tensors by their names inside it."""
    return {name.rpartition(".")[2]: tensors[name] for name in _below(tensors, layer)}


def packed_tensors(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What a checkpoint keeps of a block's quantized layers, by full name."""
    return {
        f"{prefix}.{short}.{key}": tensor
        for short, module in block.named_modules()
        if isinstance(module, QuantLinear)
        for key, tensor in module.packed_state().items()
    }
