"""The command line in processes of its own, which do not import everything again.

They are forked from a process that has imported the library and nothing of Ray, so they start in a
fraction of a second, where ``python -m onecomp`` takes several. All else is as there.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from onecomp.cli import main

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["onecomp.commands"])


def start_driver(words: Sequence[str], log: Path) -> BaseProcess:
    """Start ``onecomp WORDS``, which writes to the end of ``log``."""
    process = FORKSERVER.Process(target=_run, args=(list(words), log), daemon=True)
    process.start()
    return process


def has_ended(process: BaseProcess) -> bool:
    """Whether it has; then ``exitcode`` is its status, negative for a signal."""
    return process.exitcode is not None


def _run(words: list[str], log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["onecomp", *words]
    main()
