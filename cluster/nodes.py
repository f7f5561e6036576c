"""Nodes of the connected cluster: what there is, what there can be, who leaves, who ran out."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private.state import state
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ASK_SECONDS = 30
"""For a task on another node, which may have to start a process for it beside busy ones."""
TAIL_BYTES = 1 << 16
RAYS_OWN_LINES = (":job_id:", ":actor_name:", ":task_name:")
"""Ray marks in a log whose lines follow."""
DEFAULT_MAX_WORKERS = 2
"""Of a cluster whose configuration does not say; Ray's own default."""
CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the RuntimeError that torch raises where the system refuses it memory."""


@dataclass(frozen=True)
class NodeShape:
    """What a node has."""

    num_cpus: int | float
    num_gpus: int | float

    def room(self, num_cpus: int | float, num_gpus: int | float) -> int:
        """How many workers of that size one such node holds."""
        pairs = ((self.num_cpus, num_cpus), (self.num_gpus, num_gpus))
        return min(int(have / want + 1e-9) for have, want in pairs if want)


@dataclass(frozen=True)
class Growth:
    """What an autoscaler can start beside the head.

    Args:
        kinds: Kinds of nodes and the most of each.
        max_nodes: The most of all kinds together.
    """

    kinds: tuple[tuple[NodeShape, int], ...] = ()
    max_nodes: int = 0

    def room(self, num_cpus: int | float, num_gpus: int | float) -> int:
        """How many workers of that size all these nodes hold."""
        rooms = sorted(((kind.room(num_cpus, num_gpus), n) for kind, n in self.kinds), reverse=True)
        total, left = 0, self.max_nodes
        for room, most in rooms:
            total += room * min(most, left)
            left -= min(most, left)
        return total


@dataclass(frozen=True)
class Capacity:
    """What a cluster has now, and what it can ever have.

    Args:
        nodes: Nodes that are alive and not leaving.
        head: The head alone.
        growth: None if there may be an autoscaler, but its limits cannot be read.
    """

    nodes: tuple[NodeShape, ...]
    head: NodeShape
    growth: Growth | None

    @property
    def num_cpus(self) -> int | float:
        """CPUs of all nodes that are alive."""
        return sum(node.num_cpus for node in self.nodes)

    @property
    def num_gpus(self) -> int | float:
        """GPUs of all nodes that are alive."""
        return sum(node.num_gpus for node in self.nodes)

    def room_now(self, *, num_cpus: int | float = 0, num_gpus: int | float = 0) -> int:
        """How many workers of that size there is room for; one of the two is more than 0."""
        return sum(node.room(num_cpus, num_gpus) for node in self.nodes)

    def room_ever(self, *, num_cpus: int | float = 0, num_gpus: int | float = 0) -> int | None:
        """How many there can be room for; None if nobody knows."""
        if self.growth is None:
            return None
        grown = self.head.room(num_cpus, num_gpus) + self.growth.room(num_cpus, num_gpus)
        return max(grown, self.room_now(num_cpus=num_cpus, num_gpus=num_gpus))


def cluster_capacity() -> Capacity:
    """Nodes of the connected cluster, and the limits of its autoscaler.

    Ray tells a driver nothing of these limits. They are in the file that the autoscaler was started
    with, which is found by its process on the head. Where there is none, as on Kubernetes, whose
    autoscaler is another container, they are unknown.
    """
    leaving = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"]]
    staying = tuple(shape_of(node["Resources"]) for node in alive if node["NodeID"] not in leaving)
    [head] = [node for node in alive if "node:__internal_head__" in node["Resources"]]
    session = ray.get_runtime_context().get_session_name()
    text = autoscaler_file(session)
    if text is None:
        text = _on_node(head["NodeID"], autoscaler_file, session)
    growth = None if text is None else growth_of(yaml.safe_load(text) or {})
    return Capacity(staying, shape_of(head["Resources"]), growth)


def shape_of(resources: Mapping[str, int | float]) -> NodeShape:
    """Of what Ray says that a node has."""
    return NodeShape(resources.get("CPU", 0), resources.get("GPU", 0))


def autoscaler_file(session_name: str) -> str | None:
    """Configuration of the autoscaler that runs on this machine.

    Returns:
        Empty for a cluster without autoscaler; None if its process is not here or its file cannot
        be read.
    """
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        options = dict(part.removeprefix("--").partition("=")[::2] for part in line)
        is_monitor = any(part.endswith("monitor.py") and "autoscaler" in part for part in line)
        if is_monitor and session_name in options.get("logs-dir", ""):
            return _read(options.get("autoscaling-config"))
    return None


def _read(path: str | None) -> str | None:
    if path is None:
        return ""
    try:
        return Path(path).expanduser().read_text()
    except OSError:
        return None


def growth_of(configuration: Mapping[str, Any]) -> Growth | None:
    """Limits in a file for ``ray up``; empty for an empty file.

    Returns:
        None if a kind of node does not say what it has, as those of one's own machines.
    """
    if not configuration:
        return Growth()
    max_nodes = configuration.get("max_workers", DEFAULT_MAX_WORKERS)
    head = configuration.get("head_node_type")
    kinds = []
    for name, kind in configuration.get("available_node_types", {}).items():
        most = kind.get("max_workers", 0 if name == head else max_nodes)
        if most and not kind.get("resources"):
            return None
        kinds.append((shape_of(kind.get("resources", {})), most))
    return Growth(tuple(kinds), max_nodes) if kinds else None


def draining_nodes() -> dict[str, float]:
    """Nodes that leave: spot notice, scale-down, ``ray drain-node``; by id, in hexadecimal.

    Returns:
        When each will be gone, in seconds since the epoch; infinite if it has no deadline.
    """
    return {node: ms / 1e3 if ms else math.inf for node, ms in state.get_draining_nodes().items()}


def log_tail(node_id: str, worker_id: str | None, pid: int, num_lines: int = 20) -> list[str]:
    """Last lines that a process of a node has written: its standard output, then its errors.

    Args:
        node_id: Where it ran, in hexadecimal.
        worker_id: Ray's id of the process, in hexadecimal; None if ``pid`` has to be enough.
        pid: Its process id.
        num_lines: At most so many.

    Returns:
        Empty if the node is gone, is leaving, or does not answer within `ASK_SECONDS`.
    """
    return _on_node(node_id, read_log, worker_id, pid, num_lines) or []


def read_log(worker_id: str | None, pid: int, num_lines: int) -> list[str]:
    """The same, for a process of the node that this one runs on."""
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    lines: list[str] = []
    for suffix in ("out", "err"):
        for path in sorted(folder.glob(f"worker-{worker_id or '*'}-*-{pid}.{suffix}")):
            text = path.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
            lines += [li for li in text.splitlines() if li and not li.startswith(RAYS_OWN_LINES)]
    return lines[-num_lines:]


def kernel_memory_kills() -> int:
    """Processes that the system of this machine has killed for memory since it started.

    To Ray they look like any killed process. So a worker reports this number when it starts, and
    `kernel_memory_kills_on` tells afterwards whether it has grown.
    """
    try:
        fields = Path("/proc/vmstat").read_text().split()
    except OSError:  # not Linux
        return 0
    return int(fields[fields.index("oom_kill") + 1]) if "oom_kill" in fields else 0


def kernel_memory_kills_on(node_id: str) -> int | None:
    """`kernel_memory_kills` of a node; None if it is gone or does not answer."""
    return _on_node(node_id, kernel_memory_kills)


def was_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for memory: its process was killed by Ray, or it was refused some.

    Ray kills for memory with an error of its own, which is no `RayActorError`, and may choose a
    worker that is not to blame. What the system kills has to be told by `kernel_memory_kills`.
    """
    return any(_is_out_of_memory(cause) for cause in _chain(error))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}  # torch's: not imported here
    return "OutOfMemoryError" in names or CPU_ALLOCATOR in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.cause if isinstance(error, RayTaskError) else error.__cause__


def _on_node(node_id: str, function: Callable[..., Any], *arguments: object) -> Any:
    """What ``function`` returns on a node; None if it does not return within `ASK_SECONDS`."""
    return ask_nodes([node_id], function, *arguments).get(node_id)


def ask_nodes(
    node_ids: Iterable[str],
    function: Callable[..., Any],
    *arguments: object,
    timeout_s: int | float = ASK_SECONDS,
) -> dict[str, Any]:
    """What ``function`` returns on each node; without those that do not answer in time."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for node_id in node_ids:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(*arguments)] = node_id
    if not asked:
        return {}
    done, late = ray.wait([*asked], num_returns=len(asked), timeout=timeout_s)
    for ref in late:
        ray.cancel(ref, force=True)
    answers = {}
    for ref in done:
        with contextlib.suppress(RayError):
            answers[asked[ref]] = ray.get(ref, timeout=timeout_s)
    return answers
