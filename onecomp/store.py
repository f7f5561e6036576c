"""The run directory: what is being made, which blocks are finished, what happened.

RUN/
  run.json                    identity and settings
  calibration.safetensors     the calibration tokens
  blocks/00017.safetensors    results of block 17; present means finished
  checkpoint/                 the checkpoint as far as it is written
  events.jsonl                one line per finished unit; events/ on an object store
  report.html
  assignment.json, survey/    of a method that gives each layer a child, see ``onecomp.survey``
  lease-000001.json           the driver that works on it; absent means none does
  replaced/                   an earlier run that this one replaces, until this one is finished
"""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from onecomp.block_file import (
    StoredResults,
    read_block_file,
    untold_events,
    write_block_file,
)
from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError
from onecomp.events import EVENTS, EVENTS_FILE, EventLog, open_event_log, read_events
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.lease import (
    TTL_S,
    Holder,
    LeaseLostError,
    find_holder,
    hold,
    require_held,
)
from onecomp.quantizer.result import QuantizationResult
from onecomp.storage import (
    ONE_PROCESS,
    AnyPath,
    children,
    local_file,
    make_directory,
    move_tree,
    remove_tree,
)

RUN_FILE = "run.json"
CALIBRATION_FILE = "calibration.safetensors"
BLOCKS = "blocks"
CHECKPOINT = "checkpoint"
REPORT_FILE = "report.html"
ASSIGNMENT_FILE = "assignment.json"
SURVEY = "survey"
FILES = (
    RUN_FILE,
    CALIBRATION_FILE,
    BLOCKS,
    CHECKPOINT,
    EVENTS_FILE,
    EVENTS,
    REPORT_FILE,
    ASSIGNMENT_FILE,
    SURVEY,
)
"""What a run writes; the record first, as it makes a directory a run."""
REPLACED = "replaced"


@dataclass(frozen=True)
class RunDirectory:
    """A run's files; every method reads or writes them at once, but for events on object stores.

    It may be pickled: whoever receives it opens the storage by the path alone.
    """

    path: AnyPath
    run_id: str | None = None
    """Random name of the run that the directory must hold; None where any will do."""
    owner: str | None = None
    """Whose lease allows to write blocks; None asks for no lease."""

    @property
    def checkpoint(self) -> AnyPath:
        """Where the checkpoint is put together before it is moved to its place."""
        return self.path / CHECKPOINT

    # Who may work on it

    @contextmanager
    def lease(self, ttl_s: float = TTL_S) -> Iterator["RunDirectory"]:
        """Keep other drivers away while the body runs.

        Args:
            ttl_s: Seconds without a sign of life after which this driver counts as dead.

        Yields:
            The same directory; its ``require_lease`` tells whether it is still this driver's, and
            its ``write_block`` refuses to write if not, in any process.

        Raises:
            InputError: Another driver works on it.
        """
        with hold(self.path, ttl_s) as lease:
            held = replace(self, owner=lease.owner)
            try:
                yield held
            finally:
                with suppress(LeaseLostError):  # then nothing is written any more
                    held.require_lease()
                    held.flush()

    def require_lease(self) -> None:
        """Check that the directory is still that of the driver which holds the lease.

        Raises:
            LeaseLostError: Another driver has taken it over.
        """
        if self.owner is not None:
            require_held(self.path, self.owner)

    def holder(self) -> Holder | None:
        """The driver that works on it, or did when it died."""
        return find_holder(self.path)

    def require_visible(self, who: str = "this process") -> None:
        """Check that the driver's directory is seen here, and no other one of the same name.

        Args:
            who: Who looks, for the message.

        Raises:
            InputError: It is not.
        """
        place = f"{who} on {socket.gethostname()}"
        remedy = "Give a --run-dir on storage that every node sees."
        if not self.exists:
            if not isinstance(self.path, Path) and self.path.protocol == ONE_PROCESS:
                remedy = "memory:// is seen by one process: give --num-workers 0, or other storage."
            raise InputError(self.path, f"is not seen by {place}. {remedy}")
        if self.run_id is not None and self.record().get("run_id") != self.run_id:
            raise InputError(
                self.path, f"is another directory for {place} than for the driver. {remedy}"
            )

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
        kept = self.path / REPLACED
        keeps = kept.exists()
        for path in [self.path / name for name in FILES]:
            if not path.exists():
                continue
            if keeps:
                remove_tree(path)
            else:
                make_directory(kept)
                move_tree(path, kept / path.name)

    def drop_replaced(self) -> None:
        """Remove the run that this one replaces."""
        remove_tree(self.path / REPLACED)

    def begin(self, record: Mapping[str, object], samples: CalibrationSamples | None) -> None:
        """Write what is being made."""
        make_directory(self.path)
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
            with local_file(path) as local, safe_open(local, framework="pt") as file:
                return CalibrationSamples(
                    file.get_tensor("input_ids"), file.get_tensor("attention_mask")
                )
        except (SafetensorError, OSError) as error:
            raise InputError(
                path, f"cannot be read ({error}). Begin anew in another directory."
            ) from error

    # Results

    def block_path(self, block_index: int) -> AnyPath:
        """File of one block's results."""
        return self.path / BLOCKS / f"{block_index:05d}.safetensors"

    def block_files(self) -> dict[int, AnyPath]:
        """Files of the finished blocks by their number, in order: one listing."""
        files = [p for p in children(self.path / BLOCKS) if p.suffix == ".safetensors"]
        return {int(path.stem): path for path in files if path.stem.isdecimal()}

    def has_block(self, block_index: int) -> bool:
        """Whether the block is finished."""
        return self.block_path(block_index).is_file()

    def write_block(
        self,
        block_index: int,
        results: Mapping[str, QuantizationResult],
        journal: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """Store a block's results; the file appears complete or not at all.

        Args:
            block_index: The block.
            results: By layer name.
            journal: The block's events, each with its kind as ``event``: ``repair_journal`` adds
                them to the journal if the driver does not come to do it.

        Raises:
            LeaseLostError: Another driver has taken the directory over.
        """
        self.require_lease()
        write_block_file(self.block_path(block_index), results, journal)

    def read_block(self, block_index: int) -> dict[str, QuantizationResult]:
        """A block's results by layer name, in the order in which they were written.

        Raises:
            InputError: The file is damaged.
        """
        return read_block_file(self.block_path(block_index))

    def results(self, keeps: object = None) -> StoredResults:
        """All results, read when asked for; they keep ``keeps`` alive.

        Raises:
            InputError: A file is damaged.
        """
        return StoredResults(self.block_files(), keeps)

    # Events

    def append(self, event: str, **fields: object) -> None:
        """Add one event to the journal; on an object store it may wait for the next ones."""
        self._log.append(event, fields)

    def flush(self) -> None:
        """Write the events that wait."""
        self._log.flush()

    def events(self, kind: str) -> list[dict]:
        """Events of one kind, in order."""
        events, _ = read_events(self.path / EVENTS_FILE)
        return [event for event in events if event.get("event") == kind]

    def repair_journal(self) -> None:
        """Add the events of blocks whose driver was killed before it wrote them.

        Raises:
            InputError: A block's file is damaged.
        """
        known, _ = read_events(self.path / EVENTS_FILE)
        for event in untold_events(known, self.block_files()):
            self.append(**event)
        self.flush()

    def mean_output_error(self) -> str:
        """Mean of the blocks' output errors as the journal has them; a dash where none is known."""
        blocks = {event["block"]: event["output_error"] for event in self.events("block")}
        errors = [error for error in blocks.values() if error is not None]
        return f"{sum(errors) / len(errors):.2e}" if errors else "-"

    @cached_property
    def _log(self) -> EventLog:
        return open_event_log(self.path)
