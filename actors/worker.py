"""The actor shell around a worker."""

from collections.abc import Callable

import ray


@ray.remote(max_restarts=0)  # its shards are its state: a restarted actor would answer from block 0
class WorkerActor:
    """Any plain object on a process of its own.

    Args:
        number: Number of the worker.
        make_worker: Called as ``make_worker(number, *arguments)``.
        *arguments: Its further arguments.
    """

    def __init__(self, number: int, make_worker: Callable[..., object], *arguments: object):
        self._worker = make_worker(number, *arguments)

    def call(self, method: str, *arguments: object) -> object:
        """Call a method of the object."""
        return getattr(self._worker, method)(*arguments)
