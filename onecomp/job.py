"""What is to be made: one description that the Runner, the command line and ``resume`` share."""

import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onecomp import quantizer as methods
from onecomp.calibration import CalibrationConfig, CalibrationSamples
from onecomp.errors import ConfigError, InputError
from onecomp.models import ModelConfig, ModelLayout, ModelSource, Skeleton, inspect_model
from onecomp.qep import QEPConfig
from onecomp.quantizer import Quantizer
from onecomp.quantizer.layer_settings import USUAL_GROUP_SIZES

logger = logging.getLogger(__name__)

VERSIONED = ("torch", "transformers", "safetensors")
IDENTITY = ("model", "quantizer", "calibration", "qep")
"""Parts of a run's record that fix its result; the rest says how and where it was made."""


@dataclass(frozen=True)
class QuantizationJob:
    """A model, a method, and the text to calibrate it on."""

    model_config: ModelConfig
    quantizer: Quantizer
    calibration: CalibrationConfig
    qep: QEPConfig | None = None
    """Propagate errors; None calibrates on the original model's activations."""
    _: KW_ONLY
    num_shards: int | None = None
    """Calibration shards; None for up to 64 of at least 1024 tokens."""

    def record(self, samples: CalibrationSamples | None) -> dict:
        """The job as plain JSON values, with the hashes that identify its inputs."""
        source = self.model_config.source
        return {
            "model": {
                "id": _place(source),
                "hash": source.content_hash,
                "dtype": str(self.model_config.torch_dtype).removeprefix("torch."),
                "trust_remote_code": source.trust_remote_code,
            },
            "quantizer": quantizer_record(self.quantizer),
            "calibration": asdict(self.calibration)
            | {
                "hash": None if samples is None else samples.content_hash(),
                "num_shards": self.num_shards,
            },
            "qep": None if self.qep is None else asdict(self.qep),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
            "device": device_kind(),
        }

    @staticmethod
    def from_record(record: Mapping) -> "QuantizationJob":
        """The inverse of ``record``."""
        model, calibration = record["model"], dict(record["calibration"])
        calibration.pop("hash")
        num_shards = calibration.pop("num_shards")
        return QuantizationJob(
            ModelConfig(
                model["id"], dtype=model["dtype"], trust_remote_code=model["trust_remote_code"]
            ),
            quantizer_from_record(record["quantizer"]),
            CalibrationConfig(**calibration),
            None if record["qep"] is None else QEPConfig(**record["qep"]),
            num_shards=num_shards,
        )


def _place(source: ModelSource) -> str:
    """Hub id, or the directory as any working directory can find it."""
    is_local = Path(source.model_id).expanduser().is_dir()
    return str(source.directory) if is_local else source.model_id


def quantizer_record(quantizer: Quantizer) -> dict:
    """A quantizer's class and settings as plain JSON values."""
    return {"method": type(quantizer).__name__} | {
        name: _plain(value) for name, value in quantizer.settings().items()
    }


def quantizer_from_record(record: Mapping) -> Quantizer:
    """The inverse of ``quantizer_record``, for the package's own methods.

    Raises:
        ConfigError: A method of the user's own; it can be resumed from Python only.
    """
    settings = {name: _restored(value) for name, value in record.items()}
    method = getattr(methods, str(settings.pop("method")), None)
    if not (isinstance(method, type) and issubclass(method, Quantizer)):
        raise ConfigError(
            "resume",
            [
                f"the run's method {record['method']!r} is not part of this package. Resume it "
                "from Python: Runner(..., quantizer=..., run_dir=...).run()."
            ],
        )
    settings["target_layer_types"] = tuple(
        getattr(nn, name) for name in record["target_layer_types"]
    )
    settings["hessian_dtype"] = getattr(torch, record["hessian_dtype"])
    return method(**settings)


def _plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Quantizer):
        return quantizer_record(value)
    if isinstance(value, CalibrationConfig):
        return asdict(value)
    if isinstance(value, tuple) and all(isinstance(item, type) for item in value):
        return [item.__name__ for item in value]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _restored(value: object) -> object:
    """Methods within a method's settings, restored."""
    if isinstance(value, Mapping) and "method" in value and "target_layer_types" in value:
        return quantizer_from_record(value)
    if isinstance(value, Mapping) and "calibration_dataset" in value:
        return CalibrationConfig(**value)
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value


def device_kind() -> str:
    """The kind of device on which equal bits are promised: GPU model, or CPU instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Fields of two records' identities that differ, as ``field: old -> new``."""
    flat_old, flat_new = _flat(old), _flat(new)
    return [
        f"{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _flat(record: Mapping) -> dict[str, object]:
    flat = {}
    for part in IDENTITY:
        value = record.get(part)
        if isinstance(value, Mapping):
            flat |= {f"{part}.{key}": item for key, item in value.items()}
        else:
            flat[part] = value
    return flat


def find_layers(quantizer: Quantizer, skeleton: Skeleton) -> ModelLayout:
    """The layers to quantize, checked against the method's settings.

    Raises:
        ConfigError: No layer, a named layer outside the blocks, or layers that do not fit the
            settings; every problem is listed.
    """
    selected = quantizer.select_layers(skeleton.model)
    inside = [name for name in selected if name.startswith(skeleton.blocks_name + ".")]
    named = set(quantizer.include_layer_names or ())
    problems = [
        f"{name} lies outside the decoder blocks ({skeleton.blocks_name}), where nothing is "
        "quantized. Leave it out of include_layer_names."
        for name in selected
        if name in named and name not in inside
    ]
    problems += [
        f"include_layer_names has {name}, which the model does not have."
        for name in sorted(named - {name for name, _ in skeleton.model.named_modules()})
    ]
    for name in inside:
        layer = selected[name]
        problems += quantizer.layer_problems(name, layer.in_features, layer.out_features)
    problems += quantizer.model_problems(_shapes(selected, inside))
    if not inside and not problems:
        problems.append("no layer is selected. Widen the include_ or narrow the exclude_ settings.")
    if problems:
        raise ConfigError(type(quantizer).__name__, problems)
    for remark in quantizer.remarks(_shapes(selected, inside)):
        logger.warning("%s: %s", quantizer.name, remark)
    return inspect_model(skeleton, inside)


def _shapes(layers: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of the named layers."""
    return {name: (layers[name].out_features, layers[name].in_features) for name in names}


def log_coverage(skeleton: Skeleton, layout: ModelLayout) -> None:
    """Say how much of the blocks' weights is quantized; warn of layers fused in one tensor."""
    weights = {
        name: parameter
        for name, parameter in skeleton.model.named_parameters()
        if name.startswith(skeleton.blocks_name + ".") and parameter.ndim > 1
    }
    num_weights = sum(weight.numel() for weight in weights.values())
    quantized = sum(group.num_weights for group in layout.groups)
    logger.info(
        "quantizing %d layers with %.1f %% of the weights in the decoder blocks",
        len(layout.layer_names), 100 * quantized / num_weights,
    )  # fmt: skip
    fused = {name: weight for name, weight in weights.items() if weight.ndim > 2}
    if fused:
        name, weight = max(fused.items(), key=lambda item: item[1].numel())
        logger.warning(
            "%d tensors with %.1f %% of these weights are fused layers, which are not quantized: "
            "%s %s is one",
            len(fused), 100 * sum(w.numel() for w in fused.values()) / num_weights,
            name, tuple(weight.shape),
        )  # fmt: skip


def default_groupsize(quantizer: Quantizer, skeleton: Skeleton) -> int:
    """The largest of 128, 64 and 32 that divides every target layer's input, else -1."""
    layers = quantizer.select_layers(skeleton.model)
    widths = {layer.in_features for layer in layers.values()}
    return next(
        (size for size in USUAL_GROUP_SIZES if all(width % size == 0 for width in widths)), -1
    )


def require_same_identity(run_path: object, old: Mapping, new: Mapping) -> None:
    """Check that a run directory belongs to the same job.

    Raises:
        InputError: Naming every field that differs.
    """
    if changed := differences(old, new):
        raise InputError(
            run_path,
            f"belongs to another configuration ({'; '.join(changed)}). "
            "Give another --run-dir, or --overwrite to begin anew.",
        )
