"""Reading checkpoint directories back into models, quantized ones with their own layers.

``transformers`` has loaders of its own for some ``quant_method``s, which need further packages
and other layers. Here the model is built from its config without that entry.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from onecomp.errors import InputError
from onecomp.export.checkpoint import ADAPTER_FOLDER, CONFIG, TOKENIZER_CONFIG
from onecomp.export.quant_config import LayerFormat, check_quant_config, quantized_layers
from onecomp.models.config import load_tokenizer
from onecomp.models.source import ModelSource, download_model
from onecomp.quantizer.dbf.layer import DoubleBinaryLinear
from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.onebit.layer import OnebitLinear
from onecomp.quantizer.quant_linear import QuantLinear

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json")

T = TypeVar("T")
DeviceMap = str | Mapping[str, int | str | torch.device] | None


LAYERS: dict[str, type[QuantLinear]] = {
    "dbf": DoubleBinaryLinear,
    "gptq": GPTQLinear,
    "onebit": OnebitLinear,
}
"""Method of a layer -> the layer that its tensors are of."""

CODE_TENSORS = frozenset().union(*(layer.code_tensors for layer in LAYERS.values()))
"""Names that only quantized layers have."""


def load_quantized_model(
    directory: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    device_map: DeviceMap = "auto",
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    adapters: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a checkpoint that this package wrote, quantized or dequantized.

    Only safetensors and JSON files are read; nothing is unpickled.

    Args:
        directory: Checkpoint directory, or a Hub id.
        torch_dtype: Type of everything but the quantized layers; None takes the checkpoint's.
        device_map: As ``accelerate`` understands it. Without CUDA, and for ``"cpu"`` and None, the
            model stays on the CPU.
        trust_remote_code: Run model code that comes with the checkpoint.
        local_files_only: Do not ask the Hub.
        adapters: Put the LoRA adapters on that the checkpoint's folder ``adapter`` has, if any;
            ``PeftModel.from_pretrained`` does so, too, for a model without them.

    Returns:
        The model, in evaluation mode, with ``config.quantization_config`` as a plain dict where
        it is quantized; and the tokenizer, or None where the checkpoint has none.

    Raises:
        InputError: The checkpoint is missing, incomplete, damaged or of an unknown kind.
    """
    path = checkpoint_directory(directory, local_files_only)
    settings = read_json(path / CONFIG)
    source = ModelSource(str(directory), path, trust_remote_code)
    weights = Weights(path, source.read(source.tensor_files))
    config = _model_config(path, trust_remote_code)
    tokenizer = _tokenizer(path, trust_remote_code)
    dtype = torch_dtype or config.dtype or torch.float32
    if settings.get("quantization_config") is None:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    else:
        check_quant_config(settings["quantization_config"], path)
        model = _quantized_model(config, weights, dtype, trust_remote_code)
        model.config.quantization_config = settings["quantization_config"]
        if (path / GENERATION_CONFIG).exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
        let_peft_know_quantized_layers()
    if (path / ADAPTER_FOLDER).is_dir():
        if adapters:
            _load_adapters(model, path / ADAPTER_FOLDER)
        else:
            logger.info("without the LoRA adapters of %s; adapters=True puts them on", path)
    return _dispatch(model.eval(), device_map), tokenizer


def let_peft_know_quantized_layers() -> None:
    """Let ``PeftModel.from_pretrained`` put LoRA adapters on the models that are made here."""
    # PEFT takes half a second, and only who holds a whole model can use it.
    from onecomp.post_process.lora.layers import register_with_peft  # noqa: PLC0415

    register_with_peft()


def _load_adapters(model: PreTrainedModel, directory: Path) -> None:
    from onecomp.post_process.lora.adapter import load_adapters  # noqa: PLC0415 - as above

    load_adapters(model, directory)
    logger.info("with the LoRA adapters of %s", directory)


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint by name, mapped from its files and not read before they are used."""

    directory: Path
    tensors: dict[str, Tensor]


def by_module(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Module name -> what belongs to its own tensors, by their name inside the module."""
    modules: dict[str, dict[str, T]] = {}
    for name, value in tensors.items():
        module_name, _, leaf = name.rpartition(".")
        modules.setdefault(module_name, {})[leaf] = value
    return modules


class QuantizedModelLoader:
    """:func:`load_quantized_model` under its documented second name."""

    load_quantized_model = staticmethod(load_quantized_model)


def checkpoint_directory(directory: str | Path, local_files_only: bool) -> Path:
    """Where a checkpoint lies, downloaded first if it is a Hub id.

    Raises:
        InputError: There is no such checkpoint.
    """
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(directory, "is a file, not a directory. Name the checkpoint's directory.")
    if not path.exists():
        path = download_model(str(directory), local_files_only=local_files_only)
    if not (path / CONFIG).exists():
        raise InputError(
            path, f"holds no {CONFIG}: it is no checkpoint, or writing it was interrupted."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's contents.

    Raises:
        InputError: It holds something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, f"is not valid JSON ({error}). Copy it again.") from error


def _model_config(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InputError(path, str(error)) from error


def _quantized_model(
    config: PretrainedConfig, weights: Weights, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    quantization = config.quantization_config
    del config.quantization_config
    # Buffers that no checkpoint holds (rotary frequencies) are computed here, for good.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    modules, states = dict(model.named_modules()), by_module(weights.tensors)
    for name, stored in quantized_layers(quantization, modules).items():
        layer = load_layer(states.pop(name, {}), stored, name, weights.directory)
        _place_layer(modules, name, layer, weights.directory)
    for name, tensors in states.items():
        _fill_module(modules.get(name), name, tensors, weights.directory)
    model.tie_weights()
    _check_complete(model, weights)
    return model


def load_layer(
    state: dict[str, Tensor], stored: LayerFormat, name: str, directory: Path
) -> QuantLinear:
    """One quantized layer from its tensors.

    Raises:
        InputError: An unknown method, or tensors that do not fit.
    """
    if stored.method not in LAYERS:
        known = ", ".join(sorted(LAYERS))
        raise InputError(directory, f"{name}: method {stored.method!r} is unknown. Known: {known}.")
    return LAYERS[stored.method].from_checkpoint(state, stored, f"{directory}: {name}")


def _place_layer(
    modules: dict[str, nn.Module], name: str, layer: QuantLinear, directory: Path
) -> None:
    linear = modules.get(name)
    if not isinstance(linear, nn.Linear):
        found = "no such module" if linear is None else f"a {type(linear).__name__} there"
        raise InputError(directory, f"{name} is quantized, but the model has {found}.")
    shape, expected = (layer.out_features, layer.in_features), tuple(linear.weight.shape)
    if shape != expected:
        raise InputError(directory, f"{name} has shape {shape}, but the model expects {expected}.")
    if (layer.bias is None) != (linear.bias is None):
        found, wanted = ("no bias", "one") if layer.bias is None else ("a bias", "none")
        raise InputError(directory, f"{name} has {found}, but the model expects {wanted}.")
    parent, _, leaf = name.rpartition(".")
    setattr(modules[parent], leaf, layer)


def _fill_module(
    module: nn.Module | None, name: str, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Put the checkpoint's tensors into one module that is not quantized."""
    if CODE_TENSORS & tensors.keys():
        raise InputError(
            directory,
            f"unexpected quantized tensors {name}.{{{','.join(sorted(tensors))}}}: "
            "the quantization_config does not list this layer.",
        )
    own = {} if module is None else _own_tensors(module)
    if unused := sorted(tensors.keys() - own.keys()):
        logger.warning("%s: the model does not use %s of %s.", directory, ", ".join(unused), name)
    state = {leaf: tensors[leaf].to(own[leaf].dtype) for leaf in own.keys() & tensors.keys()}
    for leaf, tensor in state.items():
        if tensor.shape != own[leaf].shape:
            found, expected = tuple(tensor.shape), tuple(own[leaf].shape)
            raise InputError(
                directory, f"{name}.{leaf} has shape {found}, but the model expects {expected}."
            )
    if module is not None:
        module.load_state_dict(state, strict=False, assign=True)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(recurse=False)
    return {**dict(parameters), **dict(module.named_buffers(recurse=False))}


def _check_complete(model: PreTrainedModel, weights: Weights) -> None:
    buffers = dict(model.named_buffers())
    missing = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_meta or (name in buffers and name not in weights.tensors)
    ]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            weights.directory,
            f"tensors missing in the checkpoint: {', '.join(missing[:5])}{more}. "
            "Write or copy the checkpoint again.",
        )


def _dispatch(model: PreTrainedModel, device_map: DeviceMap) -> PreTrainedModel:
    if device_map is None or device_map == "cpu" or not torch.cuda.is_available():
        return model
    return dispatch_model(model, device_map=_placement(model, device_map))


def _placement(
    model: PreTrainedModel, device_map: str | Mapping[str, int | str | torch.device]
) -> dict[Any, Any]:
    if not isinstance(device_map, str):
        return dict(device_map)
    if device_map != "auto":
        return {"": device_map}
    whole = list(model._no_split_modules)
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))


def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(path, trust_remote_code=trust_remote_code)
