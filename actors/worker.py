"""The actor shell around a worker."""

from collections.abc import Callable

import ray


class ObjectHolder:
    """A process that holds one plain object."""

    def __init__(self, number: int):
        self._number = number
        self._object: object = None

    def make(self, make_object: Callable[..., object], *arguments: object) -> None:
        """Hold ``make_object(number, *arguments)`` from now on."""
        self._object = None
        self._object = make_object(self._number, *arguments)

    def call(self, method: str, *arguments: object) -> object:
        """Call a method of the object."""
        return getattr(self._object, method)(*arguments)


WorkerActor = ray.remote(max_restarts=0)(ObjectHolder)
"""Never restarted: its shards are its state, a restarted actor would answer from block 0."""
