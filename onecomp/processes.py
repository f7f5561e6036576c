"""What tells one process from every other: its machine, and when it began."""

from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


def this_machine() -> str | None:
    """This boot of this machine, as seen from this process's container; None where unknown."""
    try:
        boot = BOOT_ID.read_text().strip()
        return f"{boot} {PID_NAMESPACE.readlink()}"
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in its own unit; None for one that is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
