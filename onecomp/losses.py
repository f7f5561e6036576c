"""How much a run puts up with, and what it says when it gives up."""

from dataclasses import dataclass

from onecomp.errors import GaveUpError, WorkerError
from onecomp.executor import Executor


@dataclass(frozen=True)
class Patience:
    """How much a run puts up with before it ends."""

    unit_timeout_s: float = 600.0
    """Seconds that a call may take, or 20 times the longest of its kind so far."""
    retries: int = 5
    """Losses in a row without a block finished between them."""


class Losses:
    """Losses since a block was finished.

    Args:
        executor: Knows where lost workers were, and what they said last.
        patience: How many losses are too many.
        run: The run directory, for the message.
    """

    def __init__(self, executor: Executor, patience: Patience, run: str):
        self._executor, self._patience, self._run = executor, patience, run
        self._errors: list[WorkerError] = []
        self._workers: list[int] = []

    def note(self, error: WorkerError) -> None:
        """Work was interrupted."""
        self._errors.append(error)

    def note_worker(self, worker: int) -> None:
        """A worker turned out to be lost."""
        self._workers.append(worker)

    def forget(self) -> None:
        """A block is finished: what was before counts no longer."""
        self._errors.clear()
        self._workers.clear()

    def where(self, worker: int) -> str:
        """Host and process of a worker."""
        place = self._executor.place(worker)
        return f"{place.host}, process {place.pid}"

    def require_patience(self, block: int) -> None:
        """Give up after too many losses at one block, or two for memory.

        Args:
            block: The first block that is not finished.

        Raises:
            GaveUpError: With what to change.
        """
        remedy = f"`onecomp resume {self._run}` goes on at this block."
        if self._ran_out_of_memory():
            remedy = (
                "They ran out of memory. Lower --num-calibration-samples or --max-length, take "
                f"--no-qep, more workers, or more memory for each; with more of these, {remedy}"
            )
        elif len(self._errors) <= self._patience.retries:
            return
        last = self._workers[-1] if self._workers else None
        raise GaveUpError(
            block,
            len(self._errors),
            str(self._errors[-1]),
            "every worker answers" if last is None else self.where(last),
            [] if last is None else self._executor.last_words(last),
            remedy,
        )

    def _ran_out_of_memory(self) -> bool:
        """Whether that is what happened twice; the system's kills are asked for only then."""
        known = sum(error.out_of_memory for error in self._errors)
        if len(self._errors) < 2 or known > 1:
            return known > 1
        return sum(map(self._executor.ran_out_of_memory, self._workers)) > 1
