"""What there is for the workers of a run: memory, object store, disk; bytes throughout."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from onecomp.planning.amounts import Amount

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Device memory that a CUDA process takes for itself."""
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of both versions of control groups: limit, use, and the part of it that is given back."""


def device_here(device: str) -> torch.device:
    """The device of a worker in this process.

    Args:
        device: ``auto`` for CUDA where the process sees one, else the CPU.
    """
    use_cuda = device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else device.replace("auto", "cpu"))


@dataclass(frozen=True)
class WorkerResources:
    """What one process of workers has for itself; bytes, None where it is not known."""

    name: str
    """For messages: ``worker 3 on node 10.0.0.7``."""
    device_memory: Amount | None
    """Free memory of its GPU; None without one."""
    host_memory: Amount | None
    """Its share of what the node has free."""


@dataclass(frozen=True)
class Resources:
    """What there is; bytes, None where it is not known."""

    workers: tuple[WorkerResources, ...]
    object_store: Amount | None = None
    """Of the node that has least."""
    run_disk: Amount | None = None
    """Free where the run directory is."""
    spill_disk: Amount = 0
    """For what does not fit into the object store, on the node that has least of both."""
    num_workers: int = 1
    """The least number that the run starts with."""
    has_gpus: bool = False
    """Whether each of them has a GPU, or a part of one."""
    in_process: bool = False
    """They are threads of one process."""


def free_disk(path: Path) -> int:
    """Free bytes where a directory is or will be."""
    existing = next(place for place in [path, *path.parents] if place.exists())
    return psutil.disk_usage(str(existing)).free


def resources_here(run_dir: Path | None = None, num_workers: int = 1) -> Resources:
    """What this process has: its GPU, this machine's memory, the disk of the run directory.

    What the process holds already counts as free: an estimate is of all that it will hold.
    """
    device_memory = None
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        device_memory = free + kept + CUDA_CONTEXT_BYTES
    host_memory = free_host_memory() + psutil.Process().memory_info().rss
    return Resources(
        (WorkerResources("this process", device_memory, host_memory),),
        run_disk=None if run_dir is None else free_disk(run_dir),
        num_workers=num_workers,
        has_gpus=device_memory is not None,
        in_process=True,
    )


def free_host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What this machine has available, or its container, if that has less.

    Args:
        groups: Where the system shows the control group of a container.
    """
    available = psutil.virtual_memory().available
    for limit_file, use_file, given_back in GROUP_FILES:
        limit, use = (_read_number(groups / name) for name in (limit_file, use_file))
        if limit is not None and use is not None:
            cached = _statistics((groups / limit_file).with_name("memory.stat")).get(given_back, 0)
            available = min(available, max(0, limit - use + cached))
    return available


def _read_number(path: Path) -> int | None:
    """The number in a file; None for no file, or for ``max``."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _statistics(path: Path) -> dict[str, int]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
