"""The text that adapters are trained on: files or Hub datasets, plain or conversations."""

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError  # the base of the client's transport errors
from transformers import PreTrainedTokenizerBase

from onecomp.errors import InputError

logger = logging.getLogger(__name__)

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}
"""Suffix of a file -> what of ``datasets`` reads it; a ``.txt`` file has one sample a line."""
CONVERSATION_COLUMNS = ("messages", "conversations")
DataFiles = str | list[str] | dict[str, str]
Rows = Any
"""A ``datasets.Dataset``: rows in an Arrow file that is mapped, not held."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from, and how much of it is used."""

    dataset_name: str | None
    dataset_config_name: str | None
    data_files: DataFiles | None
    split: str
    text_column: str
    max_samples: int | None
    max_length: int
    """Tokens that are kept of a sample."""
    seed: int

    @property
    def subject(self) -> str:
        """What messages call it."""
        return str(self.dataset_name or self.data_files)


def samples_of(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> Iterator[list[int]]:
    """Tokens of a source's samples, shuffled once; rows without two tokens are left out.

    Args:
        source: Where from, and how many.
        tokenizer: Of the model; its chat template renders conversations.
        cache_dir: Where ``datasets`` keeps what it made of local files.

    Raises:
        InputError: Nothing there, unreadable, or no column that can be used.
    """
    rows = read_rows(source, cache_dir)
    column = text_column(rows.column_names, source)
    found = 0
    for row in rows.shuffle(seed=source.seed):
        if found == source.max_samples:
            return
        tokens = _tokens(row[column], column, source, tokenizer)
        if len(tokens) > 1:
            found += 1
            yield tokens
    if not found:
        raise InputError(source.subject, f"column {column!r} has no text. Give text to train on.")


def text_column(columns: Sequence[str], source: TextSource) -> str:
    """The column to read: ``text_column``, else one that is called like conversations.

    Raises:
        InputError: There is none.
    """
    for name in (source.text_column, *CONVERSATION_COLUMNS):
        if name in columns:
            return name
    raise InputError(
        source.subject,
        f"there is no column {source.text_column!r}: found {', '.join(columns) or 'none'}. "
        "Set text_column to the one that holds text or conversations.",
    )


def _tokens(
    value: object, column: str, source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, list):
        text, is_plain = _rendered(value, column, source, tokenizer), False
    elif isinstance(value, str):
        text, is_plain = value, True
    else:
        raise InputError(
            source.subject,
            f"column {column!r} holds {type(value).__name__}, neither text nor conversations. "
            "Set text_column to another one.",
        )
    # Chat templates write the special tokens themselves.
    encoded = tokenizer(
        text, truncation=True, max_length=source.max_length, add_special_tokens=is_plain
    )
    return encoded["input_ids"]


def _rendered(
    messages: list[Any], column: str, source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A conversation as the model's chat template writes it."""
    if not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise InputError(
            source.subject,
            f"column {column!r} holds lists whose items are no messages with 'role' and "
            f"'content', e.g. {str(messages[:1])[:80]}. Rename their keys.",
        )
    if tokenizer.chat_template is None:
        raise InputError(
            source.subject,
            f"column {column!r} holds conversations, but the model's tokenizer has no chat "
            "template. Give plain text, or a model with a template.",
        )
    given = [{key: value for key, value in m.items() if value is not None} for m in messages]
    return tokenizer.apply_chat_template(given, tokenize=False)


def read_rows(source: TextSource, cache_dir: Path) -> Rows:
    """All rows of a source.

    Raises:
        InputError: No such file or dataset, an unknown kind, unreadable, or without rows.
    """
    import datasets  # noqa: PLC0415 - takes a second

    try:
        with _no_progress_bars():
            rows = _load(source, cache_dir)
    except (
        OSError,
        HTTPError,
        ValueError,
        StopIteration,  # of a JSON file that holds nothing but blanks
        datasets.exceptions.DatasetsError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(source.subject, _why(source, error)) from error
    if not len(rows):
        raise InputError(source.subject, "there are no rows. Give text to train on.")
    logger.info("training text: %s, %d rows", source.subject, len(rows))
    return rows


def _load(source: TextSource, cache_dir: Path) -> Rows:
    import datasets  # noqa: PLC0415 - takes a second

    if source.dataset_name is not None:
        return datasets.load_dataset(
            source.dataset_name,
            source.dataset_config_name,
            data_files=source.data_files,
            split=source.split,
        )
    files = _files(source)
    kinds = {kind_of(path) for path in files}
    if len(kinds) > 1:
        raise InputError(
            source.subject, f"files of {len(kinds)} kinds ({', '.join(sorted(kinds))}). Give one."
        )
    return datasets.load_dataset(
        kinds.pop(), data_files=source.data_files, split=source.split, cache_dir=str(cache_dir)
    )


def _files(source: TextSource) -> list[str]:
    """Every file that ``data_files`` names, patterns resolved."""
    given = source.data_files
    names = [given] if isinstance(given, str) else list(given or ())
    names = list(given.values()) if isinstance(given, dict) else names
    files = []
    for name in names:
        is_plain = "://" in name or Path(name).exists()
        found = [name] if is_plain else glob.glob(name, recursive=True)  # noqa: PTH207 - any root
        if not found:
            raise InputError(name, "there is no such file. Check data_files.")
        if directories := [path for path in found if Path(path).is_dir()]:
            raise InputError(directories[0], "is a directory. Name the files in data_files.")
        if empty := [path for path in found if "://" not in path and not Path(path).stat().st_size]:
            raise InputError(empty[0], "the file is empty. Give text to train on.")
        files += found
    return files


def kind_of(path: str) -> str:
    """What of ``datasets`` reads a file, by its suffix, looking through ``.gz``.

    Raises:
        InputError: Nothing does.
    """
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise InputError(path, f"{suffix or 'no suffix'} is not supported. Use one of {known}.")
    return BUILDERS[suffix]


def _why(source: TextSource, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error.__cause__ or error}"
    if source.dataset_name is None:
        return f"cannot be read ({reason}). Check that contents fit the suffix, and train_split."
    return (
        f"the dataset cannot be had ({reason}). Check dataset_name, dataset_config_name and "
        "train_split, or give local files as data_files."
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils.tqdm import (  # noqa: PLC0415 - takes a second
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
