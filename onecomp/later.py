"""Calls that are handed out later: as soon as what they need is there.

A worker does what it is given in order. A call that waits for another worker keeps everything
behind it waiting as well, so it stays here until it can begin.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from onecomp.executor import Ref
from onecomp.watch import Watch


class Later:
    """What is to be handed out, and what it waits for.

    Args:
        watch: Waits for values.
    """

    def __init__(self, watch: Watch):
        self._watch = watch
        self._waiting: dict[Ref, list[_Entry]] = defaultdict(list)

    def add(self, needs: Iterable[Ref], hand_out: Callable[[], object]) -> None:
        """Have something done, by the driver, when values are there; at once if none is needed.

        Args:
            needs: References of calls; one that has failed counts as there.
            hand_out: What to do.
        """
        entry = _Entry(set(needs), hand_out)
        for ref in entry.missing:
            self._waiting[ref].append(entry)
        if not entry.missing:
            hand_out()

    def wait(self) -> None:
        """Wait until something that is needed is there, and do what can be done then.

        Raises:
            WorkerError: A worker hangs.
        """
        assert self._waiting, "nothing is waited for"
        for ref in self._watch.wait_for_any(list(self._waiting)):
            for entry in self._waiting.pop(ref):
                entry.missing.discard(ref)
                if not entry.missing:
                    entry.hand_out()

    def forget(self) -> None:
        """Nothing of it is wanted any more."""
        self._waiting.clear()


class _Entry:
    def __init__(self, missing: set[Ref], hand_out: Callable[[], object]):
        self.missing, self.hand_out = missing, hand_out
