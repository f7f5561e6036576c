"""The Executor on real Ray workers: what the library sees of them."""

import pickle

import psutil
import pytest
import ray
import torch
from shared_cluster import NUM_WORKERS, Clerk

from actors.executor import RayExecutor, may_have_gpus, ray_is_wanted
from cluster.nodes import Capacity, Growth, NodeShape
from onecomp.errors import ConfigError, InputError, LayerError, WorkerError
from onecomp.executor import default_executor

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

MEGABYTE = 2**20


@pytest.fixture
def clerks(ray_executor: RayExecutor) -> RayExecutor:
    """Three Clerks with an empty log."""
    ray_executor.start(Clerk)
    return ray_executor


def test_calls_of_a_worker_run_in_the_order_of_their_coming(clerks):
    refs = [ref for value in range(1, 30) for ref in clerks.submit(1, "note", value)]
    assert clerks.fetch(refs)[-1] == list(range(30))
    assert clerks.fetch(clerks.submit(0, "note", 7)) == [[0, 7]]


def test_starting_again_makes_new_objects_in_the_same_processes(clerks):
    before = clerks.fetch([r for n in range(NUM_WORKERS) for r in clerks.submit(n, "process_id")])
    assert len(set(before)) == NUM_WORKERS
    clerks.start(Clerk, 5)
    after = clerks.fetch([r for n in range(NUM_WORKERS) for r in clerks.submit(n, "process_id")])
    assert after == before
    assert clerks.fetch(clerks.submit(0, "note", 6)) == [[5, 6]]


def test_values_go_from_worker_to_worker_without_the_driver(clerks):
    [pair, count] = clerks.submit(0, "halves", MEGABYTE, num_returns=2)
    before = clerks.driver_bytes
    assert clerks.fetch(clerks.submit(2, "checksum", pair)) == [MEGABYTE / 2]
    assert clerks.fetch([count]) == [MEGABYTE]
    assert 0 < clerks.driver_bytes - before < 100
    [tensor] = clerks.fetch([pair])
    assert clerks.driver_bytes - before > 4 * MEGABYTE
    assert tensor.sum() == MEGABYTE / 2


def test_arguments_of_the_driver_are_counted(clerks):
    before = clerks.driver_bytes
    value = torch.ones(MEGABYTE)
    clerks.fetch(clerks.submit(0, "checksum", value))
    size = len(pickle.dumps(value))
    assert size <= clerks.driver_bytes - before < size + 100


def test_a_tensor_that_was_handed_on_is_shared_and_stays_as_it_was(clerks):
    [tensor] = clerks.submit(0, "ones", MEGABYTE)
    sums = [clerks.submit(worker, "checksum", tensor)[0] for worker in range(NUM_WORKERS)]
    assert clerks.fetch(sums) == [MEGABYTE] * NUM_WORKERS
    [file] = clerks.fetch(clerks.submit(1, "backing_file", tensor))
    assert file.startswith(("/dev/shm/", "/tmp/"))


def test_quantizing_leaves_shared_tensors_as_they_are(clerks):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 640, generator=generator) for n in (700, 500))
    [statistics] = clerks.submit(0, "statistics", rows, rows + 0.1 * rows.roll(1))
    [shared] = clerks.submit(0, "same", weight)
    before = clerks.fetch(
        [*clerks.submit(1, "checksums", statistics), *clerks.submit(1, "checksum", shared)]
    )
    codes = [clerks.submit(1, "quantize", shared, statistics)[0] for _ in range(2)]
    equal, [file] = (
        clerks.fetch(clerks.submit(2, "equal", *codes)),
        clerks.fetch(clerks.submit(1, "backing_file", shared)),
    )
    assert equal == [True]
    assert file
    after = clerks.fetch(
        [*clerks.submit(1, "checksums", statistics), *clerks.submit(1, "checksum", shared)]
    )
    assert after == before


def test_values_are_freed_when_the_driver_forgets_them(clerks):
    references = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    clerks.fetch(clerks.submit(0, "note", 1))
    before = len(references())
    refs = [clerks.submit(0, "ones", MEGABYTE)[0] for _ in range(4)]
    clerks.fetch(clerks.submit(0, "note", 2))
    assert len(references()) >= before + 4
    del refs
    assert len(references()) <= before


def test_errors_arrive_with_their_type_and_fields(clerks):
    with pytest.raises(LayerError) as caught:
        clerks.fetch(clerks.submit(0, "fail", "model.layers.0"))
    assert caught.value.layer_name == "model.layers.0"
    assert str(caught.value) == "model.layers.0: its weight holds 3 NaN"
    with pytest.raises(KeyError, match="no such thing"):
        clerks.fetch(clerks.submit(1, "misuse"))


def test_an_error_is_handed_on_to_whoever_waits_for_the_value(clerks):
    [failed] = clerks.submit(0, "fail", "layer")
    with pytest.raises(LayerError, match="layer: its weight"):
        clerks.fetch(clerks.submit(1, "checksum", failed))


def test_an_error_of_making_the_object_is_raised_by_start(ray_executor):
    with pytest.raises(LayerError, match="first: -1 is negative"):
        ray_executor.start(Clerk, -1)


def test_workers_compute_on_one_thread(clerks):
    assert clerks.fetch(clerks.submit(0, "num_threads")) == [1]


def test_a_lost_worker_is_named_with_what_it_did(clerks):
    executor = RayExecutor(1)
    try:
        executor.start(Clerk)
        [lost] = executor.submit(0, "die")
        with pytest.raises(WorkerError) as caught:
            executor.fetch([lost])
        assert (caught.value.worker, caught.value.doing) == (0, "die")
        with pytest.raises(WorkerError, match="worker 0 was lost while it did note"):
            executor.fetch(executor.submit(0, "note", 1))
        with pytest.raises(WorkerError, match="checksum"):  # whoever waits for its values
            clerks.fetch(clerks.submit(1, "checksum", lost))
        assert clerks.fetch(clerks.submit(1, "note", 1)) == [[0, 1]]
    finally:
        executor.stop()


def test_the_executor_says_what_its_workers_are(clerks):
    assert clerks.describe() == f"{NUM_WORKERS} Ray workers (CPU only) on 1 node(s)"


@pytest.mark.usefixtures("ray_executor")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster has GPUs here")
def test_workers_are_on_cpus_where_the_cluster_has_no_gpus():
    assert ray_is_wanted(None)  # this process is connected
    executor = default_executor(2, gpus_per_worker=4.0)
    try:
        assert executor.describe() == "2 Ray workers (CPU only) on 1 node(s)"
    finally:
        executor.stop()


@pytest.mark.usefixtures("ray_executor")
def test_more_gpus_than_there_can_be_is_refused(monkeypatch):
    node = NodeShape(num_cpus=4, num_gpus=2)
    growth = Growth(((NodeShape(num_cpus=8, num_gpus=1), 3),), max_nodes=3)
    capacity = Capacity(nodes=(node,), head=node, growth=growth)
    monkeypatch.setattr("actors.executor.cluster_capacity", lambda: capacity)
    with pytest.raises(ConfigError) as caught:
        RayExecutor(6)
    assert str(caught.value) == (
        "RayExecutor: 6 workers with 1 GPUs each are asked for, but the cluster has 2 GPUs and can "
        "never hold more than 5 such workers. Lower --num-workers or --gpus-per-worker, or add "
        "nodes."
    )


@pytest.mark.parametrize(
    ("gpus", "growth", "is_elastic", "expected"),
    [
        (2, Growth(), False, True),
        (0, Growth(), True, False),
        (0, Growth(((NodeShape(num_cpus=8, num_gpus=1), 3),), 3), False, True),
        (0, None, False, False),
        (0, None, True, True),
    ],
)
def test_workers_have_gpus_where_there_are_or_will_be_some(gpus, growth, is_elastic, expected):
    node = NodeShape(num_cpus=4, num_gpus=gpus)
    assert may_have_gpus(Capacity((node,), node, growth), is_elastic=is_elastic) is expected


def test_every_port_of_a_local_cluster_is_on_the_loopback_device(clerks):
    cluster = psutil.Process().children(recursive=True)
    listening = [
        connection.laddr.ip
        for process in cluster
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= NUM_WORKERS
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
    assert clerks.fetch(clerks.submit(0, "node_address")) == ["127.0.0.1"]


@pytest.mark.usefixtures("ray_executor")
def test_a_cluster_that_cannot_be_joined_is_bad_input_with_one_remedy():
    with pytest.raises(InputError) as caught:
        RayExecutor(1, address="127.0.0.1:9")
    message = str(caught.value)
    assert message.startswith("127.0.0.1:9: This process is already in the Ray cluster at ")
    assert message.endswith(" as well. Leave out the address, or start another process.")
