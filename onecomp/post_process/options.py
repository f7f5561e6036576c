"""Post-processes by the names and options of the command line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError
from onecomp.post_process.base import PostQuantizationProcess
from onecomp.post_process.blockwise.process import BlockWisePTQ
from onecomp.post_process.global_ptq import GlobalPTQ
from onecomp.post_process.global_ptq_distributed import GlobalPTQDistributed
from onecomp.post_process.lora.process import (
    PostProcessLoraSFT,
    PostProcessLoraTeacherOnlySFT,
    PostProcessLoraTeacherSFT,
)

PROCESSES: dict[str, type[PostQuantizationProcess]] = {
    "blockwise_ptq": BlockWisePTQ,
    "global_ptq": GlobalPTQ,
    "global_ptq_distributed": GlobalPTQDistributed,
    "lora_sft": PostProcessLoraSFT,
    "lora_teacher_sft": PostProcessLoraTeacherSFT,
    "lora_teacher_only_sft": PostProcessLoraTeacherOnlySFT,
}


def make_process(
    name: str, settings: Sequence[str], given: dict[str, Any]
) -> PostQuantizationProcess:
    """A process from its name and options.

    Args:
        name: Key of ``PROCESSES``.
        settings: Texts ``field=value``; values as JSON, or plain text.
        given: Further fields, ignored where the process does not have them.

    Raises:
        ConfigError: A process or field that does not exist, or a value that does not fit.
    """
    if name not in PROCESSES:
        raise ConfigError(
            "postprocess", [f"process={name!r}: must be one of {', '.join(sorted(PROCESSES))}."]
        )
    kind = PROCESSES[name]
    known = {item.name for item in fields(kind) if item.init}
    values = {key: value for key, value in given.items() if key in known and value is not None}
    problems = []
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            names = ", ".join(sorted(known - {"calibration_config"}))
            problems.append(f"--set {text}: must be FIELD=VALUE with a field of {names}.")
        else:
            values[key] = _value(value)
    if problems:
        raise ConfigError(name, problems)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(name, [f"{error}. Check the values given with --set."]) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class TextOptions:
    """The options that say which text a process trains on."""

    calibration_dataset: str
    text_key: str
    num_calibration_samples: int
    max_length: int
    seed: int

    def calibration(self) -> CalibrationConfig:
        """The text; as for quantizing, files are joined and cut."""
        strategy = "drop_rand" if self.calibration_dataset == "c4" else "concat_chunk"
        return CalibrationConfig(
            self.calibration_dataset,
            self.max_length,
            self.num_calibration_samples,
            strategy=strategy,
            seed=self.seed,
            text_key=self.text_key,
        )
