"""Workers that train together: what the library asks of them, wherever they run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GangMember:
    """One worker of a gang, as the function that it runs sees it."""

    rank: int
    world_size: int
    restored: Path | None
    """A copy of the last checkpoint, with the files of all ranks; None at the first start."""
    save: Callable[[Callable[[Path], None]], None]
    """Called by all ranks: have each fill a folder; together these are the next checkpoint."""


@dataclass(frozen=True, kw_only=True)
class GangRequest:
    """Which workers are wanted."""

    num_workers: int | None = None
    """None: one for each GPU, or one without a GPU where the cluster has none."""
    address: str | None = None
    """Ray cluster; None for ``RAY_ADDRESS``, or a cluster on this machine."""
    uses_gpus: bool = True
    """Whether workers get a GPU each where the cluster has some."""
    max_failures: int = 3
    """How often lost workers are replaced before the run fails."""


class Gang(AbstractContextManager["Gang"], ABC):
    """Workers that run one function in step; lost ones are replaced, from the last checkpoint."""

    num_workers: int
    has_gpus: bool
    is_one_machine: bool
    """Whether every worker sees this machine's files."""

    @abstractmethod
    def run(self, loop: str, argument: object, directory: Path) -> Any:
        """Have all workers call a function together.

        Args:
            loop: ``module:function``, importable on every node, that takes the argument and a
                :class:`GangMember`. What it imports is not imported here.
            argument: The same for all.
            directory: Gets the checkpoints; every node sees it. Where an earlier run left some,
                this one goes on from the last.

        Returns:
            What it returned on rank 0.

        Raises:
            OneCompError: One that a worker raised, or workers were lost too often.
        """


def default_gang(request: GangRequest) -> Gang:
    """A gang on Ray, on the cluster that there is or a new one on this machine.

    Raises:
        InputError: No cluster answers at the address.
        ConfigError: The cluster can never hold so many workers.
    """
    from actors.training import RayGang  # noqa: PLC0415 - the library reaches Ray by this door

    return RayGang(request)
