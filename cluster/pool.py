"""A pool of numbered actors that hand values to each other by reference."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import ActorLostError

Ref = ObjectRef


class ActorPool:
    """Numbered actors of one class; calls of one actor run in the order of submission.

    Args:
        actor_class: Made with its number; has the methods ``make(function, *arguments)`` and
            ``call(method, *arguments)``.
        count: Number of actors.
        options: Ray's actor options: resources, runtime environment.
    """

    def __init__(self, actor_class: ActorClass, count: int, options: dict[str, Any]):
        self.driver_bytes = 0
        self._actors: list[ActorHandle] = [
            actor_class.options(**options).remote(number) for number in range(count)
        ]
        self._calls: dict[ObjectRef, tuple[int, str]] = {}

    def make(self, make_object: Callable[..., object], arguments: Sequence[object]) -> None:
        """Give every actor a new object, ``make_object(number, *arguments)``; does not wait."""
        shared = [ray.put(argument) for argument in (make_object, *arguments)]
        self.driver_bytes += len(self._actors) * sum(_size(argument) for argument in arguments)
        for number, actor in enumerate(self._actors):
            self._calls[actor.make.remote(*shared)] = number, "its start"

    def submit(
        self, number: int, method: str, arguments: Sequence[object], num_returns: int
    ) -> list[ObjectRef]:
        """Call ``method`` of one actor; top-level ObjectRefs arrive as their values."""
        self.driver_bytes += sum(_size(a) for a in arguments if not isinstance(a, ObjectRef))
        call = self._actors[number].call.options(num_returns=num_returns)
        returned = call.remote(method, *arguments)
        refs = [returned] if num_returns == 1 else list(returned)
        self._calls.update(dict.fromkeys(refs, (number, method)))
        return refs

    def fetch(self, refs: Sequence[ObjectRef]) -> list:
        """Values of ``refs``, in order; raises at the first that failed.

        Raises:
            ActorLostError: The actor's process is gone.
            Exception: What the call raised, with its own type.
        """
        values = []
        for ref in refs:
            try:
                values.append(ray.get(ref))
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                number, method = self._calls.get(ref, (-1, "its start"))
                raise ActorLostError(number, method, str(error).strip()) from error
            self._calls.pop(ref, None)
        self.driver_bytes += sum(_size(value) for value in values)
        return values

    def stop(self) -> None:
        """End every actor at once."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


def _size(value: object) -> int:
    return len(pickle.dumps(value))
