"""Whether a run fits, and which setting to change if it does not."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import psutil

from onecomp.errors import InputError
from onecomp.planning.amounts import Amount, size
from onecomp.planning.estimate import Estimate
from onecomp.planning.hardware import GIB, HardwareTable
from onecomp.resources import Resources, WorkerResources

LEAST_SAMPLES = 16
LEAST_LENGTH = 256
MOST_WORKERS = 1024
NUM_REMEDIES = 3


@dataclass(frozen=True)
class Comparison:
    """Something that a run needs, and what there is of it."""

    needs: str
    """What, and where: ``GPU memory per worker``."""
    holder: str
    """Who has least: ``the smallest GPU``."""
    needed: Amount
    available: Amount

    @property
    def is_short(self) -> bool:
        """Whether there is too little."""
        return self.needed > self.available

    def __str__(self) -> str:
        needed, available = self.needed / GIB, self.available / GIB
        return f"needs {needed:.1f} GiB of {self.needs}, {self.holder} has {available:.1f} GiB"


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


def compare(estimate: Estimate, resources: Resources) -> list[Comparison]:
    """Everything that a run needs and of which it is known how much there is."""
    memory, store = estimate.memory, resources.object_store
    devices = [(w.name, w.device_memory) for w in resources.workers]
    hosts = [(w.name, w.host_memory) for w in resources.workers]
    spilled = None if store is None else store + resources.spill_disk
    stored_in = "object store and spill disk" if resources.spill_disk else "object store"
    compared = [
        _comparison("GPU memory per worker", "GPU", memory.device_bytes, devices),
        _comparison(_host_memory(estimate), "host", memory.host_bytes, hosts),
        _comparison(stored_in, "node", memory.object_store_bytes, [("", spilled)]),
        _comparison("run directory", "disk", memory.run_disk_bytes, [("", resources.run_disk)]),
    ]
    return [comparison for comparison in compared if comparison is not None]


def _host_memory(estimate: Estimate) -> str:
    return "memory" if estimate.settings.in_process else "host memory per worker"


def _comparison(
    needs: str, holder: str, needed: Amount, available: Iterable[tuple[str, Amount | None]]
) -> Comparison | None:
    """With the one that has least; None if nothing is needed, or nothing known."""
    known = [(amount, name) for name, amount in available if amount is not None]
    if not known or not needed:
        return None
    least, name = min(known)
    place = f" ({name})" if name else ""
    return Comparison(needs, f"the smallest {holder}{place}", needed, least)


def shortages(estimate: Estimate, resources: Resources) -> list[Comparison]:
    """Everything that a run needs more of than there is."""
    return [comparison for comparison in compare(estimate, resources) if comparison.is_short]


def in_one_line(compared: Iterable[Comparison]) -> str:
    """What a run needs and what there is, for the log."""
    parts = (f"{size(c.needed)} of {size(c.available)} {c.needs}" for c in compared)
    return ", ".join(parts)


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
    for changes in _changes(estimate, lacks):
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


def _changes(estimate: Estimate, lacks: Collection[str]) -> Iterator[Iterator[Change]]:
    """Ways to need less of what it lacks, each from the smallest change on."""
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
    if not estimate.settings.in_process and _host_memory(estimate) not in lacks:
        yield _more_workers(estimate)  # each with a GPU of its own; memory of a host is shared
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
