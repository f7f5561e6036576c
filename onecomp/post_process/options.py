"""Post-processes by the names and options of the command line."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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
from onecomp.post_process.samples import DEFAULT_SAMPLES

PROCESSES: dict[str, type[PostQuantizationProcess]] = {
    "blockwise_ptq": BlockWisePTQ,
    "global_ptq": GlobalPTQ,
    "global_ptq_distributed": GlobalPTQDistributed,
    "lora_sft": PostProcessLoraSFT,
    "lora_teacher_sft": PostProcessLoraTeacherSFT,
    "lora_teacher_only_sft": PostProcessLoraTeacherOnlySFT,
}


TEXT = "calibration_config"
"""The field that has options of its own."""
TYPES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    NoneType: "null",
}
"""What values are called; of a field's types the others cannot be written."""


@dataclass(frozen=True)
class TextOptions:
    """The options that say which text a process trains on; None where one was not given."""

    calibration_dataset: str | None = None
    text_key: str | None = None
    num_calibration_samples: int | None = None
    max_length: int | None = None
    seed: int | None = None

    def fields_of(self, known: Collection[str]) -> dict[str, Any]:
        """The same as fields of a process: one ``calibration_config``, or those of adapters."""
        if self == TextOptions():
            return {}
        if TEXT in known:
            return {TEXT: self.calibration()}
        dataset = self.calibration_dataset
        is_file = dataset is not None and Path(dataset).exists()
        found = {
            "data_files" if is_file else "dataset_name": dataset,
            "text_column": self.text_key,
            "max_train_samples": self.num_calibration_samples,
            "max_length": self.max_length,
            "shuffle_seed": self.seed,
        }
        return {key: value for key, value in found.items() if value is not None}

    def calibration(self) -> CalibrationConfig:
        """The text as for quantizing: files are joined and cut; C4 unless another is named."""
        usual = CalibrationConfig()
        dataset = self.calibration_dataset or usual.calibration_dataset
        return CalibrationConfig(
            dataset,
            self.max_length or usual.max_length,
            self.num_calibration_samples or DEFAULT_SAMPLES,
            strategy="drop_rand" if dataset == usual.calibration_dataset else "concat_chunk",
            seed=self.seed or 0,
            text_key=self.text_key or usual.text_key,
        )


def make_process(
    name: str, settings: Sequence[str], options: Mapping[str, Any], text: TextOptions | None = None
) -> PostQuantizationProcess:
    """A process from its name and options.

    Args:
        name: Key of ``PROCESSES``.
        settings: Texts ``field=value``; values as JSON, or plain text. They win over options.
        options: Further fields; None where an option was not given.
        text: What it trains on.

    Raises:
        ConfigError: A process or field that does not exist, a value that does not fit, or an
            option that the process has no use for.
    """
    if name not in PROCESSES:
        raise ConfigError(
            "postprocess", [f"process={name!r}: must be one of {', '.join(sorted(PROCESSES))}."]
        )
    kind = PROCESSES[name]
    known = {item.name for item in fields(kind) if item.init}
    values = {key: value for key, value in options.items() if value is not None}
    if values.get("num_workers") == 0 and "num_workers" not in known:
        del values["num_workers"]  # this process, where it is anyway
    problems = [
        f"--{key.replace('_', '-')}: {name} has no such setting. Leave it out."
        for key in values
        if key not in known
    ]
    values |= (text or TextOptions()).fields_of(known)
    types = get_type_hints(kind)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known - {TEXT}:
            names = ", ".join(sorted(known - {TEXT}))
            problems.append(f"--set {setting}: must be FIELD=VALUE with a field of {names}.")
            continue
        kinds = _kinds(types[key])
        values[key] = _value(value, kinds)
        if type(values[key]) not in kinds:
            rule = ", or ".join(TYPES[each] for each in kinds if each in TYPES)
            problems.append(f"--set {setting}: must be {rule}.")
    if problems:
        raise ConfigError(name, problems)
    return kind(**values)


def _kinds(hint: Any) -> list[Any]:
    """The types that a field may have: ``tuple[int, ...] | None`` gives tuple and NoneType."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(member) or member for member in members]


def _value(text: str, kinds: Collection[Any]) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if float in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    return text if str in kinds and type(value) not in kinds else value
