"""Putting a complete checkpoint in its place; what may be replaced, and what may not."""

import os
import shutil
from pathlib import Path

from onecomp.errors import InputError
from onecomp.export.checkpoint import CONFIG

READ_BY_LOADERS = (
    "*config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)
"""Files of an older checkpoint that would be read with a newer one's; any other file stays."""


def require_no_checkpoint(output: Path) -> None:
    """Check that a directory holds no model.

    Raises:
        InputError: It does.
    """
    if (output / CONFIG).exists() or any(output.glob("*.safetensors")):
        raise InputError(
            output,
            "already holds a checkpoint. Give another directory; `onecomp quantize --overwrite` "
            "replaces the checkpoint when the new one is complete.",
        )


def require_directory(path: Path) -> None:
    """Check that ``path`` is a directory that can be written, or can become one.

    Raises:
        InputError: It, or what it lies in, is a file or is closed to this user.
    """
    found = next(parent for parent in (path, *path.parents) if parent.exists())
    if not found.is_dir():
        raise InputError(path, f"cannot be a directory: {found} is a file. Give another path.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(path, f"cannot be written: {found} is closed to this user.")


def require_apart(output: Path | None, run_dir: Path, model: Path) -> None:
    """Check that nothing is written where something else is read.

    Args:
        output: The checkpoint's directory.
        run_dir: The run directory.
        model: Directory of the original model.

    Raises:
        InputError: Two of them are the same, or the first lies in the second.
    """
    model = model.resolve()
    places = [("the run directory", run_dir)]
    places += [] if output is None else [("the output", output)]
    for what, place in places:
        if place.resolve().is_relative_to(model):
            raise InputError(place, f"{what} would lie in the model's own directory ({model}).")
    if output is not None and output.resolve().is_relative_to(run_dir.resolve()):
        raise InputError(output, f"the output would lie in the run directory ({run_dir}).")


def install_checkpoint(staging: Path, output: Path) -> None:
    """Move a complete checkpoint to its place; files of an older one there are removed.

    Interrupted at any point, it leaves no ``config.json``, and can be repeated when ``staging``
    was completed again. Whatever a killed process left half-written in ``staging`` is not moved.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).unlink(missing_ok=True)
    new = [path for path in staging.iterdir() if not path.name.startswith(".")]
    old = {path for pattern in READ_BY_LOADERS for path in output.glob(pattern) if path.is_file()}
    for path in old - {output / new_path.name for new_path in new}:
        path.unlink()
    for path in sorted(new, key=lambda path: (path.name == CONFIG, path.name)):
        shutil.move(path, output / path.name)
    shutil.rmtree(staging)
