"""Tensors that replace those of a checkpoint: into a live model, or into a new directory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from onecomp.errors import InputError
from onecomp.export.checkpoint import CONFIG, METADATA, finish_checkpoint, read_header, write_shard
from onecomp.export.load import read_json
from onecomp.post_process.base import PATCHES, PROCESSES_KEY
from onecomp.quantizer.quant_linear import QuantLinear


def patches_in(work: Path) -> list[Path]:
    """Files of changed tensors, later ones replace earlier ones."""
    return sorted((work / PATCHES).glob("*.safetensors"))


def patch_live(layers: Mapping[str, QuantLinear], work: Path) -> None:
    """Give the quantized layers of a live model their new tensors.

    Args:
        layers: By full name.
        work: Directory with the patches.
    """
    for path in patches_in(work):
        for name, tensor in load_file(path).items():
            layer, _, key = name.rpartition(".")
            layers[layer].state_dict()[key].copy_(tensor)


def patch_checkpoint(checkpoint: Path, work: Path, output: Path, entry: Mapping[str, Any]) -> None:
    """Write a checkpoint that differs from another in patched tensors; one file at a time.

    Args:
        checkpoint: The one that was improved; not changed.
        work: Directory with the patches.
        output: New directory; ``config.json``, without which it is no checkpoint, comes last.
        entry: What the new one says of the process.

    Raises:
        InputError: The checkpoint is not quantized.
    """
    if read_json(checkpoint / CONFIG).get("quantization_config") is None:
        raise InputError(checkpoint, "is not a quantized checkpoint.")
    patches = patches_in(work)
    shards = sorted(checkpoint.glob("model*.safetensors"))
    for shard in shards:
        tensors = load_file(shard)
        for name, tensor in _patched(patches, tensors):
            tensors[name] = tensor
        write_shard(output, shard.name, tensors)
    finish_with_entry(checkpoint, output, [shard.name for shard in shards], entry)


def _patched(patches: list[Path], names: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for path in patches:
        if names.keys() & read_header(path).keys() - {METADATA}:
            yield from ((n, t) for n, t in load_file(path).items() if n in names)


def finish_with_entry(
    checkpoint: Path, output: Path, shard_names: list[str], entry: Mapping[str, Any]
) -> None:
    """Add to shards the configuration of their checkpoint, with one entry more."""
    config = read_json(checkpoint / CONFIG)
    quantization = config["quantization_config"]
    entries = [*quantization.get(PROCESSES_KEY, []), dict(entry)]
    config["quantization_config"] = {**quantization, PROCESSES_KEY: entries}
    finish_checkpoint(output, shard_names, config, checkpoint)
