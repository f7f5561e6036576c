"""Results on disk: tensors and plain values only, so that reading a file runs no code."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from onecomp.errors import InputError
from onecomp.quantizer.result import QuantizationResult

UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What unpickling raises on bytes that are no pickle, or on a pickle that was cut."""


def save_results(results: Mapping[str, QuantizationResult], filepath: str | Path) -> None:
    """Write results by layer name with ``torch.save``, as tensors and plain values."""
    torch.save(
        {
            name: {"type": type(r).__name__, "tensors": r.tensors(), "values": r.values()}
            for name, r in results.items()
        },
        filepath,
    )


def load_results(filepath: str | Path) -> dict[str, QuantizationResult]:
    """Read what ``save_results`` wrote, with torch's restricted loader.

    Raises:
        InputError: No such file, or a file that is not one of ours (pickled objects included).
        ConfigError: A result class that is not known; import the module that defines it first.
    """
    path = Path(filepath)
    if not path.is_file():
        raise InputError(path, "no such file. Give a file written by save_results.")
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise _not_ours(path, error) from error
    try:
        return {
            name: QuantizationResult.restore(r["type"], r["tensors"], r["values"])
            for name, r in stored.items()
        }
    except (AttributeError, LookupError, TypeError) as error:
        raise _not_ours(path, error) from error


def _not_ours(path: Path, error: Exception) -> InputError:
    return InputError(
        path,
        f"is not a results file of this package ({type(error).__name__}: {error}). "
        "Pickled objects are refused because reading them can run code; "
        "write the file again with save_results.",
    )


def save_statistics(results: Mapping[str, QuantizationResult], filepath: str | Path) -> None:
    """Write time and errors of every layer as JSON."""
    statistics = {name: result.get_statistics() for name, result in results.items()}
    Path(filepath).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")


def statistics_line(result: QuantizationResult) -> str:
    """Time and errors of one layer in words; a dash for what was not measured."""
    return "  ".join(
        f"{name} {'-' if value is None else format(value, '.3e')}"
        for name, value in result.get_statistics().items()
    )
