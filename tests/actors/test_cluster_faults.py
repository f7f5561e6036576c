"""Nodes are lost, drained, cut off or added during a run; its checkpoint stays the same.

Every test has a cluster of its own, so its driver is a function that runs in a process of its own.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cluster_namespaces import NEEDS_NAMESPACES, cut_network, namespaced_nodes
from cluster_nodes import (
    drain_node,
    free_port,
    in_own_process,
    kill_node,
    num_nodes,
    started_head,
    two_nodes,
    wait_until,
)
from memory_limit import NEEDS_LIMITS, limit_process, memory_group
from small_job import assert_same, make, samples, settings, shards, small_skeleton
from tiny_models import save_tiny_model
from worker_settings import worker_settings

from actors.executor import RayExecutor
from cluster.connect import connect
from onecomp.calibration.shards import cut_shards
from onecomp.errors import GaveUpError
from onecomp.executor import LocalExecutor, WorkerCount
from onecomp.losses import Patience
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ
from onecomp.schedule import useful_workers
from onecomp.store import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = 300
MOST_NODES = 3
"""That the autoscaler starts beside the head."""
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""What the node provider of Ray's own tests takes for granted."""


def model_directory(family: str = "llama", **options: object) -> Path:
    """A small model; the fixture of the same purpose is the tests' process's."""
    folder = Path(str(options.pop("folder")))
    return save_tiny_model(family, folder / "model", **options)


def quantize(folder: Path, executor: RayExecutor, num_layers: int = 6) -> list[dict]:
    """One run on workers and one in this process, compared; the first one's journal."""
    skeleton = small_skeleton(lambda *a, **o: model_directory(*a, folder=folder, **o), num_layers)
    found = make(
        settings(skeleton, QEPConfig(), folder / "run"),
        executor,
        shards(),
        Patience(unit_timeout_s=120, retries=3),
    )
    expected = make(settings(skeleton, QEPConfig(), folder / "alone"), LocalExecutor(1), shards())
    assert_same(found, expected)
    return RunDirectory(folder / "run").events("worker")


@contextmanager
def after_blocks(run: Path, count: int, action: Callable[[], object]) -> Iterator[None]:
    """Act, on another thread, as soon as so many blocks are finished."""
    failed: list[BaseException] = []

    def wait_and_act() -> None:
        deadline = time.monotonic() + SECONDS
        while len(RunDirectory(run).events("block")) < count:
            if time.monotonic() > deadline:
                failed.append(AssertionError(f"{run} never had {count} blocks"))
                return
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    yield
    thread.join(SECONDS)
    assert not failed, failed


def changes(events: list[dict], change: str) -> list[dict]:
    return [event for event in events if event["change"] == change]


# A node is killed


def lose_a_node(folder: str) -> None:
    with two_nodes() as (ray_cluster, [_, node]):
        executor = RayExecutor(2)
        with after_blocks(Path(folder, "run"), 1, lambda: kill_node(ray_cluster, node)):
            events = quantize(Path(folder), executor)
    [lost] = changes(events, "lost")
    assert lost["node"] == node.node_id


def test_a_run_goes_on_when_a_node_is_killed(tmp_path):
    in_own_process(lose_a_node, str(tmp_path), seconds=SECONDS)


# A node is drained


def drain_a_node(folder: str) -> None:
    with two_nodes() as (ray_cluster, [_, node]):
        executor = RayExecutor(2)
        notice = lambda: drain_node(ray_cluster.address, node.node_id, 120)  # noqa: E731
        with after_blocks(Path(folder, "run"), 1, notice):
            events = quantize(Path(folder), executor, num_layers=16)
    [left] = changes(events, "left")
    assert left["node"] == node.node_id
    assert not changes(events, "lost")
    assert RunDirectory(Path(folder, "run")).events("recovery") == []


def test_a_node_that_drains_hands_over_and_leaves_without_a_failure(tmp_path):
    in_own_process(drain_a_node, str(tmp_path), seconds=SECONDS)


# A node loses its network


def lose_the_network(folder: str, address: str, other_space: str) -> None:
    connect(address, num_cpus=1)
    executor = RayExecutor(2)
    with after_blocks(Path(folder, "run"), 1, lambda: cut_network(other_space)):
        events = quantize(Path(folder), executor)
    assert len({event["node"] for event in changes(events, "joined")}) == 2
    assert len(changes(events, "lost")) == 1


@NEEDS_NAMESPACES
def test_a_run_goes_on_when_a_node_loses_its_network(tmp_path):
    with namespaced_nodes() as both:
        in_own_process(
            lose_the_network, str(tmp_path), both.address, both.other_space,
            prefix=both.on_head, seconds=SECONDS,
        )  # fmt: skip


# Nodes are added


@contextmanager
def growing_cluster(folder: Path) -> Iterator[str]:
    """Address of a head without GPUs, whose autoscaler starts nodes with one on this machine."""
    port = free_port()
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    trainer = {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}
    config = {
        "cluster_name": "grown",
        "max_workers": MOST_NODES,
        "provider": {
            "type": "external",
            "module": provider,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "trainer": {"resources": trainer, "node_config": {}, "max_workers": MOST_NODES},
        },
        "head_node_type": HEAD_TYPE,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
    }
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
             "worker_start_ray")  # fmt: skip
    config |= {f"{name}_commands": [] for name in empty}
    config |= {"docker": {}, "file_mounts": {}, "cluster_synced_files": [], "auth": {}}
    config |= {"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    option = f"--autoscaling-config={path}"
    with started_head(option, port=port, environment=variables) as address:
        yield address


class HeldUp(RayExecutor):
    """Waits in front of the third block until somebody has joined, or it would be over before."""

    num_asked = 0

    def recruit(self, *, wait: bool = False) -> list[int]:
        self.num_asked += 1
        is_time = self.num_asked > 2 and len(self.workers) < 2
        return super().recruit(wait=wait or is_time)


def grow(folder: str, address: str) -> None:
    connect(address, num_cpus=1)
    executor = HeldUp(WorkerCount(1, MOST_NODES + 1))  # one more than can ever come
    assert executor.describe().startswith("1 to 4 Ray workers (1 GPU each)")
    events = quantize(Path(folder), executor)
    joined = changes(events, "joined")
    assert len({event["node"] for event in joined}) == len(joined) >= 2


def test_a_run_starts_with_the_least_and_grows_as_nodes_come(tmp_path):
    with growing_cluster(tmp_path) as address:
        in_own_process(grow, str(tmp_path), address, seconds=SECONDS)


class Staying(RayExecutor):
    """Keeps its workers when a run is over, for the next one."""

    def stop(self) -> None:
        pass

    def end(self) -> None:
        super().stop()


def shrink(folder: str, address: str) -> None:
    connect(address, num_cpus=1)
    executor = Staying(WorkerCount(1, MOST_NODES))
    executor.start(int)  # any objects
    while len(executor.workers) < MOST_NODES:
        executor.recruit(wait=True)
    wait_until(lambda: num_nodes(address) == 1 + MOST_NODES, SECONDS)

    skeleton = small_skeleton(lambda *a, **o: model_directory(*a, folder=folder, **o))
    one_group = GPTQ(wbits=4, groupsize=64, include_layer_keywords=["down_proj"])
    work = worker_settings(skeleton, one_group, None, 1, Path(folder, "run"))
    executor.limit(useful_workers(1, work.layout.blocks))  # as a session does before it starts
    make(work, executor, cut_shards(samples(), 1))
    assert len(changes(work.run.events("worker"), "joined")) == executor.num_workers == 1
    wait_until(lambda: num_nodes(address) == 2, SECONDS)

    executor.limit(2)  # of the next job
    executor.start(int)
    assert executor.recruit(wait=True)
    executor.end()
    wait_until(lambda: num_nodes(address) == 1, SECONDS)


def test_nodes_go_when_a_run_cannot_use_them_and_when_it_is_over(tmp_path):
    with growing_cluster(tmp_path) as address:
        in_own_process(shrink, str(tmp_path), address, seconds=SECONDS)


# The system kills for memory


def starve(folder: str, everyone: str) -> None:
    """Workers may take next to no more memory from the first block on: the first, or all."""
    over = threading.Event()
    with memory_group(4 << 20) as group, two_nodes():
        executor = RayExecutor(2)

        def limit() -> None:
            limited: list[int] = []
            while not over.wait(0.05) and (everyone == "yes" or not limited):
                joined = changes(RunDirectory(Path(folder, "run")).events("worker"), "joined")
                for pid in [event["pid"] for event in joined if event["pid"] not in limited]:
                    limited.append(pid)
                    limit_process(group, pid)
                    if everyone == "no":
                        break

        with after_blocks(Path(folder, "run"), 1, limit):
            try:
                if everyone == "yes":
                    with pytest.raises(GaveUpError, match="They ran out of memory"):
                        quantize(Path(folder), executor)
                else:
                    assert len(changes(quantize(Path(folder), executor), "lost")) == 1
            finally:
                over.set()
        executor.stop()


@NEEDS_LIMITS
@pytest.mark.parametrize("everyone", ["no", "yes"])
def test_what_is_killed_for_memory_is_tried_once_more(tmp_path, everyone):
    in_own_process(starve, str(tmp_path), everyone, seconds=SECONDS)
