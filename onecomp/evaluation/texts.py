"""Text to score a model on: a local file or a dataset of the Hub, as rows and as tokens."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
from huggingface_hub.errors import HTTPError  # the base of the client's transport errors
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onecomp.errors import InputError

TEXT_COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A dataset of the Hub, as ``datasets`` names it."""

    dataset_name: str
    dataset_config: str | None
    split: str
    max_samples: int | None


def load_texts(
    dataset_name: str,
    dataset_config: str | None = None,
    *,
    split: str = "test",
    max_samples: int | None = None,
) -> list[str]:
    """Rows of a text, in order; no code of the dataset is run.

    Args:
        dataset_name: A file (tables such as ``.jsonl``, ``.csv`` and ``.parquet`` give their column
            ``text``; any other file is one row), a dataset of the Hub, ``wikitext2``
            (wikitext-2-raw-v1 in ``split``) or ``c4`` (the first 1,100 documents of the validation
            file, or ``max_samples``; ``split`` does not count).
        dataset_config: Configuration of a Hub dataset; for ``allenai/c4`` the data file.
        split: Split of a Hub dataset.
        max_samples: Rows to take from the start; None takes all.

    Raises:
        InputError: A missing or unreadable file, a dataset that cannot be had, or no text in it.
    """
    if _is_local(dataset_name):
        rows = _read_file(Path(dataset_name).expanduser())[:max_samples]
    else:
        rows = _read_hub(_hub_text(dataset_name, dataset_config, split, max_samples))
    if not any(row.strip() for row in rows):
        raise InputError(dataset_name, "holds no text. Give a file or a dataset with text in it.")
    return rows


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, source: str = "text"
) -> Int[Tensor, "tokens"]:
    """Tokens of the rows joined by blank lines, in one call, so that a BOS token comes once.

    Args:
        tokenizer: The model's tokenizer.
        texts: Rows.
        source: What the error names.

    Raises:
        InputError: Fewer than two tokens, so that there is nothing to predict.
    """
    # verbose: a text longer than the model's context is what windows are for, not a mistake.
    encoded = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)
    input_ids = encoded.input_ids[0]
    if len(input_ids) < 2:
        raise InputError(
            source,
            f"has {len(input_ids)} token(s); a prediction needs at least 2. Use a longer text.",
        )
    return input_ids


def _is_local(dataset_name: str) -> bool:
    path = Path(dataset_name).expanduser()
    looks_like_path = dataset_name.startswith((".", "~")) or path.is_absolute()
    return path.is_file() or path.suffix in {".txt", *TABLES} or looks_like_path


def _hub_text(
    dataset_name: str, dataset_config: str | None, split: str, max_samples: int | None
) -> HubText:
    """What a name means on the Hub, shorthands resolved."""
    if dataset_name == "wikitext2":
        dataset_name, dataset_config = "Salesforce/wikitext", "wikitext-2-raw-v1"
    elif dataset_name == "c4":
        # GPTQ's evaluation: the first 1,100 documents of the first validation file.
        dataset_name, dataset_config = "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"
        split, max_samples = "train", 1100 if max_samples is None else max_samples
    return HubText(
        dataset_name=dataset_name,
        dataset_config=dataset_config,
        split=split,
        max_samples=max_samples,
    )


def _read_hub(source: HubText) -> list[str]:
    import datasets  # noqa: PLC0415 - takes a second, and few runs need it

    # A dataset given by data files has the single split "train".
    is_c4 = source.dataset_name == "allenai/c4"
    which = {"data_files" if is_c4 else "name": source.dataset_config}
    try:
        rows = datasets.load_dataset(source.dataset_name, split=source.split, **which)
    except (
        OSError,
        ValueError,
        RuntimeError,
        HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        # RuntimeError: a dataset that comes as code.
        raise InputError(
            source.dataset_name,
            f"cannot be had from the Hub ({type(error).__name__}: {error}). Check the name, "
            f"configuration {source.dataset_config!r} and split {source.split!r}, "
            "or give a local text file.",
        ) from error
    if TEXT_COLUMN not in rows.column_names:
        raise InputError(
            source.dataset_name,
            f"has the columns {', '.join(rows.column_names)}, but no {TEXT_COLUMN!r}. "
            "Use another dataset, or write the text to a local file.",
        )
    return _texts(rows[: source.max_samples][TEXT_COLUMN])


def _texts(values: Iterable[object]) -> list[str]:
    """Cells of a column as text; an empty cell is an empty row."""
    return ["" if value is None else str(value) for value in values]


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(path, "there is no such file. Check the path.")
    try:
        return TABLES.get(path.suffix, _read_whole)(path)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            path,
            f"cannot be read as {path.suffix or 'text'} with a column {TEXT_COLUMN!r} "
            f"({type(error).__name__}: {error}). Repair it, or give a UTF-8 .txt file.",
        ) from error


def _read_whole(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_jsonl(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return _texts(json.loads(line)[TEXT_COLUMN] for line in lines if line.strip())


def _read_csv(path: Path) -> list[str]:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    with path.open(encoding="utf-8", newline="") as lines:
        return _texts(row[TEXT_COLUMN] for row in csv.DictReader(lines, dialect=dialect))


def _read_parquet(path: Path) -> list[str]:
    table = pyarrow.parquet.read_table(path, columns=[TEXT_COLUMN])
    return _texts(table.column(TEXT_COLUMN).to_pylist())


TABLES: dict[str, Callable[[Path], list[str]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers of the column ``text`` by suffix; any other file is read whole."""
