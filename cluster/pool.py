"""A pool of numbered actors that come and go, and hand values to each other by reference."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from cluster.errors import ActorLostError
from cluster.nodes import was_out_of_memory

Ref = ObjectRef
LOSSES = (RayActorError, ObjectLostError, OutOfMemoryError)
"""The actor that was called is gone, or what another one made of an argument is."""


@dataclass(frozen=True)
class ActorPlace:
    """Where an actor is; the first thing that it tells."""

    node_id: str
    host: str
    pid: int
    worker_id: str
    """Ray's id of the process; its log is named after it."""
    memory_kills: int
    """Processes that the system of its machine had killed for memory until then."""


class Returned(NamedTuple):
    """References of one call."""

    values: list[ObjectRef]
    receipt: ObjectRef


class ActorPool:
    """Numbered actors of one class; calls of one actor run in the order of submission.

    Args:
        actor_class: Made with its number; has the methods ``meet(greeting)``, which returns its
            ``ActorPlace``, ``make(place, function, *arguments)``, which returns the place, and
            ``call(method, num_returns, after, *arguments)``, which returns the method's values and
            a receipt.
        options: Ray's actor options: resources, runtime environment.
    """

    def __init__(self, actor_class: ActorClass, options: dict[str, Any]):
        self.driver_bytes = 0
        self._class, self._options = actor_class, options
        self._actors: dict[int, ActorHandle] = {}
        self._numbers: dict[str, int] = {}
        self.places: dict[int, ActorPlace] = {}
        """Of every actor that has made its object, gone ones included."""
        self._calls: dict[str, str] = {}
        """Method by the Ref's number; never the Ref itself, which would keep its value alive."""

    @property
    def numbers(self) -> list[int]:
        """Actors that were added and not removed."""
        return list(self._actors)

    def add(self) -> int:
        """Ask for one more actor; it may wait for a place. Numbers never recur."""
        number = len(self._numbers)
        actor = self._class.options(**self._options).remote(number)
        self._actors[number] = actor
        self._numbers[actor._actor_id.hex()] = number
        return number

    def share(self, values: Sequence[object], times: int) -> list[ObjectRef]:
        """Put values where every actor finds them.

        Args:
            values: What ``make`` is to be given.
            times: How many actors will read them, for the count of bytes.
        """
        self.driver_bytes += times * sum(_size(value) for value in values)
        return [ray.put(value) for value in values]

    def make(
        self, number: int, greeting: str, make_object: ObjectRef, arguments: Sequence[ObjectRef]
    ) -> ObjectRef:
        """Give an actor a new object, ``make_object(number, *arguments)``; its ``ActorPlace``.

        Nothing of the object travels to an actor that does not ``meet`` the greeting.
        """
        actor = self._actors[number]
        ref = actor.make.remote(actor.meet.remote(greeting), make_object, *arguments)
        self._calls[ref.hex()] = "its start"
        return ref

    def submit(
        self,
        number: int,
        method: str,
        arguments: Sequence[object],
        num_returns: int = 1,
        after: ObjectRef | None = None,
    ) -> Returned:
        """Call ``method`` of one actor; top-level ObjectRefs arrive as their values."""
        self.driver_bytes += sum(_size(a) for a in arguments if not isinstance(a, ObjectRef))
        call = self._actors[number].call.options(num_returns=num_returns + 1)
        refs = list(call.remote(method, num_returns, after, *arguments))
        self._calls.update({ref.hex(): method for ref in refs})
        return Returned(refs[:-1], refs[-1])

    def fetch(self, refs: Sequence[ObjectRef]) -> list:
        """Values of ``refs``, in order; raises at the first that failed.

        Raises:
            ActorLostError: The actor's process is gone, or it ran out of memory.
            Exception: What the call raised, with its own type.
        """
        values = []
        for ref in refs:
            try:
                values.append(ray.get(ref))
            except LOSSES as error:
                raise self._loss(ref, error) from error
            except RayTaskError as error:
                if isinstance(error.cause, LOSSES) or was_out_of_memory(error.cause):
                    raise self._loss(ref, error) from error
                raise error.cause from error
            self._calls.pop(ref.hex(), None)
        self.driver_bytes += sum(_size(value) for value in values)
        return values

    def _loss(self, ref: ObjectRef, error: Exception) -> ActorLostError:
        call = self._calls.get(ref.hex(), "a call")
        return ActorLostError(
            self._culprit(error), call, _short(str(error)), out_of_memory=was_out_of_memory(error)
        )

    def _culprit(self, error: Exception) -> int:
        """Number of the actor in which it began; -1 where that is not known."""
        if isinstance(error, RayActorError):
            return self._numbers.get(error.actor_id or "", -1)
        pid = error.pid if isinstance(error, RayTaskError) else None
        return next((n for n, place in self.places.items() if place.pid == pid), -1)

    def ready(
        self, refs: Sequence[ObjectRef], timeout_s: float, *, wait_for_all: bool = True
    ) -> set[ObjectRef]:
        """Those that have a value or an error, anywhere; waits for all or one, but no longer."""
        refs = list(dict.fromkeys(refs))
        if refs and not wait_for_all:
            ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
            timeout_s = 0.0
        if not refs:
            return set()
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
        return set(done)

    def remove(self, number: int) -> None:
        """End an actor at once, whatever state it is in."""
        ray.kill(self._actors.pop(number))

    def stop(self) -> None:
        """End every actor at once."""
        for number in self.numbers:
            self.remove(number)


def _short(reason: str) -> str:
    """Ray's account of a loss without the actor's fields and without general advice."""
    lines = [line.strip() for line in reason.splitlines() if not line.startswith("\t")]
    return " ".join(lines).split(" Some common causes", 1)[0]


def _size(value: object) -> int:
    return len(pickle.dumps(value))
