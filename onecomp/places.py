"""Where a job may read and write, checked before anything is begun."""

from dataclasses import replace
from pathlib import Path

from upath import UPath

from onecomp.errors import InputError
from onecomp.export.checkpoint import CONFIG
from onecomp.export.install import require_apart, require_directory, require_no_checkpoint
from onecomp.models import ModelSource
from onecomp.storage import AnyPath, open_path, require_writable
from onecomp.store import RunDirectory


def find_run(run_dir: str | Path | UPath) -> RunDirectory:
    """The run directory, bound to the run that is in it, if one is.

    Raises:
        InputError: It is a URL that cannot be opened or written.
    """
    run = RunDirectory(open_path(run_dir))
    if not isinstance(run.path, Path):
        require_writable(run.path)
    return replace(run, run_id=found_run_id(run))


def run_directory_of(output: AnyPath) -> AnyPath:
    """Where a run with this output keeps its files unless the user says otherwise.

    Raises:
        InputError: The output has no name, as a bucket's root.
    """
    if not output.name:
        raise InputError(output, "has no name to make the run directory's of. Give --run-dir.")
    return output.with_name(output.name + ".run")


def found_run_id(run: RunDirectory) -> str | None:
    """Random name of the run in a directory; None for no run, an older or an unreadable one."""
    try:
        return run.record().get("run_id")
    except InputError:
        return None


def require_places(
    run: RunDirectory, output: AnyPath | None, source: ModelSource, *, may_replace: bool
) -> None:
    """Check that run directory and output can be written and overwrite nothing of others.

    Args:
        run: The run directory.
        output: Where the checkpoint goes.
        source: The original model.
        may_replace: Whether a checkpoint that is in the output may be replaced.

    Raises:
        InputError: Naming the first place that cannot be used.
    """
    require_apart(output, run.path, source.directory)
    require_directory(run.path)
    if output is None:
        return
    require_directory(output)
    if not may_replace and not _wrote_part_of(run, output):
        require_no_checkpoint(output)


def has_checkpoint_in_place(run: RunDirectory, output: AnyPath | None) -> bool:
    """Whether a run has nothing to write to its output any more."""
    return output is None or ((output / CONFIG).is_file() and not run.checkpoint.exists())


def has_own_checkpoint(run: RunDirectory, output: AnyPath | None) -> bool:
    """Whether the output is the run's, as far as its record knows, and all in its place."""
    if output is None or not run.exists or run.record().get("output") != str(output):
        return False
    return has_checkpoint_in_place(run, output)


def _wrote_part_of(run: RunDirectory, output: AnyPath) -> bool:
    """Whether the output holds what the run put there: all of it once, or some when it ended."""
    if (output / CONFIG).exists() or not run.exists or run.record()["output"] != str(output):
        return False
    return run.checkpoint.is_dir() or bool(run.events("finished"))
