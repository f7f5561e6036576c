"""Commands in this process."""

from click.testing import Result
from typer.testing import CliRunner

from onecomp.cli import app


def invoke(*arguments: object) -> Result:
    """Whatever becomes of a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout
