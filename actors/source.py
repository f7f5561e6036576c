"""Whether every node runs the same code: the digest of what is installed."""

import functools
import hashlib
import socket
from importlib.util import find_spec
from pathlib import Path

from onecomp.errors import InputError

PACKAGES = ("actors", "cluster", "onecomp")
SUFFIXES = {".css", ".html", ".j2", ".js", ".json", ".py", ".yaml", ".yml"}
"""Code and what it reads from its package; not compiled files, nor what an editor leaves."""


@functools.cache
def source_digest() -> str:
    """SHA-256, in hexadecimal, over the installed files of our packages and their names.

    The first answer stands: it is what this process imported, whatever happens to the files later.
    """
    return digest_of([package_folder(name) for name in PACKAGES])


def digest_of(folders: list[Path]) -> str:
    """SHA-256 over the names and contents of the files in ``folders``, in a fixed order."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
            name = path.relative_to(folder.parent).as_posix()
            total.update(f"{name}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def package_folder(name: str) -> Path:
    """Where a package would be imported from.

    Raises:
        InputError: It is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(name, f"is not installed on {socket.gethostname()}. Install onecomp-ray.")
    return Path(spec.submodule_search_locations[0])


def require_same_source(expected: str) -> None:
    """Check that this process runs the code with the digest ``expected``.

    Raises:
        InputError: It does not; names the node's host.
    """
    found = source_digest()
    if found != expected:
        raise InputError(
            f"node {socket.gethostname()}",
            f"runs another version of onecomp (digest {found[:12]} instead of {expected[:12]}). "
            "Install the same version on every node, or submit with --working-dir.",
        )
