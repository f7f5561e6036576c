"""What improves a model after it was quantized: the interface, and the record of what happened."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from onecomp.errors import ConfigError, InputError
from onecomp.models import ModelConfig
from onecomp.quantizer.quant_linear import QuantLinear

PATCHES = "patches"
"""Folder of tensors that replace those of a checkpoint."""
BELOW_ADAPTER = ".base_layer"
"""What PEFT calls a layer below its adapters."""
PROCESSES_KEY = "onecomp_post_processes"
"""Entry of a ``quantization_config``: a list with one record per process, in order."""


@dataclass
class PostQuantizationProcess(ABC):
    """Improves a quantized model in place.

    Args:
        name: What messages call it; None for the name of the class.
    """

    name: str | None = None
    places: ClassVar[frozenset[str]] = frozenset()
    """Settings on which the result does not depend: where work is done, what is told of it."""

    def __post_init__(self) -> None:
        if self.name is None:
            self.name = type(self).__name__

    @abstractmethod
    def run(self, quantized_model: nn.Module, model_config: ModelConfig) -> None:
        """Improve the model in place.

        Args:
            quantized_model: On the CPU, its quantized layers in place; on the CPU and in
                evaluation mode again afterwards.
            model_config: The original model, its tokenizer and the device to compute on.
        """


class CheckpointProcess(PostQuantizationProcess):
    """A process that needs no live model: from a checkpoint directory to a patch of it."""

    @abstractmethod
    def improve(self, checkpoint: Path, work: Path, model_config: ModelConfig) -> "Outcome":
        """Train what a checkpoint holds, a part of it at a time.

        Args:
            checkpoint: Directory of the quantized model; not changed.
            work: Directory that survives an interruption, in which a repeated call goes on. Its
                folder ``PATCHES`` holds the changed tensors by full name in safetensors files,
                of which later ones (by name) replace earlier ones, when ``executed``.
            model_config: The original model.
        """


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a process did; stored with the checkpoint and in the journal."""

    executed: bool
    """Whether the model changed; not if it was rolled back, or there was nothing to do."""
    reason: str = ""
    """Why not."""
    held_out_before: float | None = None
    """Held-out loss of the model that came in."""
    held_out_after: float | None = None
    """The same of the model that went out; never higher."""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth knowing, as plain JSON values."""


def settings_of(process: PostQuantizationProcess) -> dict[str, Any]:
    """A process's settings as plain JSON values."""
    return {
        item.name: _plain(getattr(process, item.name))
        for item in fields(process)
        if item.name != "name" and item.init
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def entry_of(process: PostQuantizationProcess, outcome: Outcome) -> dict[str, Any]:
    """What a checkpoint says of a process."""
    return {
        "name": process.name,
        "class": type(process).__name__,
        "config": settings_of(process),
        **{key: value for key, value in asdict(outcome).items() if value not in (None, "", {})},
    }


def record(model: PreTrainedModel, process: PostQuantizationProcess, outcome: Outcome) -> None:
    """Add a process to the records in the model's ``config.quantization_config``."""
    config = quantization_config(model)
    entries = [*config.get(PROCESSES_KEY, []), entry_of(process, outcome)]
    model.config.quantization_config = {**config, PROCESSES_KEY: entries}


def records_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What was done to a model after it was quantized, in order."""
    return list(quantization_config(model).get(PROCESSES_KEY, []))


def run_and_record(
    process: PostQuantizationProcess, model: PreTrainedModel, model_config: ModelConfig
) -> dict[str, Any]:
    """Run a process; one that does not record itself, as a user's own may not, is recorded here.

    Returns:
        What the model's configuration now says of it.
    """
    known = len(records_of(model))
    process.run(model, model_config)
    if len(records_of(model)) == known:
        record(model, process, Outcome(executed=True))
    return records_of(model)[-1]


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The model's ``quantization_config``; empty where it was made by hand and has none."""
    found = getattr(model.config, "quantization_config", None)
    return dict(found) if isinstance(found, Mapping) else {}


def keeps_zero_points(config: Mapping[str, Any]) -> bool:
    """Whether zero points may be trained; kernels for symmetric grids ignore them.

    Args:
        config: A ``quantization_config``.
    """
    return not config.get("sym", True)


def require_trainable(
    process: PostQuantizationProcess, model: nn.Module, model_config: ModelConfig
) -> dict[str, QuantLinear]:
    """The quantized layers of a model that a process can work on, by full name.

    Raises:
        InputError: The model has none.
        ConfigError: The model is rotated and ``model_config`` is not.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    if not layers:
        raise InputError(
            process.name,
            "the model has no quantized layers. Give one that Runner.create_quantized_model or "
            "load_quantized_model made; methods without a checkpoint format have none.",
        )
    if quantization_config(model).get("rotated") and not model_config.has_additional_data():
        raise ConfigError(
            str(process.name),
            [
                "the model is rotated, but its model_config is that of a plain model, whose hidden "
                "states are others. Give the RotatedModelConfig that it was quantized with."
            ],
        )
    return layers


def require_bare(process: PostQuantizationProcess, layers: Mapping[str, QuantLinear]) -> None:
    """Check that no quantized layer has a LoRA adapter on it.

    Args:
        process: One that reads layers from a checkpoint, where adapters are files of their own.
        layers: By full name.

    Raises:
        InputError: One has.
    """
    if any(name.endswith(BELOW_ADAPTER) for name in layers):
        raise InputError(
            process.name,
            "the model has LoRA adapters, which this process does not see. Run it first, and "
            "train adapters last.",
        )
