"""Whether a run fits, and which setting to change if it does not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from onecomp.errors import InputError
from onecomp.planning.amounts import Amount
from onecomp.planning.estimate import Estimate
from onecomp.planning.hardware import GIB, HardwareTable

LEAST_SAMPLES = 16
LEAST_LENGTH = 256
MOST_WORKERS = 1024
NUM_REMEDIES = 3


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


@dataclass(frozen=True)
class Shortage:
    """Something that a run needs more of than there is."""

    needs: str
    """What, and where: ``GPU memory per worker``."""
    holder: str
    """Who has too little: ``the smallest GPU``."""
    needed: Amount
    available: Amount

    def __str__(self) -> str:
        needed, available = self.needed / GIB, self.available / GIB
        return f"needs {needed:.1f} GiB of {self.needs}, {self.holder} has {available:.1f} GiB"


def free_disk(path: Path) -> int:
    """Free bytes where a directory is or will be."""
    existing = next(place for place in [path, *path.parents] if place.exists())
    return psutil.disk_usage(str(existing)).free


def resources_here(run_dir: Path | None = None) -> Resources:
    """What this process has: its GPU, this machine's memory, the disk of the run directory."""
    device_memory = None
    if torch.cuda.is_available():
        device_memory, _ = torch.cuda.mem_get_info()
    return Resources(
        (WorkerResources("this process", device_memory, psutil.virtual_memory().available),),
        run_disk=None if run_dir is None else free_disk(run_dir),
    )


def resources_of_kind(estimate: Estimate) -> Resources:
    """What the planned kind of device promises; of CPUs, an even share of this machine."""
    hardware, num_workers = estimate.costs.hardware, estimate.num_workers
    if hardware.is_gpu:
        worker = WorkerResources(f"a {hardware.name}", hardware.memory_bytes, None)
    else:
        num_processes = 1 if estimate.settings.in_process else num_workers
        total = hardware.memory_bytes or psutil.virtual_memory().total
        worker = WorkerResources("a worker", None, total / num_processes)
    return Resources((worker,))


def shortages(estimate: Estimate, resources: Resources) -> list[Shortage]:
    """Everything that a run needs more of than there is."""
    memory = estimate.memory
    devices = {w.name: w.device_memory for w in resources.workers}
    hosts = {w.name: w.host_memory for w in resources.workers}
    needs = "memory" if estimate.settings.in_process else "host memory per worker"
    found = [
        _shortage("GPU memory per worker", "GPU", memory.device_bytes, devices.items()),
        _shortage(needs, "host", memory.host_bytes, hosts.items()),
        _shortage(
            "object store", "node", memory.object_store_bytes, [("", resources.object_store)]
        ),
        _shortage("run directory", "disk", memory.run_disk_bytes, [("", resources.run_disk)]),
    ]
    return [shortage for shortage in found if shortage is not None]


def _shortage(
    needs: str, holder: str, needed: Amount, available: Iterable[tuple[str, Amount | None]]
) -> Shortage | None:
    """What the one that has least lacks."""
    known = [(size, name) for name, size in available if size is not None]
    if not known or needed <= min(known)[0]:
        return None
    size, name = min(known)
    place = f" ({name})" if name else ""
    return Shortage(needs, f"the smallest {holder}{place}", needed, size)


def require_fit(
    estimate: Estimate, resources: Resources, table: HardwareTable | None = None
) -> None:
    """Check that a run fits into what there is, before it starts.

    Args:
        estimate: What it needs.
        resources: What there is.
        table: Kinds of GPUs to recommend from.

    Raises:
        InputError: One sentence: what it needs, what there is, which settings would fit.
    """
    if not (found := shortages(estimate, resources)):
        return
    what = " and ".join(map(str, found))
    fits = remedies(estimate, resources, table)
    advice = " or ".join(fits) if fits else "a smaller model or more memory"
    raise InputError(estimate.costs.model.name, f"{what}; use {advice}.")


def remedies(
    estimate: Estimate, resources: Resources, table: HardwareTable | None = None
) -> list[str]:
    """Settings with which the run fits, one changed at a time, with what it needs then."""
    lacks = {shortage.needs for shortage in shortages(estimate, resources)}
    if not lacks:
        return []
    found = []
    for changes in _changes(estimate):
        for text, changed in changes:
            if not shortages(changed, resources):
                found.append(f"{text} ({_needed(changed)})")
                break
    if table is not None and lacks == {"GPU memory per worker"}:
        found += _larger_devices(estimate, table)
    return found[:NUM_REMEDIES]


def _needed(estimate: Estimate) -> str:
    memory = estimate.memory
    return f"{(memory.device_bytes or memory.host_bytes) / GIB:.1f} GiB"


def _larger_devices(estimate: Estimate, table: HardwareTable) -> list[str]:
    """The smallest kind of GPU that would do."""
    needed = estimate.memory.device_bytes / GIB
    sizes = [(d.memory_gib, name) for name, d in table.devices.items() if d.memory_gib]
    enough = sorted(entry for entry in sizes if entry[0] >= needed)
    return [f"GPUs of at least {needed:.0f} GiB, such as {enough[0][1]}"] if enough else []


Change = tuple[str, Estimate]


def _changes(estimate: Estimate) -> Iterator[Iterator[Change]]:
    """Ways to need less, each from the smallest change on."""
    text = estimate.costs.text
    if text is not None:
        yield _halved(
            estimate, "--num-calibration-samples", text.num_samples, LEAST_SAMPLES,
            lambda number: replace(text, num_samples=number),
        )  # fmt: skip
        yield _halved(
            estimate, "--max-length", text.length, LEAST_LENGTH,
            lambda number: replace(text, length=number),
        )  # fmt: skip
    if not estimate.settings.in_process:
        yield _more_workers(estimate)
    if estimate.costs.qep is not None:
        yield iter([("--no-qep", _with_costs(estimate, qep=None))])


def _halved(
    estimate: Estimate, option: str, number: int, least: int, changed: Callable[[int], object]
) -> Iterator[Change]:
    while (number := number // 2) >= least:
        yield f"{option} {number}", _with_costs(estimate, text=changed(number))


def _more_workers(estimate: Estimate) -> Iterator[Change]:
    number = estimate.num_workers
    while (number := number * 2) <= MOST_WORKERS:
        yield f"--num-workers {number}", _with_costs(estimate, num_workers=number)


def _with_costs(estimate: Estimate, **changes: object) -> Estimate:
    return replace(estimate, costs=replace(estimate.costs, **changes))
