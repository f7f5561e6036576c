"""Processes that are killed for memory: by the system, and by Ray's own monitor.

Both need a memory controller of the first kind of control groups, and root. A limit on one process
makes the system kill it. Ray's monitor looks at the topmost group only, which in a container is the
container's: `limited_command` gives a command such a view, and everything it starts the limit.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
MONITOR = {"RAY_memory_monitor_refresh_ms": "100", "RAY_memory_usage_threshold": "0.6"}
"""Variables for the head: kill above 60 % of the limit, looked at ten times a second."""
ENTER = 'mount --bind "$0" {groups} && echo $$ > {groups}/cgroup.procs && exec "$@"'


def can_limit_memory() -> bool:
    """Whether this process may make groups with a limit of their own."""
    return os.geteuid() == 0 and os.access(MEMORY_GROUPS / "memory.limit_in_bytes", os.W_OK)


NEEDS_LIMITS = pytest.mark.skipif(
    not can_limit_memory(), reason="needs root and the memory controller of control groups, v1"
)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group whose processes have ``limit_bytes`` in all; goes when they have ended."""
    group = Path(tempfile.mkdtemp(prefix="limited-", dir=MEMORY_GROUPS))
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        _remove(group)


def _remove(group: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while (group / "cgroup.procs").read_text():
        assert time.monotonic() < deadline, f"processes left in {group}"
        time.sleep(0.1)
    group.rmdir()


def limit_process(group: Path, pid: int) -> None:
    """Put a process into a group; what it holds already does not count, what it takes next does."""
    (group / "cgroup.procs").write_text(str(pid))


def limited_command(group: Path) -> tuple[str, ...]:
    """In front of a command: it and all that it starts are in the group, and see only it."""
    return ("unshare", "--mount", "sh", "-c", ENTER.format(groups=MEMORY_GROUPS), str(group))


def take_memory(num_bytes: int, step_bytes: int = 16 << 20, pause_s: float = 0.02) -> int:
    """Take memory in steps and use it, to be killed on the way."""
    pieces = []
    while sum(map(len, pieces)) < num_bytes:
        pieces.append(b"x" * step_bytes)
        time.sleep(pause_s)
    return len(pieces)
