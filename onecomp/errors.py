"""Named errors; each passes its own arguments to ``super().__init__``, to survive pickling."""

from collections.abc import Sequence


class OneCompError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(OneCompError, ValueError):
    """Something the user can repair, found before any work was done (exit status 2)."""


class ConfigError(UserError):
    """Settings that cannot work; lists every problem at once.

    Args:
        subject: The configuration object, e.g. ``"GPTQ"``.
        problems: One sentence each: value, rule, remedy.
    """

    def __init__(self, subject: str, problems: Sequence[str]):
        super().__init__(subject, problems)
        self.subject, self.problems = subject, list(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.subject}: {self.problems[0]}"
        return "\n".join(
            [f"{self.subject}: {len(self.problems)} problems", *(f"  - {p}" for p in self.problems)]
        )


class InputError(UserError):
    """A model, file or directory that cannot be used.

    Args:
        subject: What was looked at, usually a path.
        problem: What was found, what is allowed, what to do.
    """

    def __init__(self, subject: object, problem: str):
        super().__init__(str(subject), problem)
        self.subject, self.problem = str(subject), problem

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}"


class QuantizationError(OneCompError):
    """Arithmetic failed on finite input; the caller knows the layer and the ladder's next rung."""


class LayerError(OneCompError):
    """One layer cannot be processed; the run stops and names the layer."""

    def __init__(self, layer_name: str, reason: str):
        super().__init__(layer_name, reason)
        self.layer_name, self.reason = layer_name, reason

    def __str__(self) -> str:
        return f"{self.layer_name}: {self.reason}"


class WorkerError(OneCompError):
    """A worker process was lost, or does not answer.

    Args:
        worker: Number of the worker; -1 where it is not known which.
        doing: The unit it was working on.
        reason: What is known of the cause.
        out_of_memory: It was killed for using too much memory, or asked for more than there is.
        hangs: Its process is there, but a call takes too long.
    """

    def __init__(
        self,
        worker: int,
        doing: str,
        reason: str,
        out_of_memory: bool = False,
        hangs: bool = False,
    ):
        super().__init__(worker, doing, reason, out_of_memory, hangs)
        self.worker, self.doing, self.reason = worker, doing, reason
        self.out_of_memory, self.hangs = out_of_memory, hangs

    def __str__(self) -> str:
        return f"worker {self.worker} was lost while it did {self.doing}: {self.reason}"


class GaveUpError(OneCompError):
    """Work was lost again and again at the same place; the run ends and can be resumed.

    Args:
        block: The first block that is not finished.
        failures: How often workers were lost there.
        last: The last loss, in words.
        place: Where that worker was.
        log: Last lines of its log.
        remedy: What to change.
    """

    def __init__(
        self, block: int, failures: int, last: str, place: str, log: Sequence[str], remedy: str
    ):
        super().__init__(block, failures, last, place, log, remedy)
        self.block, self.failures, self.last, self.place = block, failures, last, place
        self.log, self.remedy = list(log), remedy

    def __str__(self) -> str:
        lines = "".join(f"\n    {line}" for line in self.log)
        log = f" Its last log lines:{lines}\n" if lines else " "
        return (
            f"block {self.block}: workers were lost {self.failures} times without progress, last "
            f"{self.last} ({self.place}).{log}{self.remedy}"
        )
