"""Errors of the cluster itself; ``actors`` translates them for the library."""


class ClusterError(Exception):
    """The cluster cannot be reached, or cannot give what was asked for.

    What ``connect`` raises ends with its remedy: whoever catches it need not add one.
    """


class ActorLostError(ClusterError):
    """An actor's process is gone.

    Args:
        actor: Number of the actor in its pool.
        call: What it was asked to do.
        reason: Ray's account of it.
        out_of_memory: It used too much memory.
    """

    def __init__(self, actor: int, call: str, reason: str, out_of_memory: bool = False):
        super().__init__(actor, call, reason, out_of_memory)
        self.actor, self.call, self.reason = actor, call, reason
        self.out_of_memory = out_of_memory

    def __str__(self) -> str:
        return f"actor {self.actor} was lost during {self.call}: {self.reason}"


class GangFailedError(ClusterError):
    """The workers of a gang were lost too often, or the function that they ran failed."""
