"""Ray Train gangs: workers that run one function in step, from the last checkpoint after losses."""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.errors import GangFailedError

CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # each report waits for the next one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""Ray Train's own settings, where the user has not made them."""
READ_EVERY_SECONDS = 0.5
KEPT_CHECKPOINTS = 2
MOST_FAILED_STARTS = 30
"""Ray Train waits a minute for the nodes of a gang each time; an autoscaler may need many."""


@dataclass(frozen=True)
class Member:
    """One worker of a gang, as the function that it runs sees it."""

    rank: int
    world_size: int
    local_rank: int
    """Its number among the workers of its node."""
    restored: Path | None
    """A copy of the last checkpoint, with the files of all ranks; None at the first start."""
    save: Callable[[Callable[[Path], None]], None]
    """Called by all ranks: have each fill a folder; together these are the next checkpoint."""


@dataclass(frozen=True, kw_only=True)
class GangPlan:
    """How many workers, of what size, and what becomes of them."""

    name: str
    """Of its folder in ``folder``; a run that finds checkpoints there goes on from the last."""
    folder: Path
    """Gets the checkpoints; every node sees it."""
    num_workers: int
    cpus_per_worker: float | int = 1
    gpus_per_worker: float | int = 0
    max_failures: int = 3
    """How often lost workers are replaced."""
    timeout_s: int = 1800
    """How long a worker waits for the others at most."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the workers."""
    final_errors: tuple[type[Exception], ...] = ()
    """Errors of the function that another attempt would only repeat."""
    logger_name: str = ""
    """Whose records of rank 0 the driver repeats; empty for none."""


class Board:
    """Where workers leave what the driver is to know; an actor."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._records: list[tuple[str, int, str]] = []

    def fail(self, error: Exception) -> None:
        """Keep the first error."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """What was kept."""
        return self._error

    def post(self, name: str, level: int, message: str) -> None:
        """Keep a log record."""
        self._records.append((name, level, message))

    def take(self) -> list[tuple[str, int, str]]:
        """The records since the last time."""
        taken, self._records = self._records, []
        return taken


def run_gang(loop: Callable[[Any, Member], Any], argument: object, plan: GangPlan) -> Any:
    """Have workers run ``loop(argument, member)`` together, and again after a loss.

    Args:
        loop: Importable on every node.
        argument: The same for all.
        plan: Their number and size.

    Returns:
        What it returned on rank 0.

    Raises:
        GangFailedError: Workers were lost more often than the plan allows, or the function failed.
        Exception: One of ``plan.final_errors``, as a worker raised it.
    """
    board = ray.remote(num_cpus=0)(Board).remote()
    try:
        with _variables_set(CONTROLLER_ENVIRONMENT), _records_repeated(board):
            result = _trainer(loop, argument, plan, board).fit()
    except TrainingFailedError as error:
        _raise_told(board)
        raise GangFailedError(reason_of(error)) from error
    else:
        _raise_told(board)
        return result.return_value
    finally:
        ray.kill(board)


def _trainer(
    loop: Callable[[Any, Member], Any], argument: object, plan: GangPlan, board: ActorHandle
) -> TorchTrainer:
    size: dict[str, float | int] = {"CPU": plan.cpus_per_worker}
    if plan.gpus_per_worker:
        size["GPU"] = plan.gpus_per_worker
    return TorchTrainer(
        _member_loop,
        train_loop_config={"loop": loop, "argument": argument, "plan": plan, "board": board},
        torch_config=TorchConfig(
            backend="nccl" if plan.gpus_per_worker else "gloo", timeout_s=plan.timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.gpus_per_worker > 0,
            resources_per_worker=size,
        ),
        run_config=RunConfig(
            name=plan.name,
            storage_path=str(plan.folder),
            failure_config=FailureConfig(
                max_failures=plan.max_failures, controller_failure_limit=MOST_FAILED_STARTS
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            worker_runtime_env={"env_vars": dict(plan.environment)},
        ),
    )


def _member_loop(config: dict[str, Any]) -> Any:
    """What each worker runs: the function, once it is known that no attempt has settled the run."""
    plan, board = config["plan"], config["board"]
    if ray.get(board.error.remote()) is not None:
        return None
    context = train.get_context()
    with tempfile.TemporaryDirectory() as folder, _records_posted(plan, board):
        member = Member(
            context.get_world_rank(),
            context.get_world_size(),
            context.get_local_rank(),
            _restored(Path(folder)),
            _save,
        )
        try:
            return config["loop"](config["argument"], member)
        except plan.final_errors as error:
            ray.get(board.fail.remote(error))
            raise


def _restored(folder: Path) -> Path | None:
    checkpoint = train.get_checkpoint()
    return None if checkpoint is None else Path(checkpoint.to_directory(str(folder)))


def _save(write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        train.report({}, checkpoint=Checkpoint.from_directory(folder))


def _raise_told(board: ActorHandle) -> None:
    error = ray.get(board.error.remote())
    if error is not None:
        raise error


def reason_of(error: TrainingFailedError) -> str:
    """What became of the workers, in a sentence for each."""
    if not isinstance(error, WorkerGroupError):
        return str(error).strip()
    failures = sorted(error.worker_failures.items())
    return "; ".join(f"rank {rank}: {_last_line(failure)}" for rank, failure in failures)


def _last_line(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1] if lines else ''}"


# Log records of rank 0 are repeated by the driver


class _Posting(logging.Handler):
    def __init__(self, board: ActorHandle):
        super().__init__(logging.INFO)
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Send it; whether it arrives is no reason to wait."""
        self.board.post.remote(record.name, record.levelno, record.getMessage())


@contextmanager
def _records_posted(plan: GangPlan, board: ActorHandle) -> Iterator[None]:
    if not plan.logger_name or train.get_context().get_world_rank():
        yield
        return
    logger, handler = logging.getLogger(plan.logger_name), _Posting(board)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _records_repeated(board: ActorHandle) -> Iterator[None]:
    is_over = threading.Event()

    def repeat() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(READ_EVERY_SECONDS)
            for name, level, message in ray.get(board.take.remote()):
                logging.getLogger(name).log(level, "%s", message)

    listener = threading.Thread(target=repeat, name="gang-records", daemon=True)
    listener.start()
    try:
        yield
    finally:
        is_over.set()
        listener.join()


@contextmanager
def _variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
