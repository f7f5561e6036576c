"""What a model or a directory held before, to compare with what it holds now."""

from pathlib import Path

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Last parts of the names of all tensors that are not what they were, bit by bit."""
    now = model.state_dict()
    assert list(now) == list(before)
    return {name.rpartition(".")[2] for name in now if not torch.equal(now[name], before[name])}


def files_of(directory: Path) -> dict[str, bytes]:
    """Bytes of all files, by their path in the directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def weights_of(directory: Path) -> dict[str, bytes]:
    """The same of safetensors files alone."""
    files = files_of(directory)
    return {name: files[name] for name in files if name.endswith(".safetensors")}
