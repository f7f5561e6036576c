"""Where a model's weights lie: a directory of safetensors files, read tensor by tensor."""

import hashlib
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from onecomp.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "*.py"]
HASHED_SLICES = 64
SLICE_BYTES = 65536
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What Transformers and the model classes raise for values in config.json that cannot be."""


class StoredTensor(NamedTuple):
    """What the header of a weight file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, e.g. ``BF16``."""


@dataclass(frozen=True)
class ModelSource:
    """A model directory whose tensors are read one by one; nothing is kept open or cached."""

    model_id: str
    """What the user gave: a directory or a Hub id."""
    directory: Path
    trust_remote_code: bool = False

    @classmethod
    def open(cls, model_id: str | Path, *, trust_remote_code: bool = False) -> "ModelSource":
        """Find the model and check that every weight file is whole.

        Args:
            model_id: Local directory or Hub id. A Hub id is downloaded to the Hub's cache.
            trust_remote_code: Allow the model's own Python code to run.

        Raises:
            InputError: No such model, no safetensors, or a corrupt file.
        """
        source = cls(str(model_id), _find_directory(str(model_id)), trust_remote_code)
        if not (source.directory / "config.json").is_file():
            raise InputError(
                source.directory,
                "holds no config.json, so it is not a Hugging Face model. "
                "Give a directory written by save_pretrained, or a Hub id.",
            )
        _ = source.tensor_files, source.config
        return source

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, without any quantization of its own."""
        try:
            config = AutoConfig.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code
            )
        except CONFIG_ERRORS as error:
            raise InputError(
                self.directory / "config.json",
                f"cannot be read as a model configuration ({reason(error)}). "
                "Correct it, or download the model again.",
            ) from error
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                self.directory,
                "is already quantized (config.json has quantization_config). "
                "Give the original model.",
            )
        return config

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """File of every tensor by the tensor's name.

        Raises:
            InputError: No safetensors files, one that is listed is missing, or one is corrupt.
        """
        return {name: path for path in self._weight_files() for name in _tensor_names(path)}

    def _weight_files(self) -> list[Path]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            files = [self.directory / name for name in _indexed_files(index)]
        else:
            files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise InputError(
                self.directory,
                "holds no .safetensors files; other weight formats are not read. "
                "Save the model with save_pretrained(..., safe_serialization=True) first.",
            )
        for path in files:
            if not path.is_file():
                raise InputError(
                    path, f"is listed in {INDEX_NAME} but missing. Download the model again."
                )
        return files

    def headers(self) -> dict[str, StoredTensor]:
        """Shape and dtype of every tensor by its name; reads no weight.

        Raises:
            InputError: A file that cannot be read.
        """
        paths = sorted(set(self.tensor_files.values()))
        return {name: tensor for path in paths for name, tensor in _read_header(path).items()}

    def read(self, names: Iterable[str], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, cast to ``dtype`` where they are floating point.

        Raises:
            InputError: A name that no file holds, or a file that cannot be read.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of(name)].append(name)
        tensors: dict[str, Tensor] = {}
        for path, members in by_file.items():
            tensors.update(_read_file(path, members))
        return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last - 1`` of a tensor, as they are stored, on the CPU.

        Raises:
            InputError: A name that no file holds, or a file that cannot be read.
        """
        with _opened(self._file_of(name)) as file:
            return file.get_slice(name)[first:last]

    def _file_of(self, name: str) -> Path:
        if name not in self.tensor_files:
            raise InputError(
                self.directory,
                f"has no tensor '{name}', which its architecture ({self.config.model_type}) needs. "
                "The weights belong to another model, or the download is incomplete.",
            )
        return self.tensor_files[name]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of configuration, headers, sizes and evenly spaced slices of every weight file.

        Reading all of a model of hundreds of gigabytes would cost minutes; 64 slices of 64 KiB a
        file notice any retrained or converted copy.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in sorted(set(self.tensor_files.values())):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            _hash_slices(path, digest)
        return digest.hexdigest()


def reason(error: Exception) -> str:
    """Kind and beginning of another library's error, on one line; some list all they know."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def _find_directory(model_id: str) -> Path:
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise InputError(model_id, "is a file. Give the model's directory or a Hub id.")
    return download_model(model_id)


def download_model(model_id: str, *, local_files_only: bool = False) -> Path:
    """Directory of a Hub model, in the Hub's cache.

    Args:
        model_id: Hub id.
        local_files_only: Do not ask the Hub; take what the cache has.

    Raises:
        InputError: There is no such model, or the Hub cannot be reached.
    """
    try:
        return Path(
            snapshot_download(
                model_id, allow_patterns=DOWNLOADED, local_files_only=local_files_only
            )
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            model_id,
            "is not a directory, and the Hub has no such model or cannot be reached "
            f"({type(error).__name__}). Check the path, or download the model first.",
        ) from error


def _indexed_files(index: Path) -> list[str]:
    """Names of the weight files that an index lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map must give a file name for every tensor")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            index,
            f"is not an index of weight files ({reason(error)}). It must be JSON "
            'whose "weight_map" gives the file of every tensor. Download the model again.',
        ) from error
    return sorted(names)


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            path, f"is truncated or corrupt ({error}). Download or save the file again."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A weight file; what goes wrong while it is read is told with its name."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"cannot be read ({error}).") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(tuple(tensor.get_shape()), tensor.get_dtype())
            for name, tensor in slices.items()
        }


def _read_file(path: Path, names: list[str]) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _hash_slices(path: Path, digest: "hashlib._Hash") -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(header_bytes))
        step = max(SLICE_BYTES, (size - SLICE_BYTES) // HASHED_SLICES)
        for offset in range(8 + header_bytes, size, step):
            file.seek(offset)
            digest.update(file.read(SLICE_BYTES))
