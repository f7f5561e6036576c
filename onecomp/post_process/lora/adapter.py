"""Putting adapters on a model, taking them off, and their files, which are PEFT's own."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    LoraModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from onecomp.errors import ConfigError, InputError
from onecomp.export.checkpoint import write_shard
from onecomp.post_process.lora.layers import adapter_layers, register_with_peft
from onecomp.quantizer.quant_linear import QuantLinear

ADAPTER = "default"
"""PEFT's name for the only adapter."""
FILE_PREFIX = "base_model.model."
"""What PEFT puts in front of names in its files: there the model is wrapped twice."""
USUAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targeted_layers(
    process: str, layers: Mapping[str, QuantLinear], target_modules: Sequence[str] | None
) -> dict[str, QuantLinear]:
    """The quantized layers that get an adapter.

    Args:
        process: Name for messages.
        layers: All quantized layers by full name.
        target_modules: Names, or ends of names; None for the usual projections that there are,
            and where there is none of them for every layer but ``lm_head``.

    Raises:
        ConfigError: A name fits no layer.
    """
    if target_modules is None:
        usual = {name: layer for name, layer in layers.items() if _fits(name, USUAL_TARGETS)}
        return usual or {name: m for name, m in layers.items() if not _fits(name, ("lm_head",))}
    if unknown := [t for t in target_modules if not any(_fits(name, (t,)) for name in layers)]:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise ConfigError(
            process,
            [
                f"target_modules: no quantized layer is called {', '.join(unknown)}. "
                f"There are: {leaves}."
            ],
        )
    return {name: layer for name, layer in layers.items() if _fits(name, target_modules)}


def _fits(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def target_names(model: nn.Module, targets: Mapping[str, QuantLinear]) -> list[str]:
    """What PEFT's configuration calls the layers: by last names, if those fit no other module."""
    leaves = {name.rpartition(".")[2] for name in targets}
    others = (name for name, _ in model.named_modules() if name not in targets)
    return sorted(targets if any(_fits(name, sorted(leaves)) for name in others) else leaves)


def require_no_adapters(process: str, model: nn.Module) -> None:
    """Check that a model has no adapters yet.

    Raises:
        InputError: It has.
    """
    if adapter_layers(model):
        raise InputError(
            process,
            "the model has LoRA adapters already, and adapters on adapters have no file format. "
            "Train once, with the settings of both runs, or load the checkpoint without them.",
        )


class Trial:
    """Adapters that are gone after their context unless they are kept."""

    def __init__(self) -> None:
        self.is_kept = False

    def keep(self) -> None:
        """Let the adapters stay."""
        self.is_kept = True


@contextmanager
def adapters_on_trial(
    model: nn.Module, layers: Mapping[str, QuantLinear], config: LoraConfig, seed: int
) -> Iterator[Trial]:
    """Give layers of a model adapters, in place; fresh ones change no output.

    After an error, or if they are not kept, the model is as it was.

    Args:
        model: On any device.
        layers: The layers by full name, those that ``config`` names.
        config: PEFT's settings.
        seed: Of the random matrices; torch's own random state is not touched.
    """
    trial = Trial()
    required_gradients = [(p, p.requires_grad) for p in model.parameters()]
    register_with_peft()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, ADAPTER)
        yield trial
    finally:
        if not trial.is_kept:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            vars(model).pop("peft_config", None)
        for parameter, required in required_gradients:
            parameter.requires_grad = required


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is trained, by full name."""
    return {
        f"{name}.{key}": parameter
        for name, layer in adapter_layers(model).items()
        for key, parameter in layer.named_parameters()
        if key.startswith(LoraModel.prefix)
    }


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model with bare quantized layers inside the context, to write its checkpoint, say."""
    adapted = adapter_layers(model)
    try:
        for name, layer in adapted.items():
            model.set_submodule(name, layer.get_base_layer())
        yield
    finally:
        for name, layer in adapted.items():
            model.set_submodule(name, layer)


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Put adapters on a model, in place: the inverse of ``save_adapter``.

    Args:
        model: Without adapters.
        directory: Has PEFT's files.

    Raises:
        InputError: The adapters are those of another model.
    """
    register_with_peft()
    inject_adapter_in_model(LoraConfig.from_pretrained(str(directory)), model, ADAPTER)
    stored = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    state = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in stored.items()}
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in expected.items()}:
        raise InputError(
            directory, "holds adapters of another model. Move the folder away to use the model."
        )
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)


def save_adapter(model: nn.Module, directory: Path) -> None:
    """Write a model's adapters as ``PeftModel.from_pretrained`` reads them.

    Args:
        model: With adapters in place.
        directory: Gets ``adapter_model.safetensors`` and ``adapter_config.json``.
    """
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {FILE_PREFIX + name: tensor for name, tensor in state.items()}
    write_shard(directory, SAFETENSORS_WEIGHTS_NAME, tensors)
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(directory))
