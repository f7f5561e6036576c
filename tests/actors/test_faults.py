"""Workers are lost, hang or leave in every phase; the checkpoint is that of an undisturbed run."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sabotage import SabotagedExecutor, Traps
from small_job import Made, assert_same, make, settings, shards, small_skeleton

from onecomp.errors import GaveUpError
from onecomp.executor import LocalExecutor
from onecomp.losses import Patience
from onecomp.models import Skeleton
from onecomp.qep import QEPConfig
from onecomp.store import RunDirectory

pytestmark = pytest.mark.ray

NUM_WORKERS = 2
PATIENCE = Patience(unit_timeout_s=3.0, retries=3)
STRATEGIES = {"full-precision inputs": None, "error propagation": QEPConfig()}


@pytest.fixture(scope="module")
def skeleton(tiny_model_dir: Callable[..., Path]) -> Skeleton:
    return small_skeleton(tiny_model_dir, num_layers=5)


@pytest.fixture(scope="module")
def undisturbed(skeleton, tmp_path_factory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {
        name: make(settings(skeleton, qep, root / name), LocalExecutor(1), shards())
        for name, qep in STRATEGIES.items()
    }


@pytest.fixture(scope="module")
def crew(ray_executor) -> Iterator[SabotagedExecutor]:
    """Two workers, made again for every run; lost ones are replaced."""
    executor = SabotagedExecutor(NUM_WORKERS)
    yield executor
    executor.end()


@pytest.fixture
def traps(crew, tmp_path) -> Traps:
    crew.traps = Traps(tmp_path / "traps")
    return crew.traps


def changes(run: Path, change: str) -> list[dict]:
    return [event for event in RunDirectory(run).events("worker") if event["change"] == change]


@pytest.mark.usefixtures("traps")
def test_an_error_of_the_model_is_no_loss(skeleton, crew, tmp_path):
    work = settings(skeleton, QEPConfig(), tmp_path / "run")
    broken = [replace(shard, input_ids=shard.input_ids + 10**6) for shard in shards()]
    with pytest.raises(IndexError):
        make(work, crew, broken, PATIENCE)
    assert changes(tmp_path / "run", "lost") == []


@dataclass(frozen=True)
class Phase:
    """When a worker is killed: before or after its ``calls``-th call of a method."""

    strategy: str
    when: str
    method: str
    calls: int

    def __str__(self) -> str:
        return f"{self.when} {self.method} {self.calls}, {self.strategy}"


PHASES = [
    Phase("error propagation", "before", "quantize", 6),
    Phase("full-precision inputs", "after", "observe", 6),
]
MORE_PHASES = [
    Phase("error propagation", "before", "hold", 1),
    Phase("error propagation", "before", "begin_block", 3),
    Phase("error propagation", "after", "observe_group", 5),
    Phase("error propagation", "after", "quantize", 8),
    Phase("error propagation", "after", "apply", 3),
    Phase("error propagation", "after", "finish_block", 3),
    Phase("error propagation", "before", "store", 2),
    Phase("error propagation", "after", "store", 3),
    Phase("full-precision inputs", "before", "observe", 3),
    Phase("full-precision inputs", "before", "quantize", 7),
    Phase("full-precision inputs", "after", "finish_block", 4),
    Phase("full-precision inputs", "after", "store", 1),
]
SLOW_PHASES = [pytest.param(phase, marks=pytest.mark.slow) for phase in MORE_PHASES]


@pytest.mark.parametrize("phase", [*PHASES, *SLOW_PHASES], ids=str)
def test_a_worker_killed_in_any_phase_changes_no_byte(
    skeleton, undisturbed, crew, traps, tmp_path, phase
):
    traps.set(phase.method, signal.SIGKILL, when=phase.when, calls=phase.calls)
    work = settings(skeleton, STRATEGIES[phase.strategy], tmp_path / "run")
    made = make(work, crew, shards(), PATIENCE)
    assert traps.left == []
    assert_same(made, undisturbed[phase.strategy])
    assert len(changes(tmp_path / "run", "lost")) == 1
    [recovery] = work.run.events("recovery")
    assert recovery["replayed_shards"] >= 2


@pytest.mark.slow
def test_a_worker_killed_while_another_loss_is_made_good(
    skeleton, undisturbed, crew, traps, tmp_path
):
    traps.set("quantize", signal.SIGKILL, calls=10)
    traps.set("replay_block", signal.SIGKILL)
    work = settings(skeleton, QEPConfig(), tmp_path / "run")
    made = make(work, crew, shards(), PATIENCE)
    assert traps.left == []
    assert_same(made, undisturbed["error propagation"])
    assert len(changes(tmp_path / "run", "lost")) == 2


@pytest.mark.parametrize(
    "method", ["quantize", pytest.param("observe_group", marks=pytest.mark.slow)]
)
def test_a_worker_that_hangs_is_replaced(skeleton, undisturbed, crew, traps, tmp_path, method):
    traps.set(method, signal.SIGSTOP, calls=4)
    work = settings(skeleton, QEPConfig(), tmp_path / "run")
    made = make(work, crew, shards(), PATIENCE)
    assert traps.left == []
    assert_same(made, undisturbed["error propagation"])
    [lost] = changes(tmp_path / "run", "lost")
    assert "no answer for" in lost["reason"]
    assert lost["doing"].startswith(method)


@pytest.mark.parametrize(
    "strategy",
    [
        "full-precision inputs",
        pytest.param("error propagation", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_is_told_to_leave_hands_over_and_nothing_is_replayed(
    skeleton, undisturbed, crew, traps, tmp_path, strategy
):
    traps.set("begin_block", signal.SIGTERM, calls=2)
    work = settings(skeleton, STRATEGIES[strategy], tmp_path / "run")
    made = make(work, crew, shards(), PATIENCE)
    assert_same(made, undisturbed[strategy])
    assert len(changes(tmp_path / "run", "left")) == 1
    assert changes(tmp_path / "run", "lost") == []
    assert work.run.events("recovery") == []
    units = [unit for event in work.run.events("units") for unit in event["units"]]
    methods = [unit["method"] for unit in units]
    assert {"give", "take"} <= set(methods)
    assert "replay_block" not in methods


@pytest.mark.slow
def test_a_run_that_loses_workers_again_and_again_ends_and_can_go_on(
    skeleton, undisturbed, crew, traps, tmp_path
):
    for number in range(3 * NUM_WORKERS):  # enough if all die at once, each time
        path = traps.directory / f"before-begin_block-{number}"
        path.write_text(str(int(signal.SIGKILL)))
    work = settings(skeleton, QEPConfig(), tmp_path / "run")
    with pytest.raises(GaveUpError) as caught:
        make(work, crew, shards(), Patience(unit_timeout_s=3.0, retries=2))
    error = caught.value
    assert (error.block, error.failures) == (0, 3)
    assert "begin_block of block 0" in str(error)
    assert "goes on at this block" in str(error)
    for path in traps.directory.iterdir():
        path.unlink()
    made = make(work, crew, shards(), PATIENCE)
    assert_same(made, undisturbed["error propagation"])
