"""What every command of the command line shares: output, exit status, options from a file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import typer
import yaml

from onecomp.errors import OneCompError, UserError

BAD_INPUT, FAILED = 2, 1


class _Results:
    """Standard output as it was when the command began."""

    stream = sys.stdout


def print_result(text: str) -> None:
    """Print a line to standard output, which holds results and nothing else."""
    _Results.stream.write(text + "\n")
    _Results.stream.flush()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function without a body a command: ``commands`` has what it does, by the same name.

    Errors end in one message and an exit status. What libraries print goes to standard error, so
    that only ``print_result`` reaches standard output.
    """

    @wraps(function)
    def run(**options: object) -> None:
        from onecomp import commands  # noqa: PLC0415 - takes seconds, which --help need not wait

        options.pop("config", None)  # has become the defaults of the others
        with _results_alone():
            commands.quiet_libraries()
            getattr(commands, function.__name__)(**options)

    return run


def quick_command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command that answers without waiting for torch: its body is what it does.

    Errors and standard output are as with ``command``.
    """

    @wraps(function)
    def run(**options: object) -> None:
        with _results_alone():
            function(**options)

    return run


@contextmanager
def _results_alone() -> Iterator[None]:
    """Keep standard output for results; errors become one message and an exit status."""
    _Results.stream = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    except OneCompError as error:
        sys.stderr.write(f"error: {error}\n")
        status = BAD_INPUT if isinstance(error, UserError) else FAILED
        raise typer.Exit(status) from error


def read_options(context: Any, path: Path | None) -> Path | None:
    """Take defaults of a command's options from a YAML file of ``option: value``.

    Args:
        context: The command's; the options' callbacks get a base class of ``typer.Context``.
        path: The file.

    Raises:
        BadParameter: The file cannot be read, or holds an option that the command lacks.
    """
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(values or {}, dict):
        raise typer.BadParameter(f"{path} must hold lines of 'option: value'.")
    values = {str(key).replace("_", "-"): value for key, value in (values or {}).items()}
    names = _option_names(context)
    if unknown := sorted(values.keys() - names):
        raise typer.BadParameter(
            f"{path}: unknown options: {', '.join(unknown)}. Known: {', '.join(sorted(names))}."
        )
    defaults = {names[key]: value for key, value in values.items()}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _option_names(context: Any) -> dict[str, str]:
    """Name of the function's parameter by the option's name on the command line."""
    parameters = [p for p in context.command.params if p.name not in ("config", "help")]
    return {p.opts[0].lstrip("-").replace("_", "-"): str(p.name) for p in parameters}
