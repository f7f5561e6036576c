"""Workers that train together: what the library asks of them, wherever they run."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

RUN_PREFIX = "training-"
"""Folders of trainings in a directory that the user names."""


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


def totals(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, in their order: the same bits on all of them.

    Args:
        values: As many on every rank.
        device: One that the ranks' process group can send from.
    """
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(of_ranks, mine)
    return [sum(column) for column in zip(*(row.tolist() for row in of_ranks), strict=True)]


def default_gang(request: GangRequest) -> Gang:
    """A gang on Ray, on the cluster that there is or a new one on this machine.

    Raises:
        InputError: No cluster answers at the address.
        ConfigError: The cluster can never hold so many workers.
    """
    from actors.training import RayGang  # noqa: PLC0415 - the library reaches Ray by this door

    return RayGang(request)


def fresh_directory(parent: Path) -> Path:
    """A new numbered folder in the user's directory, as every process understands it.

    What earlier trainings left there stays.
    """
    parent = parent.expanduser().absolute()
    folders = (parent / f"{RUN_PREFIX}{number:04d}" for number in itertools.count(1))
    fresh = next(folder for folder in folders if not folder.exists())
    fresh.mkdir(parents=True)
    return fresh
