"""Where calibration text comes from: built-in datasets, local data, a local cache, the Hub."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from huggingface_hub.errors import HTTPError  # the base of the client's transport errors

from onecomp.calibration.config import C4, SELF, WIKITEXT2, CalibrationConfig
from onecomp.calibration.files import READERS, column_texts, kind_of, read_local
from onecomp.calibration.quality import is_clean_prose
from onecomp.errors import InputError, UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLES = ("ONECOMP_CALIB_CACHE", "CALIB_DATA_ROOT")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """What to ask the Hub for."""

    path: str
    subset: str | None = None
    split: str = "train"
    data_files: str | None = None
    streaming: bool = True
    """Read as far as needed; a small dataset is fetched whole instead and stays in the cache."""


BUILT_IN = {
    C4: HubDataset(path="allenai/c4", data_files="en/c4-train.00001-of-01024.json.gz"),
    WIKITEXT2: HubDataset(path="Salesforce/wikitext", subset="wikitext-2-raw-v1", streaming=False),
}


def load_texts(config: CalibrationConfig) -> Iterator[str]:
    """Documents of ``config.calibration_dataset``, in dataset order, read as they are taken.

    A name is looked up in this order: a built-in dataset (``c4``, ``wikitext2``), an existing
    local path, the local cache, the Hub. The cache is the directory that the environment
    variable ``ONECOMP_CALIB_CACHE`` (else ``CALIB_DATA_ROOT``) names; it holds a directory
    ``NAME`` (data files, or written by ``save_to_disk``) or a file ``NAME.SUFFIX``, for
    example ``c4/c4-train.00001-of-01024.json.gz``, ``wikitext2.parquet`` or
    ``some-org/some-data.jsonl``. Code that comes with a dataset is never run.

    Blank documents are dropped; all but the built-in datasets end after ``max_documents``.

    Raises:
        InputError: Nothing to read, or the Hub cannot be reached.
    """
    name = config.dataset_name
    if name == SELF:
        raise InputError(
            name, "this text is sampled from the model, not read. Use prepare_calibration_samples."
        )
    if config.use_quality_filter and name != C4:
        logger.warning("use_quality_filter is for c4 only: %s is not filtered", name)
    return _not_empty(name, _documents(name, config))


def _documents(name: str, config: CalibrationConfig) -> Iterator[str]:
    if name in BUILT_IN:
        whole = replace(config, max_documents=sys.maxsize)
        cached = _cached(name)
        texts = read_local(cached, whole) if cached else _read_hub(name, BUILT_IN[name], whole)
        return filter(is_clean_prose, texts) if _is_filtered(config) else texts
    local = Path(name).expanduser()
    local = local if local.exists() else _cached(name)
    if local is not None:
        texts = read_local(local, config)
    elif _looks_like_path(name):
        raise InputError(name, "there is no such file or directory. Check the path.")
    else:
        source = HubDataset(path=name, subset=config.dataset_subset, split=config.dataset_split)
        texts = _read_hub(name, source, config)
    return islice(texts, config.max_documents)


def _is_filtered(config: CalibrationConfig) -> bool:
    return config.use_quality_filter and config.dataset_name == C4


def _not_empty(name: str, texts: Iterator[str]) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise InputError(
            name, "holds no usable document: all are blank, too short or filtered out. Give text."
        )
    return chain([first], texts)


def _looks_like_path(name: str) -> bool:
    is_relative_or_absolute = name.startswith((".", "~", os.sep))
    return is_relative_or_absolute or name.count("/") > 1 or kind_of(Path(name)) is not None


def _cached(name: str) -> Path | None:
    """The copy of a dataset in the local cache, if there is one."""
    root = next(
        (os.environ[variable] for variable in CACHE_VARIABLES if os.environ.get(variable)), None
    )
    if root is None:
        return None
    base = Path(root).expanduser() / name
    candidates = [base, *(base.with_name(base.name + suffix) for suffix in READERS)]
    found = next((path for path in candidates if path.exists()), None)
    if found is not None:
        logger.info("calibration text %s is read from the local cache: %s", name, found)
    return found


def _read_hub(name: str, source: HubDataset, config: CalibrationConfig) -> Iterator[str]:
    """Documents of a Hub dataset, with its failures turned into errors that say what to do."""
    import datasets  # noqa: PLC0415 - takes a second, and workers do not need it

    try:
        yield from column_texts(_hub_rows(source), config, name)
    except UserError:
        raise
    except ValueError as error:
        raise InputError(
            name,
            f"the Hub dataset {source.path} cannot be read: {error} Set dataset_subset, "
            "dataset_split or text_key, or give a local file.",
        ) from error
    except (OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise InputError(name, _unreachable(source, error)) from error


def _hub_rows(source: HubDataset) -> Iterable[dict[str, object]]:
    import datasets  # noqa: PLC0415 - takes a second, and workers do not need it

    return datasets.load_dataset(
        source.path,
        source.subset,
        data_files=source.data_files,
        split=source.split,
        streaming=source.streaming,
    )


def _unreachable(source: HubDataset, error: Exception) -> str:
    what = f"{source.path} ({source.data_files or source.subset or source.split})"
    return (
        f"the dataset {what} could not be fetched from the Hub "
        f"({type(error).__name__}: {error}). Without the Hub, calibrate on text sampled from the "
        'model (--calibration-dataset self, CalibrationConfig(calibration_dataset="self")) or on '
        "a local text file (--calibration-dataset FILE.txt, "
        'CalibrationConfig(calibration_dataset="FILE.txt")), or put a copy of the dataset into '
        f"the directory that {CACHE_VARIABLES[0]} names."
    )
