"""Workers that are killed, stopped or told to leave in the middle of what they do."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
from torch import Tensor

from actors.executor import RayExecutor
from onecomp.post_process.blockwise.tuner import BlockTuner, TunerSettings
from onecomp.worker import Worker, WorkerSettings

METHODS = (
    "hold", "give", "take", "rewind", "begin_block", "observe", "observe_group", "apply",
    "finish_block", "replay_block", "quantize", "store",
)  # fmt: skip


class Traps:
    """Files that say at which call of which method a worker gets which signal."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory

    def set(self, method: str, signal: int, *, when: str = "before", calls: int = 1) -> None:
        """The next ``calls``-th call of the method by any worker springs it.

        Args:
            method: A method of ``Worker``.
            signal: What the worker's process gets.
            when: ``before`` or ``after`` the method has done its work.
            calls: How many calls of it there will be.
        """
        for number in range(calls):
            name = f"{when}-{method}-{number:03d}"
            (self.directory / name).write_text(str(signal if number == calls - 1 else 0))

    def spring(self, when: str, method: str) -> None:
        """Called by workers."""
        for path in sorted(self.directory.glob(f"{when}-{method}-*")):
            claimed = path.with_name(f"sprung-{os.getpid()}-{time.monotonic_ns()}")
            try:
                signal = int(path.read_text())
                path.rename(claimed)
            except FileNotFoundError:  # another worker was faster
                continue
            if signal:
                os.kill(os.getpid(), signal)
            return

    @property
    def left(self) -> list[str]:
        """Traps that nobody has sprung."""
        return sorted(p.name for p in self.directory.iterdir() if not p.name.startswith("sprung"))


class SabotagedWorker(Worker):
    """A worker that looks for traps."""

    def __init__(self, number: int, settings: WorkerSettings, traps: Traps):
        self.traps = traps
        super().__init__(number, settings)


def _trapped(name: str) -> Callable[..., object]:
    def method(self: SabotagedWorker, *arguments: object) -> object:
        self.traps.spring("before", name)
        value = getattr(Worker, name)(self, *arguments)
        self.traps.spring("after", name)
        return value

    return method


for _name in METHODS:
    setattr(SabotagedWorker, _name, _trapped(_name))


class SabotagedTuner(BlockTuner):
    """A worker of block-wise training that looks for traps in front of every gradient."""

    def __init__(self, number: int, settings: TunerSettings, traps: Traps):
        self.traps = traps
        super().__init__(number, settings)

    def gradients(self, position: Mapping[int, int], vector: Tensor) -> dict:
        self.traps.spring("before", "gradients")
        return super().gradients(position, vector)


SABOTAGED = {Worker: SabotagedWorker, BlockTuner: SabotagedTuner}


class SabotagedExecutor(RayExecutor):
    """Makes sabotaged workers, and stays when a run is over."""

    traps: Traps

    def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        super().start(SABOTAGED[make_worker], *arguments, self.traps)

    def stop(self) -> None:
        pass

    def end(self) -> None:
        super().stop()
