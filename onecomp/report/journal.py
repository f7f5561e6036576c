"""The journal of a run, read for display: whatever is missing or unknown is passed over."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from onecomp.errors import InputError
from onecomp.events import EVENTS_FILE, read_events
from onecomp.history import (
    Attempt,
    JsonObject,
    as_block,
    as_list,
    as_number,
    as_object,
    last_by_block,
    last_groups,
    split_attempts,
)
from onecomp.storage import AnyPath

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """How far one quantized layer is from its original."""

    layer_name: str
    block: int | None
    output_error: float | None
    """Relative squared output error."""
    weight_error: float | None
    """Relative squared weight error."""
    bits: float | None
    """Bits per weight."""

    @property
    def kind(self) -> str:
        """Place of the layer in its block, without numbers: the same for all experts."""
        parts = self.layer_name.split(".")
        first_number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        return ".".join(part for part in parts[first_number + 1 :] if not part.isdigit())


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A unit that was not quantized as asked."""

    block: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Journal:
    """Everything a report shows, in the order of the run."""

    run: JsonObject
    """Contents of ``run.json``."""
    layers: list[LayerRecord] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    blocks: dict[int, JsonObject] = field(default_factory=dict)
    """Block events by block."""
    attempts: list[Attempt] = field(default_factory=list)
    """What each driver wrote, one after the other."""
    evaluations: list[JsonObject] = field(default_factory=list)
    group_s: float = 0.0
    """Seconds that quantizing took, added up over input groups."""
    finished: JsonObject | None = None
    """The last event of a run that reached its end."""
    num_unreadable: int = 0
    """Lines that are no JSON object, other than a last one cut short."""


def read_journal(run_dir: AnyPath) -> Journal:
    """Read a run directory; where a resumed run repeats a unit, its last event counts.

    Raises:
        InputError: ``run_dir`` holds no readable ``run.json``.
    """
    run = _read_run(run_dir / RUN_FILE)
    events, num_unreadable = read_events(run_dir / EVENTS_FILE)
    groups = last_groups(events)
    finished = [event for event in events if event.get("event") == "finished"]
    evaluations = {
        (event.get("what"), event.get("text")): event
        for event in events
        if event.get("event") == "evaluation"
    }
    return Journal(
        run=run,
        layers=list({layer.layer_name: layer for g in groups for layer in _layers(g)}.values()),
        fallbacks=[fallback for group in groups for fallback in _fallbacks(group)],
        blocks=last_by_block(events, "block"),
        attempts=split_attempts(events),
        evaluations=list(evaluations.values()),
        group_s=math.fsum(as_number(group.get("seconds")) or 0.0 for group in groups),
        finished=finished[-1] if finished else None,
        num_unreadable=num_unreadable,
    )


def _read_run(path: AnyPath) -> JsonObject:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            path.parent,
            f"holds no {RUN_FILE}, so it is not a run directory. Give the directory of a run.",
        ) from error
    except ValueError as error:
        raise InputError(
            path, f"is not JSON ({error}). Restore it, or start the run again."
        ) from error
    if not isinstance(run, dict):
        raise InputError(path, "is not a JSON object. Restore it, or start the run again.")
    return run


def _layers(group: JsonObject) -> Iterator[LayerRecord]:
    for layer_name, errors in as_object(group.get("layers")).items():
        values = as_object(errors)
        yield LayerRecord(
            layer_name=layer_name,
            block=as_block(group),
            output_error=as_number(values.get("relative_output_squared_error")),
            weight_error=as_number(values.get("relative_weight_squared_error")),
            bits=as_number(values.get("bits")),
        )


def _fallbacks(group: JsonObject) -> Iterator[Fallback]:
    for fallback in as_list(group.get("fallbacks")):
        text = fallback
        if isinstance(fallback, dict):
            text = ", ".join(f"{key}: {value}" for key, value in fallback.items())
        yield Fallback(block=as_block(group), text=str(text))
