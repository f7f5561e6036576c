"""Any command line of onecomp as a Ray job: clean stops, and no output that would be lost."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from onecomp.cli import app, main
from onecomp.console import BAD_INPUT
from onecomp.errors import ConfigError

STOPPED = 128 + signal.SIGTERM
"""Exit status of a job that was stopped, as a shell has it."""
WRITTEN = ("output", "run_dir", "run")
"""Parameters of the commands that are directories of a run."""
READ = ("model", "directory")
"""Parameters that are directories if there is one of that name, else names on the Hub."""

UsageError = typer.BadParameter.mro()[1]
"""What every mistake in a command line is; typer has a click of its own and exports leaves only."""


def run_job(words: Sequence[str]) -> None:
    """Run ``onecomp WORDS`` as the driver of a Ray job; ends with ``SystemExit``.

    Exit statuses are those of the command line, and 143 for a run that SIGTERM stopped, as
    ``ray job stop`` does. It stops as Ctrl-C does: worker processes are released, finished blocks
    stay, and the run can be resumed.
    """
    if problems := lost_places(words, Path()):
        sys.stderr.write(f"error: {ConfigError('onecomp as a Ray job', problems)}\n")
        raise SystemExit(BAD_INPUT)
    signal.signal(signal.SIGTERM, _end)
    sys.argv = ["onecomp", *words]
    try:
        main()
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        sys.stderr.write(f"stopped by SIGTERM; {how_to_resume(words)}\n")
        raise SystemExit(STOPPED) from end


def _end(signal_number: int, _frame: object) -> None:
    """End as the handler does that Ray puts in the place of this one when it connects."""
    raise SystemExit(signal_number)


def check_words(words: Sequence[str], root: Path) -> None:
    """Check a command line before it is sent to a cluster.

    Args:
        words: Behind ``onecomp``.
        root: Directory from which it will be run, in a copy.

    Raises:
        ConfigError: It does not parse, or names places that would be lost with the copy.
    """
    try:
        _parameters(words)
    except UsageError as error:
        if "--config" not in words:  # a file that only the cluster may have
            raise ConfigError(
                f"onecomp {' '.join(words)}",
                [f"{error.format_message()} See onecomp --help."],
            ) from error
    if problems := lost_places(words, root):
        raise ConfigError(f"onecomp {' '.join(words)}", problems)


def lost_places(words: Sequence[str], root: Path) -> list[str]:
    """One sentence for each directory that would end with the job's temporary working directory.

    Args:
        words: Behind ``onecomp``. What does not parse is left to the command line.
        root: The working directory; relative models in it are refused, too: not every node that
            works for the job has a copy, and none keeps it until the run is resumed.
    """
    try:
        parameters = _parameters(words)
    except UsageError:
        return []
    named = [(name, str(parameters[name])) for name in WRITTEN if parameters.get(name) is not None]
    named += [
        (name, str(parameters[name]))
        for name in READ
        if parameters.get(name) is not None and (root / str(parameters[name])).exists()
    ]
    return [
        f"{name.replace('_', '-')} {place!r} is relative, but a job runs in a temporary copy of "
        "its working directory, which ends with the job. Give an absolute path that every node "
        "sees, or a URL such as s3://bucket/run."
        for name, place in named
        if not (Path(place).is_absolute() or "://" in place)
    ]


def how_to_resume(words: Sequence[str], prefix: str = "onecomp") -> str:
    """What to do after a job was stopped, in half a sentence."""
    try:
        parameters = _parameters(words)
    except UsageError:
        parameters = {}
    run = parameters.get("run_dir") or parameters.get("run")
    if run is None and parameters.get("output") is not None:
        run = f"{str(parameters['output']).rstrip('/')}.run"
    if run is None:
        return "nothing was kept, run it again"
    return f"finished blocks are kept, go on with: {prefix} resume {run}"


def _parameters(words: Sequence[str]) -> dict[str, object]:
    """Values of a command's parameters by name."""
    group = typer.main.get_command(app)
    context = group.make_context("onecomp", list(words))
    name, command, rest = group.resolve_command(context, list(words))
    return command.make_context(name, rest, parent=context).params


if __name__ == "__main__":
    run_job(sys.argv[1:])
