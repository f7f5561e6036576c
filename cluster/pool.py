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
        self._numbers = {actor._actor_id.hex(): n for n, actor in enumerate(self._actors)}
        self._calls: dict[str, str] = {}
        """Method by the Ref's number; never the Ref itself, which would keep its value alive."""

    def make(
        self, make_object: Callable[..., object], arguments: Sequence[object]
    ) -> list[ObjectRef]:
        """Give every actor a new object, ``make_object(number, *arguments)``; does not wait."""
        shared = [ray.put(argument) for argument in (make_object, *arguments)]
        self.driver_bytes += len(self._actors) * sum(_size(argument) for argument in arguments)
        refs = [actor.make.remote(*shared) for actor in self._actors]
        self._calls.update({ref.hex(): "its start" for ref in refs})
        return refs

    def submit(
        self, number: int, method: str, arguments: Sequence[object], num_returns: int
    ) -> list[ObjectRef]:
        """Call ``method`` of one actor; top-level ObjectRefs arrive as their values."""
        self.driver_bytes += sum(_size(a) for a in arguments if not isinstance(a, ObjectRef))
        call = self._actors[number].call.options(num_returns=num_returns)
        returned = call.remote(method, *arguments)
        refs = [returned] if num_returns == 1 else list(returned)
        self._calls.update({ref.hex(): method for ref in refs})
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
            except RayActorError as error:  # of the actor called, or of one that made an argument
                number = self._numbers.get(error.actor_id or "", -1)
                call = self._calls.get(ref.hex(), "a call")
                raise ActorLostError(number, call, str(error).strip()) from error
            except RayTaskError as error:
                raise error.cause from error
            self._calls.pop(ref.hex(), None)
        self.driver_bytes += sum(_size(value) for value in values)
        return values

    def stop(self) -> None:
        """End every actor at once."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


def _size(value: object) -> int:
    return len(pickle.dumps(value))
