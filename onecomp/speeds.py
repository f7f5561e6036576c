"""How fast each worker is, as the receipts of its calls tell."""

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable

from onecomp.watch import FinishedUnit

FORWARD = (
    "begin_block",
    "observe",
    "observe_group",
    "observe_ahead",
    "observe_group_ahead",
    "finish_block",
)
"""Methods whose time grows with the tokens that a worker holds."""
REMEMBERED_BLOCKS = 5


class MeasuredSpeeds:
    """Tokens per second of each worker's forward work: the median of its last blocks."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED_BLOCKS))
        self._seconds: dict[int, float] = defaultdict(float)
        self._tokens: dict[tuple[int, int | None], int] = {}
        """By worker and block, as it was handed out: shards move while blocks are in flight."""

    def note_tokens(self, worker: int, block: int, tokens: int) -> None:
        """A worker was given a block to carry so many tokens through."""
        self._tokens[worker, block] = tokens

    def begin_anew(self) -> None:
        """Passes were interrupted: their seconds are not those of a block."""
        self._seconds.clear()
        self._tokens.clear()

    def learn(self, units: Iterable[FinishedUnit]) -> None:
        """Take in units that have ended since the last time, those of a worker in their order."""
        for done in units:
            if done.unit.method in FORWARD:
                self._seconds[done.worker] += done.receipt.seconds
            if done.unit.method == FORWARD[-1]:
                spent = self._seconds.pop(done.worker)
                tokens = self._tokens.pop((done.worker, done.unit.block), 0)
                if spent > 0 and tokens:
                    self._seen[done.worker].append(tokens / spent)

    def of(self, workers: Iterable[int]) -> dict[int, float]:
        """Speeds of these workers; one that is not known yet counts as the others' median."""
        workers = list(workers)
        known = {w: statistics.median(self._seen[w]) for w in workers if self._seen.get(w)}
        usual = statistics.median(known.values()) if known else 1.0
        return {worker: known.get(worker, usual) for worker in workers}

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        self._seen.pop(worker, None)
        self._seconds.pop(worker, None)
