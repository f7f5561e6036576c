"""The curves of a training for the integrations that Transformers has."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from onecomp.post_process.training import Progress

NONE, ALL = "none", "all"


def integrations_of(report_to: str | Sequence[str] | None) -> list[str]:
    """Names of the integrations that are meant; all installed ones for ``all``."""
    if report_to in (None, NONE):
        return []
    if report_to == ALL:
        return get_available_reporting_integrations()
    return [report_to] if isinstance(report_to, str) else list(report_to or ())


def report_problems(report_to: str | Sequence[str] | None) -> list[str]:
    """What is wrong with the names, in sentences."""
    installed = get_available_reporting_integrations()
    known = ", ".join([NONE, ALL, *installed])
    return [
        f"report_to={name!r} is unknown, or its package is not installed. Here: {known}."
        for name in integrations_of(report_to)
        if name not in installed
    ]


def report_history(
    progress: Progress, report_to: str | Sequence[str] | None, directory: Path
) -> None:
    """Tell the integrations of every step and evaluation, after the training.

    Args:
        progress: Has the curves.
        report_to: Names of integrations.
        directory: Where those that write files may do so.
    """
    names = integrations_of(report_to)
    if not names:
        return
    arguments = TrainingArguments(output_dir=str(directory), report_to=names)
    state, control = TrainerState(), TrainerControl()
    callbacks = [make() for make in get_reporting_integration_callbacks(names)]
    for callback in callbacks:
        callback.on_train_begin(arguments, state, control)
    for step, logs in history(progress):
        state.global_step = step
        for callback in callbacks:
            callback.on_log(arguments, state, control, logs=dict(logs))
    for callback in callbacks:
        callback.on_train_end(arguments, state, control)


def history(progress: Progress) -> Iterator[tuple[int, dict[str, float]]]:
    """Number of the step and what is known after it; evaluations are spread evenly."""
    yield 0, {"eval_loss": progress.initial}
    for step, loss in enumerate(progress.losses, start=1):
        if math.isfinite(loss):
            yield step, {"loss": loss}
    later = progress.evaluations[1:]
    for number, loss in enumerate(later, start=1):
        yield round(len(progress.losses) * number / len(later)), {"eval_loss": loss}
