"""Where files lie: local paths, and the object stores that fsspec knows, behind the same functions.

A local path is a ``pathlib.Path``. Everything else is a ``UPath``: objects under a URL, without
directories of their own, that are written as a whole, at once or not at all. Its credentials and
its endpoint are fsspec's own configuration in whichever process opens it; they never travel.
"""

import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fsspec.core import split_protocol
from upath import UPath

from onecomp.errors import InputError

AnyPath = Path | UPath
LOCAL = (None, "", "file", "local")
ONE_PROCESS = "memory"
"""Protocol of files that only the process which wrote them sees."""
REFUSED = ("*", "?", "[", "]", "::")
"""What fsspec would take for patterns, or for one file system behind another."""


def open_path(place: str | Path | UPath) -> AnyPath:
    """A path as every process understands it, whatever its working directory.

    Args:
        place: A local path, absolute or not, or any URL that fsspec knows. ``file://`` is local.

    Raises:
        InputError: Nothing can open the URL.
    """
    protocol = None if isinstance(place, Path) else split_protocol(str(place))[0]
    if protocol in LOCAL:
        local = UPath(place).path if protocol else place
        return Path(local).expanduser().absolute()
    url = str(place)
    if found := [sign for sign in REFUSED if sign in url]:
        raise InputError(url, f"holds {' '.join(found)}, which no URL here may.")
    options = dict(place.storage_options) if isinstance(place, UPath) else {}
    options["use_listings_cache"] = False  # what other processes write must be seen
    try:
        path = UPath(url, **options)
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise InputError(
            url,
            f"cannot be opened: {str(error).rstrip('.')}. Give a local path or a URL that fsspec "
            "knows, and install its package on every node (for s3://: pip install "
            "'onecomp-ray[s3]').",
        ) from error
    return path


def children(path: AnyPath) -> list[AnyPath]:
    """What lies directly in a directory, by name; nothing in one that does not exist."""
    try:
        found = [child for child in path.iterdir() if child.name and child != path]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda child: child.name)


def make_directory(path: AnyPath) -> None:
    """Make a local directory with its parents; an object store needs none."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(path: AnyPath) -> None:
    """Check that an object store takes and removes objects under ``path``.

    Raises:
        InputError: It does not; in its own words.
    """
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        create_exclusively(probe, b"")
        probe.unlink()
    except Exception as error:  # each store fails with a class of its own, often no OSError
        raise InputError(
            path,
            f"cannot be written ({type(error).__name__}: {error}). The bucket must exist; "
            "credentials and endpoint come from fsspec's configuration (for s3://: AWS_* "
            "variables), on every node.",
        ) from error


# Whole files


def replacing(path: AnyPath) -> AbstractContextManager[Path]:
    """A temporary local path that takes the place of ``path`` when the body ends without error."""
    return _replacing_file(path) if isinstance(path, Path) else _replacing_object(path)


@contextmanager
def _replacing_file(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def _replacing_object(path: UPath) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="onecomp-") as scratch:
        temporary = Path(scratch) / path.name
        yield temporary
        path.fs.put_file(str(temporary), path.path)


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_exclusively(path: AnyPath, content: bytes) -> None:
    """Write a file that nobody has written yet; of several processes one succeeds.

    On an object store this is a conditional write (S3: ``If-None-Match: *``).

    Raises:
        FileExistsError: It is there already.
    """
    if isinstance(path, Path):
        with path.open("xb") as file:
            file.write(content)
    else:
        path.fs.pipe_file(path.path, content, mode="create")


def read_range(path: AnyPath, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file, fewer where it ends before; nothing else is read."""
    if not isinstance(path, Path):
        return path.fs.cat_file(path.path, start=start, end=end)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def read_files(paths: Sequence[AnyPath]) -> list[bytes]:
    """Contents of files that lie in one store; of an object store's, many at a time."""
    if not paths or isinstance(paths[0], Path):
        return [path.read_bytes() for path in paths]
    contents = paths[0].fs.cat([path.path for path in paths])
    return [contents[path.path] for path in paths]


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """A local file with the contents of ``path``: itself, or a copy for as long as the body."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="onecomp-") as scratch:
        copy = Path(scratch) / path.name
        path.fs.get_file(path.path, str(copy))
        yield copy


@contextmanager
def local_directory(path: AnyPath) -> Iterator[Path]:
    """A local directory with the files of ``path``: itself, or a copy for as long as the body."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="onecomp-") as scratch:
        for child in children(path):
            child.fs.get_file(child.path, str(Path(scratch) / child.name))
        yield Path(scratch)


# Moving and removing


def move_file(source: AnyPath, target: AnyPath) -> None:
    """Move a file, within a store or between them; what was at ``target`` is replaced.

    Interrupted, it leaves the file at its source, at its target, or at both.
    """
    if isinstance(source, Path) and isinstance(target, Path):
        shutil.move(source, target)
        return
    if isinstance(source, UPath) and isinstance(target, UPath) and source.fs == target.fs:
        source.fs.cp_file(source.path, target.path)
    else:
        with local_file(source) as local, replacing(target) as temporary:
            shutil.copyfile(local, temporary)
    source.unlink()


def move_tree(source: AnyPath, target: AnyPath) -> None:
    """Give a file or directory another place in the same store."""
    if isinstance(source, Path):
        source.rename(target)
    elif source.is_file():
        move_file(source, target)
    else:
        for child in children(source):
            move_tree(child, target / child.name)
        remove_tree(source)


def remove_tree(path: AnyPath) -> None:
    """Remove a file, or a directory with everything in it; no error where there is nothing."""
    if isinstance(path, UPath):
        if path.exists():
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class TemporaryPath:
    """A new local directory that is there as long as this object.

    Args:
        prefix: Beginning of its name.
    """

    def __init__(self, prefix: str):
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
