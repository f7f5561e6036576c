"""The actor shell around a worker."""

import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import ray

from actors.source import require_same_source
from cluster.nodes import kernel_memory_kills
from cluster.pool import ActorPlace
from onecomp.executor import timed


class ObjectHolder:
    """A process that holds one plain object.

    Told to end (SIGTERM), it goes on and says so in its receipts: what it holds can be handed
    over before the machine is gone.
    """

    def __init__(self, number: int):
        self._number = number
        self._object: object = None
        self._is_leaving = False
        signal.signal(signal.SIGTERM, self._note_leaving)

    def _note_leaving(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_leaving = True

    def meet(self, digest: str) -> ActorPlace:
        """Say where this is, if it runs the same code as the driver.

        Args:
            digest: The driver's ``source_digest``.
        """
        require_same_source(digest)
        context = ray.get_runtime_context()
        return ActorPlace(
            context.get_node_id(), socket.gethostname(), os.getpid(), context.get_worker_id(),
            kernel_memory_kills(),
        )  # fmt: skip

    def make(
        self, place: ActorPlace, make_object: Callable[..., object], *arguments: object
    ) -> ActorPlace:
        """Hold ``make_object(number, *arguments)`` from now on."""
        self._object = None
        self._object = make_object(self._number, *arguments)
        return place

    def call(
        self, method: str, num_returns: int, after: object, *arguments: object
    ) -> list[object]:
        """Call a method of the object.

        Args:
            method: Its name.
            num_returns: How many values it returns.
            after: Receipt of the call that must have succeeded before.
            *arguments: Of the method.

        Returns:
            Its values and a ``Receipt``.
        """
        del after
        bound = getattr(self._object, method)
        return timed(bound, arguments, num_returns + 1, is_leaving=self._is_leaving)


WorkerActor = ray.remote(max_restarts=0)(ObjectHolder)
"""Never restarted: its shards are its state, a restarted actor would answer from block 0."""
