"""One self-contained HTML page about a run, made from its run directory alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from statistics import fmean

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from onecomp.history import JsonObject, as_number
from onecomp.report.figures import block_error_line, error_heat_map
from onecomp.report.journal import Journal, LayerRecord, read_journal
from onecomp.report.text import DASH, bytes_text, duration_text, error_text, number_text
from onecomp.report.work import work_section
from onecomp.storage import AnyPath, open_path, replacing

NUM_WORST = 10
HASH_ENDINGS = ("hash", "sha256", "digest")
Rows = list[tuple[str, str]]


def write_report(run_dir: str | AnyPath, destination: AnyPath | None = None) -> AnyPath:
    """Write the report of a run, finished or not.

    Args:
        run_dir: Run directory, on any storage, with ``run.json`` and perhaps a journal.
        destination: File to write; None means ``report.html`` in ``run_dir``. Appears complete or
            not at all.

    Returns:
        The file written.

    Raises:
        InputError: ``run_dir`` is not a run directory.
    """
    run_dir = open_path(run_dir)
    page = render_report(read_journal(run_dir))
    destination = run_dir / "report.html" if destination is None else destination
    with replacing(destination) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return destination


def render_report(journal: Journal) -> str:
    """The page as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number_text, error=error_text)
    template = resources.files("onecomp.report").joinpath("template.html.j2")
    settings, hashes = _split_hashes(journal.run)
    work = work_section(journal)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=_model_name(journal.run),
        is_finished=journal.finished is not None,
        created=_text(journal.run.get("created")),
        tiles=[*_tiles(journal), *work.tiles],
        work=work,
        heat_map=_markup(error_heat_map(journal.layers)),
        block_line=_markup(block_error_line(_block_errors(journal))),
        worst=worst_layers(journal.layers),
        fallbacks=journal.fallbacks,
        evaluations=[_evaluation_row(event) for event in journal.evaluations],
        times=_times(journal),
        settings=settings,
        hashes=hashes,
        num_unreadable=journal.num_unreadable,
    )


def worst_layers(layers: Sequence[LayerRecord], count: int = NUM_WORST) -> list[LayerRecord]:
    """The layers with the largest relative output error; one that is not a number is worst."""
    measured = [layer for layer in layers if layer.output_error is not None]
    return sorted(measured, key=_badness, reverse=True)[:count]


def _badness(layer: LayerRecord) -> float:
    error = layer.output_error
    return math.inf if error is None or math.isnan(error) else error


def _markup(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)


def _model_name(run: JsonObject) -> str:
    model = run.get("model")
    if isinstance(model, Mapping):
        model = next(
            (model[key] for key in ("id", "model_id", "name", "path") if model.get(key)), None
        )
    return _text(model)


def _quantizer_name(run: JsonObject) -> str:
    quantizer = run.get("quantizer")
    return _text(quantizer.get("name") if isinstance(quantizer, Mapping) else quantizer)


def _tiles(journal: Journal) -> list[tuple[str, str, str]]:
    """Label, value and note of the few figures that a reader looks for first."""
    bits = [layer.bits for layer in journal.layers if layer.bits is not None]
    errors = [layer.output_error for layer in journal.layers if layer.output_error is not None]
    return [
        ("quantizer", _quantizer_name(journal.run), ""),
        ("bits per weight", number_text(fmean(bits)) if bits else DASH, "mean of layers"),
        ("perplexity", *_perplexity_texts(journal.evaluations)),
        ("output error", error_text(fmean(errors) if errors else None), "mean of layers"),
        ("fallbacks", str(len(journal.fallbacks)), ""),
        ("time", duration_text(_total_s(journal)), ""),
    ]


def _perplexity_texts(evaluations: Sequence[JsonObject]) -> tuple[str, str]:
    """``8.12 → 8.31`` and ``+2.3 %``, as far as they are known."""
    last = {event.get("what"): as_number(event.get("perplexity")) for event in evaluations}
    original, quantized = last.get("original"), last.get("quantized")
    if quantized is None:
        return number_text(original), "" if original is None else "original model"
    if not original:
        return number_text(quantized), "quantized model"
    change = f"{(quantized / original - 1) * 100:+.1f} %"
    return f"{number_text(original)} → {number_text(quantized)}", change


def _evaluation_row(event: JsonObject) -> tuple[str, str, str, str]:
    perplexity = number_text(as_number(event.get("perplexity")), 3)
    tokens = number_text(as_number(event.get("tokens")), 0)
    return _text(event.get("what")), _text(event.get("text")), perplexity, tokens


def _block_errors(journal: Journal) -> dict[int, float]:
    errors = {
        block: as_number(event.get("output_error")) for block, event in journal.blocks.items()
    }
    return {block: error for block, error in errors.items() if error is not None}


def _block_seconds(journal: Journal) -> dict[int, float]:
    seconds = {block: as_number(event.get("seconds")) for block, event in journal.blocks.items()}
    return {block: value for block, value in seconds.items() if value is not None}


def _total_s(journal: Journal) -> float | None:
    """What the driver took that finished the run, and those before it until their last lines."""
    last_s = None if journal.finished is None else as_number(journal.finished.get("seconds"))
    if last_s is None:
        return None
    earlier = [attempt.times for attempt in journal.attempts[:-1]]
    return last_s + math.fsum(end - begin for begin, end in earlier)


def _times(journal: Journal) -> Rows:
    seconds = _block_seconds(journal)
    slowest = max(seconds, key=lambda block: seconds[block], default=None)
    moved = [as_number(event.get("bytes_moved")) for event in journal.blocks.values()]
    moved_bytes = sum(value for value in moved if value is not None)
    return [
        ("whole run", duration_text(_total_s(journal))),
        ("finished blocks", str(len(journal.blocks))),
        ("a block, mean", f"{fmean(seconds.values()):,.1f} s" if seconds else DASH),
        ("slowest block", DASH if slowest is None else f"{slowest} ({seconds[slowest]:,.1f} s)"),
        ("quantizing, sum over input groups", duration_text(journal.group_s or None)),
        ("bytes moved", bytes_text(moved_bytes) if any(moved) else DASH),
    ]


def _split_hashes(run: JsonObject) -> tuple[Rows, Rows]:
    rows = [(key, _text(value)) for key, value in _flatten(run)]
    hashes = [row for row in rows if row[0].endswith(HASH_ENDINGS)]
    return [row for row in rows if row not in hashes], hashes


def _flatten(value: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested objects with dotted names."""
    for key, member in value.items():
        if isinstance(member, Mapping) and member:
            yield from _flatten(member, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", member


def _text(value: object) -> str:
    if value is None or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
