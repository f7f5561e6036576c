"""The file of one finished block: its results as tensors, and a JSON header.

The header also keeps the block's lines of the journal, so that a driver that is killed between
this file and the journal loses none.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int32, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onecomp.errors import InputError
from onecomp.export.bits import pack_bits, unpack_bits
from onecomp.export.checkpoint import METADATA, read_header, write_shard
from onecomp.quantizer.result import QuantizationResult, narrow
from onecomp.storage import AnyPath, local_file

SEPARATOR = "|"
UNREADABLE = (SafetensorError, OSError, KeyError, json.JSONDecodeError)


def write_block_file(
    path: AnyPath,
    results: Mapping[str, QuantizationResult],
    journal: Sequence[Mapping[str, object]] = (),
) -> None:
    """Store a block's results; the file appears complete or not at all.

    Args:
        path: Where.
        results: By layer name.
        journal: The block's events, as plain JSON values.
    """
    planes = {name: _planes(result) for name, result in results.items()}
    tensors = {
        f"{name}{SEPARATOR}{key}": planes[name][key].pack(t) if key in planes[name] else narrow(t)
        for name, result in results.items()
        for key, t in result.tensors().items()
    }
    header = {
        name: {
            "type": type(result).__name__,
            "values": result.values(),
            "dtypes": {key: str(t.dtype)[6:] for key, t in result.tensors().items()},
            "bits": {
                key: {"shape": list(result.tensors()[key].shape)} | asdict(coding)
                for key, coding in planes[name].items()
            },
        }
        for name, result in results.items()
    }
    texts = {"results": json.dumps(header)}
    if journal:
        texts["journal"] = json.dumps(list(journal))
    write_shard(path.parent, path.name, tensors, texts)


def read_block_file(path: AnyPath) -> dict[str, QuantizationResult]:
    """A block's results by layer name, in the order in which they were written.

    Raises:
        InputError: The file is damaged.
    """
    with _naming(path), local_file(path) as local, safe_open(local, framework="pt") as file:
        header = json.loads((file.metadata() or {})["results"])
        return {name: _restore(file, name, entry) for name, entry in header.items()}


def read_layer_names(path: AnyPath) -> list[str]:
    """The layers in a block's file, in order; the tensors are not read.

    Raises:
        InputError: The file is damaged.
    """
    with _naming(path):
        return list(json.loads(read_header(path)[METADATA]["results"]))


def untold_events(known: Sequence[Mapping], files: Mapping[int, AnyPath]) -> Iterator[dict]:
    """Events that blocks' files keep and a journal lacks, in the order of the blocks.

    Args:
        known: The journal; a block that has its own event there is complete.
        files: Files of the finished blocks, by number.

    Raises:
        InputError: A file is damaged.
    """
    told = {event.get("block") for event in known if event.get("event") == "block"}
    for block_index, path in files.items():
        kept = [] if block_index in told else _read_journal(path)
        yield from (e for e in kept if not any(old.items() >= e.items() for old in known))


def _read_journal(path: AnyPath) -> list[dict]:
    with _naming(path):
        return json.loads(read_header(path)[METADATA].get("journal", "[]"))


class StoredResults(Mapping[str, QuantizationResult]):
    """Results by layer name, read from the files of blocks one block at a time.

    Args:
        files: Files of the finished blocks, by number.
        keeps: Stays alive as long as this does: whatever would take the files with it.

    Raises:
        InputError: A file is damaged.
    """

    def __init__(self, files: Mapping[int, AnyPath], keeps: object = None):
        self._files, self._keeps = files, keeps
        self._block_of = {
            name: block_index
            for block_index, path in files.items()
            for name in read_layer_names(path)
        }
        self._last: tuple[int, dict[str, QuantizationResult]] | None = None

    def __getitem__(self, layer_name: str) -> QuantizationResult:
        block_index = self._block_of[layer_name]
        if self._last is None or self._last[0] != block_index:
            self._last = block_index, read_block_file(self._files[block_index])
        return self._last[1][layer_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise InputError(
            path, f"cannot be read ({error}). Delete it; resume makes the block again."
        ) from error


@dataclass(frozen=True)
class Planes:
    """A matrix of small whole numbers as matrices of bits, one for each power of two."""

    low: int
    """-1 for one plane of -1 and 1; 0 for numbers from 0 up."""
    planes: int = 1

    @staticmethod
    def of(tensor: Tensor) -> "Planes | None":
        """How a matrix of bytes is cut into less than eight planes; None for others."""
        is_bytes = tensor.dtype in (torch.int8, torch.uint8)
        if not is_bytes or tensor.ndim != 2 or not tensor.numel():
            return None
        low, high = (int(edge) for edge in tensor.aminmax())
        if low == -1:
            return Planes(-1) if high <= 1 and bool((tensor != 0).all()) else None
        planes = max(1, high.bit_length())
        return Planes(0, planes) if low >= 0 and planes < 8 else None

    def pack(self, tensor: Tensor) -> UInt8[Tensor, "bytes"]:
        """The planes, that of the lowest bit first."""
        if self.low < 0:
            return pack_bits(tensor > 0)
        return torch.cat([pack_bits((tensor >> i) & 1 > 0) for i in range(self.planes)])

    def unpack(self, packed: UInt8[Tensor, "bytes"], shape: Sequence[int]) -> Int32[Tensor, "..."]:
        """The inverse of ``pack``."""
        number = torch.zeros(*shape, dtype=torch.int32)
        for i, part in enumerate(packed.view(self.planes, -1)):
            number |= (unpack_bits(part, shape) > 0).int() << i
        return self.low + (1 - self.low) * number


def _planes(result: QuantizationResult) -> dict[str, Planes]:
    """By name, the tensors of a result that are stored as bits."""
    found = {key: Planes.of(tensor) for key, tensor in result.tensors().items()}
    return {key: planes for key, planes in found.items() if planes is not None}


def _restore(file: safe_open, name: str, entry: Mapping) -> QuantizationResult:
    bits = entry.get("bits", {})
    tensors = {}
    for key, dtype in entry["dtypes"].items():
        tensor = file.get_tensor(f"{name}{SEPARATOR}{key}")
        if key in bits:
            coding = dict(bits[key])
            shape = coding.pop("shape")
            tensor = Planes(**coding).unpack(tensor, shape)
        tensors[key] = tensor.to(getattr(torch, dtype))
    return QuantizationResult.restore(entry["type"], tensors, entry["values"])
