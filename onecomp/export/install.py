"""Putting a complete checkpoint in its place; what may be replaced, and what may not."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from onecomp.errors import InputError
from onecomp.export.checkpoint import ADAPTER_FOLDER, CONFIG
from onecomp.storage import (
    AnyPath,
    children,
    make_directory,
    move_file,
    remove_tree,
    require_writable,
)

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


def require_no_checkpoint(output: AnyPath) -> None:
    """Check that a directory holds no model.

    Raises:
        InputError: It does.
    """
    if (output / CONFIG).exists() or any(
        path.suffix == ".safetensors" for path in children(output)
    ):
        raise InputError(
            output,
            "already holds a checkpoint. Give another directory; on the command line, --overwrite "
            "replaces the checkpoint when the new one is complete.",
        )


def require_directory(path: AnyPath) -> None:
    """Check that ``path`` is a directory that can be written, or can become one.

    Raises:
        InputError: It, or what it lies in, is a file or is closed to this user.
    """
    if not isinstance(path, Path):
        require_writable(path)
        return
    found = next(parent for parent in (path, *path.parents) if parent.exists())
    if not found.is_dir():
        raise InputError(path, f"cannot be a directory: {found} is a file. Give another path.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(path, f"cannot be written: {found} is closed to this user.")


def require_apart(output: AnyPath | None, run_dir: AnyPath, model: Path) -> None:
    """Check that nothing is written where something else is read.

    Args:
        output: The checkpoint's directory.
        run_dir: The run directory.
        model: Directory of the original model.

    Raises:
        InputError: Two of them are the same, or the first lies in the second.
    """
    places = [("the run directory", run_dir)]
    places += [] if output is None else [("the output", output)]
    for what, place in places:
        if _lies_in(place, model):
            raise InputError(
                place, f"{what} would lie in the model's own directory ({model.resolve()})."
            )
    if output is not None and _lies_in(output, run_dir):
        raise InputError(output, f"the output would lie in the run directory ({run_dir}).")


def _lies_in(inner: AnyPath, outer: AnyPath) -> bool:
    if isinstance(inner, Path) and isinstance(outer, Path):
        return inner.resolve().is_relative_to(outer.resolve())
    if isinstance(inner, Path) or isinstance(outer, Path):
        return False
    return f"{inner}/".startswith(f"{outer}/")


def install_checkpoint(staging: AnyPath, output: AnyPath) -> None:
    """Move a complete checkpoint to its place; files of an older one there are removed.

    Interrupted at any point, it leaves no ``config.json``, and can be repeated when ``staging``
    was completed again. Whatever a killed process left half-written in ``staging`` is not moved.
    The two may lie in different stores.
    """
    make_directory(output)
    (output / CONFIG).unlink(missing_ok=True)
    new = {path.name: path for path in children(staging) if not path.name.startswith(".")}
    for path in children(output):
        if path.name not in new and _is_read_by_loaders(path.name) and path.is_file():
            path.unlink()
    remove_tree(output / ADAPTER_FOLDER)
    for name in sorted(new, key=lambda name: (name == CONFIG, name)):
        if name == ADAPTER_FOLDER:
            make_directory(output / name)
            for path in children(new[name]):
                move_file(path, output / name / path.name)
        else:
            move_file(new[name], output / name)
    remove_tree(staging)


def _is_read_by_loaders(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in READ_BY_LOADERS)
