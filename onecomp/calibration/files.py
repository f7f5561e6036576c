"""Documents from local files and directories, read no further than they are asked for."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import csv

from onecomp.calibration.config import CalibrationConfig
from onecomp.errors import InputError, UserError

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "sentence", "document", "body", "input")
MIN_CHARACTERS = 50
"""Shorter documents of parquet and arrow data are dropped: ids, titles, empty rows."""

Row = dict[str, object]
Reader = Callable[[Path, CalibrationConfig], Iterator[str]]


def read_local(path: Path, config: CalibrationConfig) -> Iterator[str]:
    """Documents of a file, of a ``save_to_disk`` directory or of a directory of files.

    Args:
        path: An existing file or directory.
        config: Its ``text_key``, ``dataset_split``, ``max_documents`` and ``seed`` count here.

    Raises:
        InputError: The path cannot be used; a broken row is found while reading.
    """
    if path.is_dir():
        return _read_directory(path, config)
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            path, f"{path.suffix or 'no suffix'} is not supported. Use one of {_supported()}."
        )
    if path.stat().st_size == 0:
        raise InputError(path, "the file is empty. Give a file that holds text.")
    return _readable(path, READERS[kind](path, config))


def kind_of(path: Path) -> str | None:
    """Key of ``READERS`` for a file, looking through ``.gz`` of text tables; None if unknown."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return inner if inner in _COMPRESSIBLE else None
    return suffix if suffix in READERS else None


def text_column(columns: Iterable[str], config: CalibrationConfig, subject: object) -> str:
    """The column that holds the text: ``text_key``, else the first of ``TEXT_COLUMNS``.

    Raises:
        InputError: None of them is there.
    """
    found = list(columns)
    for name in (config.text_key, *TEXT_COLUMNS):
        if name in found:
            if name != config.text_key:
                logger.warning("%s: no column %r, reading %r", subject, config.text_key, name)
            return name
    raise InputError(
        subject,
        f"no column holds text: found {', '.join(found) or 'none'}, looked for "
        f"text_key={config.text_key!r} and {', '.join(TEXT_COLUMNS)}. "
        "Set text_key to the column to read.",
    )


def column_texts(rows: Iterable[Row], config: CalibrationConfig, subject: object) -> Iterator[str]:
    """Non-blank text of each row, from the column that the first row shows.

    Raises:
        InputError: No text column, or the column holds something else than text.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    column = text_column(first, config, subject)
    for row in chain([first], iterator):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise InputError(
                subject,
                f"column {column!r} holds {type(text).__name__}, not text. "
                "Set text_key to a column of strings.",
            )
        if text and not text.isspace():
            yield text


def _supported() -> str:
    return f"{', '.join(READERS)} (and .gz of {', '.join(_COMPRESSIBLE)})"


def _readable(path: Path, texts: Iterator[str]) -> Iterator[str]:
    """The texts, with failures of the readers turned into errors that name the file."""
    try:
        yield from texts
    except UserError:
        raise
    except (OSError, EOFError, ValueError) as error:  # pyarrow, pandas and codecs: ValueError
        raise InputError(
            path, f"cannot be read: {error}. Check that the content fits the suffix."
        ) from error


def _read_directory(path: Path, config: CalibrationConfig) -> Iterator[str]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _readable(path, _read_saved_dataset(path, config))
    files = data_files(path)
    if not files:
        raise InputError(
            path,
            "the directory has no data files. Give one with files of one kind of "
            f"{_supported()}, or one written by save_to_disk.",
        )
    return chain.from_iterable(read_local(file, config) for file in files)


def data_files(directory: Path) -> list[Path]:
    """Data files below a directory, sorted, all of one kind: the first of ``READERS`` found.

    One kind only, because data sets carry notes beside their data (README.txt, info.json).
    """
    by_kind: dict[str, list[Path]] = {}
    for file in sorted(directory.rglob("*")):
        kind = kind_of(file)
        is_hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
        if kind is not None and file.is_file() and not is_hidden:
            by_kind.setdefault(kind, []).append(file)
    return next((by_kind[kind] for kind in READERS if kind in by_kind), [])


def _read_saved_dataset(path: Path, config: CalibrationConfig) -> Iterator[str]:
    import datasets  # noqa: PLC0415 - takes a second, and workers do not need it

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if config.dataset_split not in saved:
            raise InputError(
                path,
                f"no split {config.dataset_split!r}: found {', '.join(map(str, saved))}. "
                "Set dataset_split to one of them.",
            )
        saved = saved[config.dataset_split]
    column = text_column(saved.column_names, config, path)
    rows = saved.select_columns([column])
    return _long_enough(column_texts(rows, config, path))


def _read_paragraphs(path: Path, config: CalibrationConfig) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for is_blank, paragraph in groupby(lines, key=str.isspace):
            if not is_blank:
                yield "".join(paragraph)


def _read_parquet(path: Path, config: CalibrationConfig) -> Iterator[str]:
    """Text of random row groups, in file order: as many as hold ``max_documents`` rows."""
    with pq.ParquetFile(path) as file:
        column = text_column(file.schema_arrow.names, config, path)
        for batch in file.iter_batches(row_groups=_row_groups(file, config), columns=[column]):
            yield from _long_enough(column_texts(batch.to_pylist(), config, path))


def _row_groups(file: pq.ParquetFile, config: CalibrationConfig) -> list[int]:
    generator = torch.Generator().manual_seed(config.seed)
    chosen, num_rows = [], 0
    for group in torch.randperm(file.num_row_groups, generator=generator).tolist():
        if num_rows >= config.max_documents:
            break
        chosen.append(group)
        num_rows += file.metadata.row_group(group).num_rows
    return sorted(chosen)


def _long_enough(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if len(text) >= MIN_CHARACTERS)


def _read_rows(
    path: Path, config: CalibrationConfig, builder: str, **options: str
) -> Iterator[str]:
    """Text of a file that one of the builders of ``datasets`` understands, streamed."""
    import datasets  # noqa: PLC0415 - takes a second, and workers do not need it

    rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    yield from column_texts(rows, config, path)


def _read_json(path: Path, config: CalibrationConfig) -> Iterator[str]:
    return _read_rows(path, config, "json")


def _read_csv(path: Path, config: CalibrationConfig) -> Iterator[str]:
    return _read_table(path, config, delimiter=",")


def _read_tsv(path: Path, config: CalibrationConfig) -> Iterator[str]:
    return _read_table(path, config, delimiter="\t")


def _read_table(path: Path, config: CalibrationConfig, *, delimiter: str) -> Iterator[str]:
    """Text of a table with a header line; quoted values may hold line breaks."""
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as header:
        column = text_column(header.schema.names, config, path)
    convert = csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
    with csv.open_csv(path, parse_options=parse, convert_options=convert) as batches:
        for batch in batches:
            yield from column_texts(batch.to_pylist(), config, path)


def _read_arrow(path: Path, config: CalibrationConfig) -> Iterator[str]:
    return _long_enough(_read_rows(path, config, "arrow"))


READERS: dict[str, Reader] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_paragraphs,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
