"""The run directory: what is being made, which blocks are finished, what happened.

RUN/
  run.json                    identity and settings
  calibration.safetensors     the calibration tokens
  blocks/00017.safetensors    results of block 17; present means finished
  checkpoint/                 the checkpoint as far as it is written
  events.jsonl                one line per finished unit
  report.html
  replaced/                   an earlier run that this one replaces, until this one is finished
"""

import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.quantizer.result import QuantizationResult

RUN_FILE = "run.json"
EVENTS_FILE = "events.jsonl"
CALIBRATION_FILE = "calibration.safetensors"
BLOCKS = "blocks"
CHECKPOINT = "checkpoint"
FILES = (RUN_FILE, CALIBRATION_FILE, BLOCKS, CHECKPOINT, EVENTS_FILE, "report.html")
"""What a run writes; the record first, as it makes a directory a run."""
REPLACED = "replaced"
SEPARATOR = "|"
NARROW = {"int32": torch.uint8, "int64": torch.int32}
"""Integer dtypes are stored narrower where every value fits."""


@dataclass(frozen=True)
class RunDirectory:
    """A run's files; every method reads or writes them at once and keeps nothing."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is put together before it is moved to its place."""
        return self.path / CHECKPOINT

    # Identity

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RUN_FILE).is_file()

    def set_aside(self) -> None:
        """Move what an earlier run left here to ``replaced/``; other files stay.

        If a still earlier run is kept there, that one stays and the later one is removed: it did
        not get to its end.
        """
        keeps = (self.path / REPLACED).exists()
        for path in [self.path / name for name in FILES]:
            if not path.exists():
                continue
            if not keeps:
                (self.path / REPLACED).mkdir(exist_ok=True)
                path.rename(self.path / REPLACED / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def drop_replaced(self) -> None:
        """Remove the run that this one replaces."""
        if (self.path / REPLACED).exists():
            shutil.rmtree(self.path / REPLACED)

    def begin(self, record: Mapping[str, object], samples: CalibrationSamples | None) -> None:
        """Write what is being made."""
        self.path.mkdir(parents=True, exist_ok=True)
        if samples is not None:
            tokens = {"input_ids": samples.input_ids, "attention_mask": samples.attention_mask}
            write_shard(self.path, CALIBRATION_FILE, tokens)
        write_json(self.path / RUN_FILE, record)

    def record(self) -> dict:
        """What is being made.

        Raises:
            InputError: No run was begun here, or its record is damaged.
        """
        if not self.exists:
            raise InputError(self.path, "is not a run directory (it holds no run.json).")
        try:
            return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                self.path / RUN_FILE,
                f"cannot be read ({error}). Begin anew in another directory.",
            ) from error

    def created(self) -> str:
        """When the run began, in ISO 8601, UTC: now, unless it began earlier."""
        if self.exists:
            return self.record()["created"]
        return datetime.now(timezone.utc).isoformat(timespec="seconds")

    def samples(self) -> CalibrationSamples | None:
        """The calibration tokens; None for a run without."""
        path = self.path / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return CalibrationSamples(
                    file.get_tensor("input_ids"), file.get_tensor("attention_mask")
                )
        except (SafetensorError, OSError) as error:
            raise InputError(
                path, f"cannot be read ({error}). Begin anew in another directory."
            ) from error

    # Results

    def block_path(self, block_index: int) -> Path:
        """File of one block's results."""
        return self.path / BLOCKS / f"{block_index:05d}.safetensors"

    def has_block(self, block_index: int) -> bool:
        """Whether the block is finished."""
        return self.block_path(block_index).is_file()

    def write_block(self, block_index: int, results: Mapping[str, QuantizationResult]) -> None:
        """Store a block's results; the file appears complete or not at all."""
        tensors = {
            f"{name}{SEPARATOR}{key}": tensor
            for name, result in results.items()
            for key, tensor in result.tensors().items()
        }
        header = {
            name: {
                "type": type(result).__name__,
                "values": result.values(),
                "dtypes": {key: str(t.dtype)[6:] for key, t in result.tensors().items()},
            }
            for name, result in results.items()
        }
        path = self.block_path(block_index)
        stored = {name: _narrow(tensor) for name, tensor in tensors.items()}
        write_shard(path.parent, path.name, stored, {"results": json.dumps(header)})

    def read_block(self, block_index: int) -> dict[str, QuantizationResult]:
        """A block's results by layer name, in the order in which they were written.

        Raises:
            InputError: The file is damaged.
        """
        with _opened(self.block_path(block_index)) as (file, header):
            return {name: _restore(file, name, entry) for name, entry in header.items()}

    def results(self) -> "StoredResults":
        """All results, read when asked for.

        Raises:
            InputError: A file is damaged.
        """
        return StoredResults(self)

    # Events

    def append(self, event: str, **fields: object) -> None:
        """Add one line to the journal, behind half a line that a killed run may have left."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
        with (self.path / EVENTS_FILE).open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    def events(self, kind: str) -> list[dict]:
        """Events of one kind, in order."""
        events, _ = read_events(self.path / EVENTS_FILE)
        return [event for event in events if event.get("event") == kind]

    def mean_output_error(self) -> str:
        """Mean of the blocks' output errors as the journal has them; a dash where none is known."""
        blocks = {event["block"]: event["output_error"] for event in self.events("block")}
        errors = [error for error in blocks.values() if error is not None]
        return f"{sum(errors) / len(errors):.2e}" if errors else "-"


def read_events(path: Path) -> tuple[list[dict], int]:
    """Events of a journal in order, and the number of unreadable lines.

    A run that is killed may leave half a line. At the end it is what any reader of a live run
    sees; in the middle, where a resumed run went on, it is counted.
    """
    if not path.is_file():
        return [], 0
    *lines, last = path.read_bytes().split(b"\n")
    events = [_parse_event(line) for line in lines if line.strip()]
    readable = [event for event in [*events, _parse_event(last)] if event is not None]
    return readable, events.count(None)


def _parse_event(line: bytes) -> dict | None:
    try:
        event = json.loads(line)
    except ValueError:  # includes undecodable bytes
        return None
    return event if isinstance(event, dict) else None


class TemporaryPath:
    """A new directory that is there as long as this object.

    Args:
        prefix: Beginning of its name.
    """

    def __init__(self, prefix: str):
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class StoredResults(Mapping[str, QuantizationResult]):
    """Results by layer name, read from the run directory one block at a time.

    Args:
        run: A finished run, or one as far as it is.
        keeps: Stays alive as long as this does: whatever would take the directory with it.
    """

    def __init__(self, run: RunDirectory, keeps: object = None):
        self._run, self._keeps = run, keeps
        self._block_of = {
            name: int(path.stem)
            for path in sorted((run.path / BLOCKS).glob("*.safetensors"))
            for name in _layer_names(path)
        }
        self._last: tuple[int, dict[str, QuantizationResult]] | None = None

    def __getitem__(self, layer_name: str) -> QuantizationResult:
        block_index = self._block_of[layer_name]
        if self._last is None or self._last[0] != block_index:
            self._last = block_index, self._run.read_block(block_index)
        return self._last[1][layer_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, dict[str, dict]]]:
    """A block's file and what its header says of every layer."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {})["results"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(
            path, f"cannot be read ({error}). Delete it; resume makes the block again."
        ) from error


def _layer_names(path: Path) -> list[str]:
    with _opened(path) as (_, header):
        return list(header)


def _restore(file: safe_open, name: str, entry: Mapping) -> QuantizationResult:
    tensors = {
        key: file.get_tensor(f"{name}{SEPARATOR}{key}").to(getattr(torch, dtype))
        for key, dtype in entry["dtypes"].items()
    }
    return QuantizationResult.restore(entry["type"], tensors, entry["values"])


def _narrow(tensor: Tensor) -> Tensor:
    narrow = NARROW.get(str(tensor.dtype)[6:])
    if narrow is None or not tensor.numel():
        return tensor
    limits = torch.iinfo(narrow)
    fits = limits.min <= tensor.min().item() and tensor.max().item() <= limits.max
    return tensor.to(narrow) if fits else tensor
