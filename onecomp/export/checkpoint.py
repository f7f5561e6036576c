"""Writing checkpoint directories: every file appears complete or not at all.

The same tensors and settings give the same bytes. ``config.json`` comes last, so that a directory
that has one is a finished checkpoint.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onecomp.errors import InputError
from onecomp.storage import AnyPath, make_directory, read_range, replacing

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_FOLDER = "adapter"
"""LoRA adapters of a checkpoint, in PEFT's files; beside the model, they would be taken for it."""
TOKENIZER_CONFIG = "tokenizer_config.json"
AUXILIARY_PATTERNS = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
)
METADATA = "__metadata__"
"""Entry of a safetensors header that is no tensor."""
PT_METADATA = {"format": "pt"}


def write_shard(
    directory: AnyPath,
    shard_name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = PT_METADATA,
) -> None:
    """Write one safetensors file atomically, from tensors on any device.

    Args:
        directory: Created when missing.
        shard_name: File name, ``model.safetensors`` when it holds the whole model.
        tensors: By full name; tied tensors under one name only.
        metadata: Texts of the file's header.
    """
    make_directory(directory)
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with replacing(directory / shard_name) as temporary:
        save_file(ready, temporary, metadata=dict(metadata))
        if len(metadata) > 1:
            _sort_metadata(temporary)


def write_json(path: AnyPath, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_header(path: AnyPath) -> dict[str, Any]:
    """The header of a safetensors file as JSON; its tensors are not read.

    Raises:
        SafetensorError: The file is damaged.
    """
    length = int.from_bytes(read_range(path, 0, 8), "little")
    size = path.stat().st_size
    if not 0 < length <= size - 8:
        raise SafetensorError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read_range(path, 8, 8 + length))
    except ValueError as error:
        raise SafetensorError(f"the header is no JSON: {error}") from error
    tensors = [entry for name, entry in header.items() if name != METADATA]
    end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    if end != size:
        raise SafetensorError(f"{size} bytes, where the header announces {end}")
    return header


def finish_checkpoint(
    directory: AnyPath,
    shard_names: Sequence[str],
    config: Mapping[str, Any],
    source_dir: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Add to the shards everything else that makes ``directory`` a checkpoint.

    With a tokenizer, its files are written from it, and ``add_bos_token: true`` is added to its
    settings where they are silent about it, but only if the tokenizer really puts its BOS token
    first: nothing changes for those who already read it right. Without one, the tokenizer files
    of the source are copied as they are.

    Args:
        directory: Where the shards are.
        shard_names: Files written by :func:`write_shard`.
        config: Contents of ``config.json``, with its ``quantization_config``.
        source_dir: The original model; its auxiliary files that are still absent are copied,
            Python files only if ``config`` refers to them (``auto_map``).
        tokenizer: The tokenizer to write; for a local directory only.

    Raises:
        InputError: ``directory`` has weights that would be loaded instead of the shards.
    """
    _refuse_other_weights(directory, shard_names)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        _declare_bos(directory / TOKENIZER_CONFIG, tokenizer)
    if source_dir is not None:
        patterns = (*AUXILIARY_PATTERNS, "*.py") if "auto_map" in config else AUXILIARY_PATTERNS
        _copy_auxiliary(source_dir, directory, patterns)
    if list(shard_names) == [SINGLE_SHARD]:
        (directory / INDEX).unlink(missing_ok=True)
    else:
        write_json(directory / INDEX, _index(directory, shard_names))
    write_json(directory / CONFIG, config)


def _sort_metadata(path: Path) -> None:
    """Give the header's texts the order of their names; the library's order is random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, f"{path}: the header grew from {length} to {len(text)} bytes"
        file.seek(8)
        file.write(text.ljust(length))


def _refuse_other_weights(directory: AnyPath, shard_names: Sequence[str]) -> None:
    if SINGLE_SHARD not in shard_names and (directory / SINGLE_SHARD).exists():
        raise InputError(
            directory / SINGLE_SHARD,
            "is not part of this checkpoint but would be loaded instead of its shards. Remove it.",
        )


def _index(directory: AnyPath, shard_names: Sequence[str]) -> dict[str, Any]:
    weight_map, total_size = {}, 0
    for shard_name in sorted(shard_names):
        header = read_header(directory / shard_name)
        tensors = [name for name in header if name != METADATA]
        weight_map |= dict.fromkeys(tensors, shard_name)
        total_size += max((header[name]["data_offsets"][1] for name in tensors), default=0)
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def _copy_auxiliary(source: Path, directory: AnyPath, patterns: Sequence[str]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        target = directory / path.name
        if path.name == CONFIG or path.name.endswith(".index.json") or target.exists():
            continue
        with replacing(target) as temporary:
            shutil.copyfile(path, temporary)


def _declare_bos(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.bos_token_id is None or not path.exists():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if "add_bos_token" not in settings and starts_with_bos:
        write_json(path, {**settings, "add_bos_token": True})
